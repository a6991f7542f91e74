"""The discrete Gaussian process: schedule, respacing, posterior, loss terms."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from layers.diffusion.gaussian import (
    Coefficients,
    GaussianProcess,
    cosine_betas,
    discretized_log_likelihood,
    hybrid_terms,
    kept_timesteps,
    normal_kl,
    posterior_mean,
    predict_xstart,
    q_sample,
    reverse_step,
)

PROCESS = GaussianProcess.cosine(1000)


def coefficients(timestep: int, process: GaussianProcess = PROCESS) -> Coefficients:
    """Float64 numbers of one timestep."""
    return Coefficients(*(torch.tensor(getattr(process, name)[timestep]) for name in Coefficients._fields))


def test_cosine_schedule_has_the_known_ends_and_its_cap():
    assert PROCESS.alphas_cumprod[0] == pytest.approx(0.999958716, abs=1e-9)
    assert PROCESS.alphas_cumprod[-1] == pytest.approx(2.4288e-9, rel=1e-4)
    betas = cosine_betas(1000)
    assert betas.dtype == np.float64 and betas[-1] == 0.999 and (betas[:-1] < 0.999).all() and (betas > 0).all()


@pytest.mark.parametrize(
    ("sections", "kept"),
    [
        (5, [0, 2, 4, 7, 9]),
        ("5", [0, 2, 4, 7, 9]),
        ("1", [0]),
        ("10", list(range(10))),
        ("2,3", [0, 4, 5, 7, 9]),
        ("1,1,1", [0, 4, 7]),
        ("ddim5", [0, 2, 4, 6, 8]),
        ("ddim4", [0, 3, 6, 9]),
    ],
)
def test_kept_timesteps_of_ten(sections, kept):
    """Strides are walked in float and rounded half to even: 9/4 = 2.25 gives 0, 2.25, 4.5, 6.75, 9."""
    assert kept_timesteps(10, sections) == kept


@pytest.mark.parametrize("sections", ["11", "0", "6,3", "2,0", "ddim7"])
def test_too_many_or_no_timesteps_are_an_error(sections):
    with pytest.raises(ValueError, match=r"keep"):
        kept_timesteps(10, sections)


def test_a_shorter_process_has_the_noise_levels_of_the_kept_timesteps():
    shorter = PROCESS.respaced(25)
    np.testing.assert_allclose(shorter.alphas_cumprod, PROCESS.alphas_cumprod[shorter.timestep_map], rtol=1e-9)
    assert shorter.timestep_map[[0, -1]].tolist() == [0, 999] and len(shorter.betas) == 25
    np.testing.assert_allclose(PROCESS.respaced(1000).betas, PROCESS.betas, rtol=1e-9)


def test_one_timestep_is_no_process():
    with pytest.raises(ValueError, match="process of 1 timestep"):
        PROCESS.respaced(1)


def test_device_table_is_the_float64_table_rounded_once():
    table = PROCESS.coefficients()
    assert table.shape == (1000, len(Coefficients._fields)) and table.dtype == torch.float32
    expected = torch.from_numpy(PROCESS.log_betas).float()
    assert torch.equal(table[:, Coefficients._fields.index("log_betas")], expected)
    c = Coefficients.at(table, torch.tensor([[0, 999, 5]]))
    assert c.log_betas.shape == (1, 3, 1) and torch.equal(c.log_betas.flatten(), expected[[0, 999, 5]])
    assert c.adds_noise.flatten().tolist() == [0, 1, 1]


@pytest.mark.parametrize("process", [PROCESS, PROCESS.respaced(10)])
def test_posterior_is_the_law_of_bayes(process):
    """q(x_{t-1} | x_t, x): precisions and weighted means of q(x_{t-1} | x) and of q(x_t | x_{t-1}) add up."""
    x, x_t = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    for t in (1, 3, len(process.betas) - 1):
        alpha, beta, before = 1 - process.betas[t], process.betas[t], process.alphas_cumprod_prev[t]
        precision = alpha / beta + 1 / (1 - before)
        mean = (math.sqrt(alpha) * x_t / beta + math.sqrt(before) * x / (1 - before)) / precision
        c = coefficients(t, process)
        torch.testing.assert_close(posterior_mean(x, x_t, c), mean, rtol=1e-9, atol=0)
        assert math.exp(c.posterior_log_variance_clipped) == pytest.approx(1 / precision, rel=1e-9)


def test_first_log_variance_is_its_neighbours():
    assert PROCESS.posterior_variance[0] == 0
    assert PROCESS.posterior_log_variance_clipped[0] == math.log(PROCESS.posterior_variance[1])


@pytest.mark.parametrize("timestep", [0, 500, 999])
def test_noise_and_data_determine_each_other(timestep):
    x, noise, c = *torch.randn(2, 4, dtype=torch.float64), coefficients(timestep)
    torch.testing.assert_close(predict_xstart(q_sample(x, noise, c), noise, c), x, atol=1e-9, rtol=0)


def test_variance_logits_run_from_the_posteriors_variance_to_beta_and_beyond():
    x_t, eps, c = *torch.randn(2, 4, dtype=torch.float64), coefficients(400)
    low, high = c.posterior_log_variance_clipped, c.log_betas
    for v, expected in ((-1.0, low), (1.0, high), (0.0, (low + high) / 2), (3.0, 2 * high - low)):
        step = reverse_step(x_t, eps, torch.full_like(x_t, v), c)
        torch.testing.assert_close(step.log_variance, expected.expand(4))
        torch.testing.assert_close(step.mean, posterior_mean(step.pred_xstart, x_t, c))


def test_kl_is_that_of_normal_laws():
    mean_q, log_q, mean_p, log_p = torch.randn(4, 6, dtype=torch.float64)
    expected = kl_divergence(Normal(mean_q, (log_q / 2).exp()), Normal(mean_p, (log_p / 2).exp()))
    torch.testing.assert_close(normal_kl(mean_q, log_q, mean_p, log_p), expected)


def test_bins_of_all_levels_share_the_whole_mass():
    """Levels 2k/255 - 1 have adjoining bins, the outer ones open: the masses of a wide law add up to 1."""
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, std in ((0.1, 0.4), (-0.9, 0.5)):
        log_variance = torch.full_like(levels, 2 * math.log(std))
        mass = discretized_log_likelihood(levels, torch.full_like(levels, mean), log_variance).exp()
        assert mass.sum().item() == pytest.approx(1, abs=1e-9)
        exact = Normal(mean, std).cdf(levels + 1 / 255) - Normal(mean, std).cdf(levels - 1 / 255)
        torch.testing.assert_close(mass[1:-1], exact[1:-1], atol=1e-5, rtol=5e-2)  # tanh approximation


def test_mass_of_a_bin_is_at_least_the_floor():
    x = torch.tensor([-1.0, 0.0, 1.0])
    assert discretized_log_likelihood(x, torch.full((3,), 90.0), torch.zeros(3)).tolist() == pytest.approx(
        [math.log(1e-12), math.log(1e-12), 0.0], abs=1e-5
    )


def terms_at(timesteps: list[int], eps_error: float = 0.0, v: float = -1.0):
    """mse and vb of a prediction that is off by `eps_error`, the leaves it came from, data and its noised version."""
    x, noise = torch.randn(2, len(timesteps), 5, dtype=torch.float64)
    c = Coefficients.at(PROCESS.coefficients().double(), torch.tensor(timesteps))
    x_t = q_sample(x, noise, c)
    eps = (noise + eps_error).requires_grad_()
    logits = torch.full_like(noise, v).requires_grad_()
    return *hybrid_terms(x, x_t, noise, eps, logits, c), eps, logits, x, x_t


def test_a_perfect_prediction_costs_nothing_after_timestep_0():
    mse, vb, *_ = terms_at([1, 10, 500])
    assert (mse == 0).all()
    torch.testing.assert_close(vb, torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)


def test_vb_is_the_kl_in_bits_and_at_timestep_0_the_likelihood():
    mse, vb, eps, v, x, x_t = terms_at([300, 0], eps_error=0.2, v=0.4)
    torch.testing.assert_close(mse, torch.full((2,), 0.04, dtype=torch.float64))
    c = coefficients(300)
    fraction, low, high = 0.7, c.posterior_log_variance_clipped, c.log_betas
    log_variance = fraction * high + (1 - fraction) * low
    shift = 0.2 * c.posterior_mean_coef1 * c.sqrt_recipm1_alphas_cumprod  # of the mean
    kl = kl_divergence(Normal(0.0, (low / 2).exp()), Normal(shift, (log_variance / 2).exp()))
    torch.testing.assert_close(vb[0], kl / math.log(2), rtol=1e-4, atol=0)
    step = reverse_step(x_t[1], eps[1], v[1], coefficients(0))
    nll = -discretized_log_likelihood(x[1], step.mean, step.log_variance).mean()
    torch.testing.assert_close(vb[1], nll / math.log(2), rtol=1e-4, atol=0)


def test_eps_learns_from_mse_alone_and_v_from_vb_alone():
    mse, vb, eps, v, *_ = terms_at([0, 7, 999], eps_error=0.1, v=0.3)
    assert torch.autograd.grad(vb.sum(), (eps, v), allow_unused=True, retain_graph=True)[0] is None
    assert (torch.autograd.grad(vb.sum(), v, retain_graph=True)[0] != 0).any(dim=1).all()
    grad_eps, grad_v = torch.autograd.grad(mse.sum(), (eps, v), allow_unused=True)
    assert (grad_eps != 0).all() and grad_v is None

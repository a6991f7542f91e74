"""Samplers of a discrete process on normal data, for which the best prediction is known.

A sampler with a linear prediction maps its draws linearly, so mean and variance of its samples come without sampling:
row 0 has no noise at all, row 1 + k only the k-th draw, of size 1.
"""

import pytest
import torch
from torch import Tensor

from layers.diffusion.gaussian import Coefficients, GaussianProcess, reverse_step
from layers.samplers.ddpm import ancestral, ddim

MEAN, STD = 1.5, 0.6


def steps_of(num_steps: int) -> list[Coefficients]:
    """Coefficients in the order of use, noisiest first."""
    table = GaussianProcess.cosine(1000).respaced(num_steps).coefficients().double().flip(0)
    return [Coefficients(*row.unbind()) for row in table]


def best_eps(x: Tensor, c: Coefficients) -> Tensor:
    """E[eps | x_t] for data N(MEAN, STD^2)."""
    variance = (c.sqrt_alphas_cumprod * STD) ** 2 + c.sqrt_one_minus_alphas_cumprod**2
    return c.sqrt_one_minus_alphas_cumprod * (x - c.sqrt_alphas_cumprod * MEAN) / variance


def moments(sampler, num_draws: int) -> tuple[float, float]:
    """Mean and standard deviation of sampler(x (R, 1), noise (num_draws, R, 1))."""
    draws = torch.cat([torch.zeros(1, num_draws + 1), torch.eye(num_draws + 1)]).double()  # (R, 1 + num_draws)
    out = sampler(draws[:, :1], draws.T[1:, :, None])[:, 0]
    return out[0].item(), (out[1:] - out[0]).square().sum().sqrt().item()


def test_ancestral_sampling_with_the_true_law_of_each_step_is_exact():
    """p(x_{t-1} | x_t) of normal data: the posterior's variance plus that of its mean. Ten steps suffice."""
    steps = steps_of(10)

    def reverse(x, i):
        c = steps[i]
        step = reverse_step(x, best_eps(x, c), torch.full_like(x, -1.0), c)
        noise, signal = c.sqrt_one_minus_alphas_cumprod**2, c.sqrt_alphas_cumprod**2
        data_variance = STD**2 * noise / (signal * STD**2 + noise)
        posterior = c.adds_noise * step.log_variance.exp()
        return step.mean, (posterior + c.posterior_mean_coef1**2 * data_variance).log()

    mean, std = moments(lambda x, noise: ancestral(reverse, x, noise), 10)
    assert mean == pytest.approx(MEAN, abs=1e-4) and std == pytest.approx(STD, abs=1e-4)


@pytest.mark.parametrize("v", [-1.0, 1.0])
def test_ancestral_sampling_in_many_steps_recovers_the_data_with_either_variance(v):
    steps = steps_of(1000)

    def reverse(x, i):
        return reverse_step(x, best_eps(x, steps[i]), torch.full_like(x, v), steps[i])[:2]

    def sampler(x, noise):
        return ancestral(reverse, x, noise * torch.stack([c.adds_noise for c in steps])[:, None, None])

    mean, std = moments(sampler, 1000)
    assert mean == pytest.approx(MEAN, abs=1e-4) and std == pytest.approx(STD, abs=4e-3)


def ddim_moments(num_steps: int) -> tuple[float, float]:
    steps = steps_of(num_steps)

    def predict(x, i):
        eps, c = best_eps(x, steps[i]), steps[i]
        return (x - c.sqrt_one_minus_alphas_cumprod * eps) / c.sqrt_alphas_cumprod, eps

    scales = [torch.stack(s) for s in zip(*((c[-3], c[-2]) for c in steps), strict=True)]
    return moments(lambda x, _: ddim(predict, x, *scales), 0)


def test_ddim_recovers_the_data_and_its_error_falls_with_the_step():
    means, stds = zip(*(ddim_moments(n) for n in (50, 100, 200, 1000)), strict=True)
    assert means[-1] == pytest.approx(MEAN, abs=5e-3) and stds[-1] == pytest.approx(STD, abs=5e-3)
    errors = [abs(std - STD) for std in stds[:3]]
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.5) and errors[1] / errors[2] == pytest.approx(2, abs=0.5)


def test_steps_are_asked_in_order_and_each_uses_its_own_draw():
    asked, noise = [], torch.randn(4, 2, 3)

    def reverse(x, i):
        asked.append(i)
        return 2 * x, torch.full_like(x, 2.0 * i)  # standard deviations e^i

    x = start = torch.randn(2, 3)
    for i in range(4):
        x = 2 * x + torch.tensor(float(i)).exp() * noise[i]
    torch.testing.assert_close(ancestral(reverse, start, noise), x)
    assert asked == [0, 1, 2, 3]

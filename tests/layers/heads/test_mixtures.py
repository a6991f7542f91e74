"""Mixtures against torch.distributions; components and tokens from given draws; temperatures; truncation."""

import math

import pytest
import torch
from torch import Tensor
from torch import distributions as td

from layers.heads.mixtures import (
    SCALE_MIN,
    SCALES,
    DiagonalMixture,
    FullGaussian,
    Gaussian,
    PerChannelMixture,
    nucleus,
    quantile,
    squareplus,
)

B, L, D, K = 2, 5, 3, 4


def outputs_of(kind: type, num_mixtures: int = K) -> Tensor:
    return 2 * torch.randn(B, L, kind.num_outputs(D, num_mixtures))


def reference(mixture) -> td.Distribution:
    """The same law by torch.distributions."""
    if isinstance(mixture, FullGaussian):
        return td.MultivariateNormal(mixture.loc, scale_tril=mixture.scale_tril)
    normal = td.Normal(mixture.loc, mixture.scale)
    if isinstance(mixture, DiagonalMixture):
        normal = td.Independent(normal, 1)
    return td.MixtureSameFamily(td.Categorical(logits=mixture.logits), normal)


@pytest.mark.parametrize("kind", [DiagonalMixture, PerChannelMixture, FullGaussian])
def test_log_prob_and_its_gradients_are_those_of_the_law(kind):
    outputs, x = outputs_of(kind).requires_grad_(), torch.randn(B, L, D, requires_grad=True)
    mixture = kind.parse(outputs, D)
    ours, theirs = mixture.log_prob(x), reference(mixture).log_prob(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(v.sum(), (outputs, x), retain_graph=True) for v in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [DiagonalMixture, PerChannelMixture])
def test_log_prob_has_no_trouble_with_far_tokens_and_lopsided_weights(kind):
    outputs = outputs_of(kind)
    logits = outputs[..., : K if kind is DiagonalMixture else D * K]
    logits[0], logits[1, ..., 0] = -1e4, 1e4
    x = torch.full((B, L, D), 1e6)
    log_prob = kind.parse(outputs, D).log_prob(x)
    assert log_prob.isfinite().all() and (log_prob < -1e6).all()


def test_layouts_are_the_official_ones():
    """Diagonal: logits, then (K, 2, D). Per channel: (3, D, K). Full: D^2 row-major, then D."""
    numbers = torch.arange(1000.0)
    diagonal = DiagonalMixture.parse(numbers[: K + 2 * K * D], D)
    assert diagonal.logits.tolist() == [0, 1, 2, 3]
    assert diagonal.loc[1].tolist() == [K + 2 * D, K + 2 * D + 1, K + 2 * D + 2]
    torch.testing.assert_close(diagonal.scale[1], squareplus(diagonal.loc[1] + D))
    channels = PerChannelMixture.parse(numbers[: 3 * D * K], D)
    assert channels.logits[1].tolist() == [4, 5, 6, 7] and channels.loc[0].tolist() == [12, 13, 14, 15]
    torch.testing.assert_close(channels.scale[2], squareplus(torch.arange(32.0, 36.0)))
    full = FullGaussian.parse(numbers[: D * D + D], D)
    assert full.loc.tolist() == [9, 10, 11]
    torch.testing.assert_close(full.scale_tril, squareplus(numbers[:9].view(3, 3)).tril())


@pytest.mark.parametrize(("kind", "choices"), [(DiagonalMixture, 1), (PerChannelMixture, D)])
def test_a_components_outputs_are_found_without_the_others(kind, choices):
    outputs = outputs_of(kind)
    component = torch.randint(K, (B, L, choices))
    if kind is DiagonalMixture:
        component = component[..., 0]
    found = kind.outputs_of(component, D, K)  # (B, L, 2, D)
    loc, raw = outputs.gather(-1, found.flatten(-2)).unflatten(-1, (2, D)).unbind(-2)
    gaussian = kind.parse(outputs, D).gaussian(component)
    assert torch.equal(loc, gaussian.loc) and torch.equal(squareplus(raw), gaussian.scale)


@pytest.mark.parametrize("kind", [DiagonalMixture, PerChannelMixture])
def test_drawn_tokens_have_the_laws_distribution(kind):
    """Means and spreads of many tokens against the mixture's own."""
    n, mixture = 40_000, kind.parse(outputs_of(kind)[0, :1], D)
    many = kind(*(t.expand(n, *t.shape[1:]) for t in mixture))
    u = torch.rand(n) if kind is DiagonalMixture else torch.rand(n, D)
    x = many.gaussian(many.component(u)).sample(torch.randn(n, D))
    law, tolerance = reference(mixture), 5 / math.sqrt(n)
    deviation = law.variance.sqrt()[0]
    assert ((x.mean(0) - law.mean[0]) / deviation).abs().max() < tolerance
    assert (x.std(0) / deviation - 1).abs().max() < 2 * tolerance
    near = torch.stack([(mixture.log_prob(draw.expand(1, D))).mean() for draw in x[:200]]).mean()
    assert (near - mixture.log_prob(law.sample((4000,))[:, 0]).mean()).abs() < 1


def test_a_full_gaussian_is_drawn_by_its_factor():
    full = FullGaussian.parse(outputs_of(FullGaussian), D)
    eps = torch.randn(B, L, D)
    torch.testing.assert_close(full.sample(eps), full.loc + torch.einsum("...ij,...j->...i", full.scale_tril, eps))
    whitened = torch.linalg.solve(full.scale_tril, (full.sample(9 * eps, clip=0.5) - full.loc)[..., None])
    assert whitened.abs().max() < 0.5 + 1e-4


@pytest.mark.parametrize("kind", [DiagonalMixture, PerChannelMixture])
def test_temperatures_act_on_scales_and_weights(kind):
    mixture = kind.parse(outputs_of(kind), D)
    cold = mixture.tempered(0.8, 1.5)
    assert torch.equal(cold.scale, 0.8 * mixture.scale) and torch.equal(cold.loc, mixture.loc)
    assert (cold.logits.softmax(-1).amax(-1) > mixture.logits.softmax(-1).amax(-1)).all()
    full = FullGaussian.parse(outputs_of(FullGaussian), D)
    assert torch.equal(full.tempered(0.8).scale_tril, 0.8 * full.scale_tril)


@pytest.mark.parametrize(
    ("temperatures", "message"),
    [((0.0, 1.0), r"temperature is 0\.0"), ((-1.0, 1.0), r"temperature is -1\.0"), ((1.0, -0.5), "inv_temperature is")],
)
def test_temperatures_out_of_range_are_named(temperatures, message):
    for kind in (DiagonalMixture, PerChannelMixture, FullGaussian):
        with pytest.raises(ValueError, match=message):
            kind.parse(outputs_of(kind), D).tempered(*temperatures)


def test_squareplus_keeps_the_official_form():
    x = torch.tensor([0.0, 3.0, -30.0, -4096.0, -1e5])
    assert squareplus(x).tolist()[3:] == [2.0**-12, 0.0]  # 2.4414e-4: float32 cancels; the stable form differs
    torch.testing.assert_close(
        squareplus(x.double()), 2 / ((x.double().square() + 4).sqrt() - x.double()), rtol=1e-5, atol=0
    )
    assert SCALES["squareplus_unfixed"](torch.tensor(-2.0)) < 0 and SCALES["softplus"](torch.tensor(0.0)) == math.log(2)


def test_no_gradient_flows_where_the_smallest_scale_holds():
    for name in SCALES:
        outputs = torch.full((1, 3), -1e5, requires_grad=True)
        mixture = DiagonalMixture.parse(outputs, 1, scale=name, scale_min=0.5)
        assert mixture.scale.item() == 0.5
        mixture.log_prob(torch.zeros(1, 1)).sum().backward()
        assert outputs.grad[0, 2] == 0
    assert DiagonalMixture.parse(torch.full((1, 3), -1e5), 1).scale.item() == pytest.approx(SCALE_MIN)


def test_components_have_their_weights():
    """Draws at the midpoints of N equal parts: each component's count is N times its weight, up to one."""
    n, logits = 10_000, torch.tensor([1.0, -2.0, -torch.inf, 0.5, -9.0, 2.0])
    u = (torch.arange(n) + 0.5).double() / n
    counts = quantile(logits.expand(n, 6), u).bincount(minlength=6)
    assert (counts - n * logits.softmax(0)).abs().max() <= 1.01
    assert counts[2] == 0
    assert quantile(logits.expand(2, 6), torch.tensor([0.0, 1.0])).tolist() == [0, 5]


def test_nucleus_keeps_the_likeliest_up_to_the_mass():
    weights = torch.tensor([0.05, 0.5, 0.15, 0.3])
    for top_p, kept in [
        (1e-9, [1]),
        (0.49, [1]),
        (0.51, [1, 3]),
        (0.81, [1, 2, 3]),
        (0.96, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ]:
        logits = nucleus(weights.log(), top_p)
        assert logits.isfinite().nonzero().flatten().tolist() == kept
        torch.testing.assert_close(logits[kept], weights.log()[kept])
    assert nucleus(torch.zeros(2, 3, 5), 0.5).isfinite().sum(-1).unique().tolist() == [3]
    for top_p in (0.0, -1.0, 1.1):
        with pytest.raises(ValueError, match=f"top_p is {top_p}"):
            nucleus(weights, top_p)


@pytest.mark.parametrize("kind", [DiagonalMixture, PerChannelMixture])
def test_a_truncated_mixture_never_draws_what_it_dropped(kind):
    mixture = kind.parse(outputs_of(kind), D)
    truncated = mixture.truncated(0.6)
    assert (truncated.logits.isinf().sum(-1) > 0).any()
    for u in torch.linspace(0, 1, 21):
        component = truncated.component(u.expand(mixture.logits.shape[:-1]))
        assert truncated.logits.gather(-1, component[..., None]).isfinite().all()
    assert truncated.log_prob(torch.randn(B, L, D)).isfinite().all()


def test_clipping_keeps_tokens_within_sigmas():
    gaussian, eps = Gaussian(torch.randn(100, D), torch.rand(100, D) + 0.1), 3 * torch.randn(100, D)
    x = gaussian.sample(eps, clip=1.5)
    distance = ((x - gaussian.loc) / gaussian.scale).abs()
    assert distance.max() < 1.5 + 1e-4 and torch.equal(x[eps.abs() < 1.5], gaussian.sample(eps)[eps.abs() < 1.5])

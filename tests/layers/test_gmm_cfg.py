"""Density-based guidance: the closed form is the product of densities, and draws what the official rejection draws."""

import math

import pytest
import torch
from torch import Tensor

from layers.samplers.gmm_cfg import (
    BLOCK,
    FARTHEST,
    LOG_FLOAT32_MAX,
    guided_closed_form,
    guided_log_density,
    guided_rejection,
    guided_rejection_blocks,
    product,
)

N = 4000
KOLMOGOROV = 1.63 * math.sqrt(2 / N)  # two samples of one law are farther apart once in a hundred times
# loc_c, scale_c, loc_u, scale_u, w: ordinary ones
ORDINARY = [
    (0.0, 1.0, 0.0, 0.65, 0.4),
    (0.5, 1.0, -1.0, 1.5, 0.4),
    (1.0, 0.2, 1.1, 0.3, 0.9),
    (-3.0, 0.01, -3.005, 0.012, 2.0),
    (0.0, 1.0, 1.0, 2.0, -0.5),  # between the two, cfg_scale 0.5
]
# p has no integral | is wider than the proposals | lies out of their reach | overflows float32 near the conditional's
UNREACHED = [
    (0.0, 1.0, 0.1, 0.6, 0.9),
    (0.0, 1.0, 0.1, 0.695, 0.9),
    (0.0, 1.0, -10.0, 1.0, 0.9),
    (0.0, 0.5, -15.0, 1.0, 0.9),
]


def scalars(case: tuple[float, ...], rows: int) -> tuple:
    """The arguments as tensors (rows,), and w."""
    *numbers, w = case
    return *(torch.full((rows,), number) for number in numbers), w


def distance(a: Tensor, b: Tensor) -> float:
    """Kolmogorov and Smirnov's, of two samples of N."""
    a, b = a.sort().values, b.sort().values
    grid = torch.cat([a, b])
    return (torch.searchsorted(a, grid, right=True) - torch.searchsorted(b, grid, right=True)).abs().max().item() / N


def rejected(case: tuple[float, ...], proposals: int = 1000):
    args = scalars(case, N)
    return guided_rejection(*args, torch.randn(proposals, N), torch.rand(proposals, N), torch.randn(N))


@pytest.mark.parametrize("case", ORDINARY)
def test_product_has_the_density(case):
    """log p is the parabola that it says, wherever p is looked at."""
    args = *(torch.tensor([v], dtype=torch.float64) for v in case[:4]), case[4]
    mean, precision, log_peak = product(*args)
    away = torch.linspace(-5, 5, 11, dtype=torch.float64) / precision.sqrt()
    x = args[0] + args[1] * (mean + away)
    torch.testing.assert_close(guided_log_density(x, *args), log_peak - 0.5 * precision * away.square())


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_closed_form_is_as_one_would_write_it(spread):
    """Mean and precision by the paper's formula, and every reason for the conditional's draw, in float64."""
    w, eps = torch.tensor([[0.4], [2.0], [-0.5]]), torch.randn(3, N)
    loc_c, loc_u, *logs = spread * torch.randn(4, 3, N)
    args = (loc_c, logs[0].exp(), loc_u, logs[1].exp())
    c, s, u, t = (a.double() for a in args)
    precision = (1 + w) / s**2 - w / t**2
    mean, width = ((1 + w) * c / s**2 - w * u / t**2) / precision, 2 * torch.maximum(s, t)
    log_p = guided_log_density(mean, c, s, u, t, w.double())
    log_fac = log_p + width.log() + 0.5 * math.log(2 * math.pi)
    reached = (precision > 0) & (precision**-0.5 <= width) & ((mean - c).abs() <= FARTHEST * width)
    reached &= torch.maximum(log_p, log_fac) <= LOG_FLOAT32_MAX
    expected = torch.where(reached, mean + precision.rsqrt() * eps, c + s * eps)
    error = (guided_closed_form(*args, w, eps) - expected).abs()
    assert 0.1 < reached.double().mean() < 0.9
    assert (error <= 1e-4 * (expected.abs() + s) + 1e-5).double().mean() > 0.999  # some lie on the edge of `reached`


@pytest.mark.parametrize("case", ORDINARY)
def test_closed_form_and_rejection_agree(case):
    """A two-sample test, and one against the law without guidance, which it tells apart."""
    closed = guided_closed_form(*scalars(case, N), torch.randn(N))
    result = rejected(case, 128)
    assert (result.first_accepted >= 0).all()
    assert distance(closed, result.sample) < KOLMOGOROV
    assert distance(closed, case[0] + case[1] * torch.randn(N)) > 2 * KOLMOGOROV


@pytest.mark.parametrize("case", UNREACHED)
def test_closed_form_falls_back_to_the_conditional(case):
    eps = torch.randn(N)
    torch.testing.assert_close(guided_closed_form(*scalars(case, N), eps), case[0] + case[1] * eps)


@pytest.mark.parametrize("case", [UNREACHED[0], UNREACHED[3]])
def test_rejection_falls_back_where_it_accepts_nothing(case):
    """Where p has no integral a proposal or two may pass, where it overflows none does."""
    result = rejected(case)
    none = result.first_accepted < 0
    assert none.float().mean() > 0.95
    assert torch.equal(none, result.num_accepted == 0)
    assert distance(result.sample, case[0] + case[1] * torch.randn(N)) < KOLMOGOROV + 0.05


@pytest.mark.parametrize("case", ORDINARY + UNREACHED)
def test_without_guidance_both_draw_the_conditional(case):
    args, eps = (*scalars(case, N)[:4], 0.0), torch.randn(N)
    torch.testing.assert_close(guided_closed_form(*args, eps), case[0] + case[1] * eps)
    assert distance(rejected((*case[:4], 0.0), 128).sample, case[0] + case[1] * eps) < KOLMOGOROV


def test_rejection_is_the_loop_over_proposals():
    """The rule as one would write it for one channel, in float64 exponentials."""
    shape, w, n = (2, 3), torch.tensor([[0.3], [1.5]]), 2 * BLOCK + 5
    loc_c, loc_u = torch.randn(shape), torch.randn(shape)
    scale_c, scale_u = 0.3 + torch.rand(shape), 0.5 + torch.rand(shape)
    eps, u, fallback = torch.randn(n, *shape), torch.rand(n, *shape), torch.randn(shape)
    result = guided_rejection(loc_c, scale_c, loc_u, scale_u, w, eps, u, fallback)

    def density(x: Tensor, i: tuple[int, int]) -> Tensor:
        args = (t[i].double() for t in (loc_c, scale_c, loc_u, scale_u))
        return guided_log_density(x, *args, w[i[0], 0].double()).exp()

    for i in [(row, column) for row in range(2) for column in range(3)]:
        width = 2 * max(scale_c[i], scale_u[i]).double()
        proposals = torch.distributions.Normal(loc_c[i].double(), width)
        grid = loc_c[i] + torch.linspace(-10, 10, 1001, dtype=torch.float64)
        fac = density(grid, i).max() / proposals.log_prob(loc_c[i].double()).exp()
        x = loc_c[i] + width * eps[:, *i].double()
        accepted = (u[:, *i] * fac * proposals.log_prob(x).exp() < density(x, i)).nonzero()[:, 0]
        expected = x[accepted[0]] if len(accepted) else loc_c[i] + scale_c[i] * fallback[i]
        assert result.first_accepted[i] == (accepted[0] if len(accepted) else -1)
        assert result.num_accepted[i] == len(accepted)
        torch.testing.assert_close(result.sample[i], expected.float())
        torch.testing.assert_close(result.log_fac[i], fac.log().float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.scale_prop[i], width.float())


@pytest.mark.parametrize("size", [1, 7, BLOCK])
def test_blocks_of_any_size_give_the_same(size):
    args, fallback = scalars((0.0, 1.0, 3.0, 1.0, 0.9), 50), torch.randn(50)
    eps, u = torch.randn(2 * BLOCK + 3, 50), torch.rand(2 * BLOCK + 3, 50)
    blocks = zip(eps.split(size), u.split(size), strict=True)
    whole, parts = (guided_rejection(*args, eps, u, fallback), guided_rejection_blocks(*args, blocks, fallback))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert whole.first_accepted.max() > 7


def test_log_domain_survives_small_and_distant_scales():
    """Scales at the clamp and means apart by many of them: a number comes out, next to the conditional mean."""
    args = (torch.zeros(3), torch.tensor([1e-6, 1e-6, 1e-3]), torch.tensor([0.0, 1.0, 5.0]), torch.full((3,), 1e-6))
    for sample in (
        guided_closed_form(*args, 3.0, torch.ones(3)),
        guided_rejection(*args, 3.0, torch.randn(100, 3), torch.rand(100, 3), torch.ones(3)).sample,
    ):
        assert sample.isfinite().all() and (sample.abs() <= 5 * args[1]).all()

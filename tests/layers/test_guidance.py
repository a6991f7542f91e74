"""Classifier-free guidance."""

import pytest
import torch

from layers.guidance import cfg, for_branches, interval_scale, power_cosine_scale
from layers.samplers.ode import uniform_times


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.9])
def test_guidance_is_linear_in_the_scale_and_off_at_one(scale):
    cond, uncond = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0])
    torch.testing.assert_close(cfg(cond, uncond, scale), torch.tensor([1.0 + scale, 1.0 - 2 * scale]))


@pytest.mark.parametrize(
    ("t", "interval", "inside"),
    [
        (0.0, (0.0, 1.0), True),  # a lower end of 0 includes it
        (0.0, (0.1, 1.0), False),
        (0.1, (0.1, 1.0), False),  # equal in float32, although float32(0.1) > 0.1 in float64
        (0.1001, (0.1, 1.0), True),
        (0.7, (0.1, 0.7), False),  # equal in float32, although float32(0.7) < 0.7 in float64
        (0.6999, (0.1, 0.7), True),
        (1.0, (0.1, 1.0), False),
        (0.5, (0.5, 0.5), False),
    ],
)
def test_interval_is_open_at_both_ends_in_float32(t, interval, inside):
    assert interval_scale(torch.tensor(t), 3.0, interval) == (3.0 if inside else 1.0)


def test_heun_grid_of_fifty_has_six_unguided_points_below_a_tenth():
    scales = [interval_scale(t, 3.0, (0.1, 1.0)) for t in uniform_times(50)[:-1]]
    assert scales == [1.0] * 6 + [3.0] * 44


@pytest.mark.parametrize(
    ("power", "scales"),
    [(0.0, [5.0] * 4), (1.0, [1.0, 1.5858, 3.0, 4.4142]), (2.0, [1.0, 1.0384, 1.5858, 3.3902])],
)
def test_power_cosine_rises_from_one_and_is_constant_at_power_zero(power, scales):
    assert [power_cosine_scale(5.0, step, 4, power) for step in range(4)] == pytest.approx(scales, abs=1e-4)


def test_branches_are_one_batch_conditional_rows_first():
    x, rows = torch.randn(2, 3), torch.zeros(4)
    assert torch.equal(for_branches(x, rows), torch.cat([x, x])) and for_branches(x, rows[:2]) is x

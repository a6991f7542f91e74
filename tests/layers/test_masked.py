"""Orders and counts of masked generation. The golden tables are in tests/methods/test_mar.py."""

import pytest
import torch

from layers.samplers.masked import annealed_steps, linear_cfg_scale, mask_lengths, mask_rate, reveal


@pytest.mark.parametrize("length", [1, 2, 7, 64])
def test_every_token_is_revealed_once_in_the_order_stated(length):
    orders = torch.stack([torch.randperm(length) for _ in range(3)])
    for num_iter in {1, 2, length // 2, length} & set(range(1, length + 1)):
        steps = list(reveal(orders, length, mask_lengths(length, num_iter)))
        assert len(steps) == num_iter and all(new.shape[1] >= 1 for _, new in steps)
        assert torch.equal(torch.cat([new for _, new in steps], 1).sort(1).values, orders.sort(1).values)
        for known, new in steps:
            assert torch.equal(known, orders[:, length - known.shape[1] :])
            assert torch.equal(new, new.sort(1).values)


@pytest.mark.parametrize("num_iter", [0, -1, 17])
def test_impossible_iterations_name_value_and_range(num_iter):
    with pytest.raises(ValueError, match=rf"num_iter is {num_iter}, but 16 tokens.*1\.\.16"):
        mask_lengths(16, num_iter)


def test_mask_rate_follows_the_truncated_normal():
    """Mean, deviation and quantiles that spec/mar.md section 4 gives for [0.7, 1]."""
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    rates = torch.tensor([mask_rate(float(v), 0.7) for v in u], dtype=torch.float64)
    assert rates.mean().item() == pytest.approx(0.8670, abs=2e-4)
    assert rates.std().item() == pytest.approx(0.0835, abs=2e-4)
    quantiles = rates.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64))
    assert quantiles.tolist() == pytest.approx([0.723, 0.874, 0.988], abs=1e-3)
    assert rates.min() >= 0.7 and rates.max() <= 1


@pytest.mark.parametrize("minimum", [0.0, 0.5, 1.0])
def test_mask_rate_stays_in_range_at_the_ends(minimum):
    assert all(minimum <= mask_rate(u, minimum) <= 1 for u in (0.0, 0.5, 1 - 1e-16))


def test_linear_guidance_reaches_the_scale_when_nothing_is_unknown():
    assert (
        linear_cfg_scale(4.0, 16, 16) == 1 and linear_cfg_scale(4.0, 0, 16) == 4 and linear_cfg_scale(3.0, 8, 16) == 2
    )


def test_annealed_steps_fall_from_first_to_last():
    assert annealed_steps(50, 5, 10) == [50, 45, 40, 35, 30, 25, 20, 15, 10, 5]
    assert annealed_steps(100, None, 4) == annealed_steps(100, 100, 4) == [100] * 4 and annealed_steps(50, 5, 1) == [50]

"""Flax's default initialisation."""

import pytest
import torch

from layers.init import lecun_normal_


@pytest.mark.parametrize("shape", [(64, 400), (40, 32, 3, 3)])
def test_variance_is_one_over_fan_in_and_tails_are_cut(shape):
    weight = lecun_normal_(torch.empty(shape))
    fan_in = weight[0].numel()
    assert weight.var() * fan_in == pytest.approx(1, rel=0.05)
    assert weight.abs().max() * fan_in**0.5 <= 2 / 0.8796
    assert weight.mean().abs() < 0.1 / fan_in**0.5

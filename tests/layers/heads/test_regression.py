"""Regression head: squared error, and the same answer whatever the noise."""

import pytest
import torch

from layers.heads.regression import RegressionHead

R, D, E = 5, 3, 6


def test_loss_and_sample_are_those_of_a_linear_map():
    head, x, z, uncond = RegressionHead(D, E), torch.randn(R, D), torch.randn(R, E), torch.randn(R, E)
    answer, other = (rows @ head.linear.weight.T + head.linear.bias for rows in (z, uncond))
    loss = head.loss(x, z, torch.empty(0), torch.empty(0))["loss"]
    torch.testing.assert_close(loss, (answer - x).square().mean(1)[None])
    noise = torch.empty(0, R, D)
    torch.testing.assert_close(head.sample(z, noise), answer)
    torch.testing.assert_close(head.sample(z, noise, uncond=uncond, cfg_scale=2.0), other + 2 * (answer - other))


def test_temperature_has_nothing_to_scale():
    with pytest.raises(ValueError, match=r"temperature is 0\.9"):
        RegressionHead(D, E).sample(torch.randn(R, E), torch.empty(0, R, D), temperature=0.9)

"""Bits per dimension: known densities give known numbers."""

import math

import pytest
import torch

from layers.likelihood import bits_per_dim

DIMS = 3 * 4 * 4


def test_even_mass_over_256_levels_is_8_bits():
    log_prob = torch.full((2,), -DIMS * math.log(256))
    assert bits_per_dim(log_prob, 0.0, DIMS).tolist() == pytest.approx([8, 8], rel=1e-7)


def test_the_scale_of_pixels_enters_through_logdet_once():
    """A uniform density on [-1, 1] (height 1/2), with the factor 2/256 of the map from 256 levels in logdet: 8 bits."""
    log_prob, logdet = torch.full((3,), DIMS * math.log(0.5)), torch.full((3,), DIMS * math.log(2 / 256))
    assert bits_per_dim(log_prob, logdet, DIMS).tolist() == pytest.approx([8] * 3, rel=1e-6)
    with_factor = bits_per_dim(torch.zeros(1), torch.full((1,), -DIMS * math.log(127.5)), DIMS)
    assert float(with_factor) == pytest.approx(6.994353, rel=1e-6)


def test_one_figure_per_image():
    assert bits_per_dim(torch.tensor([-1.0, -2.0]), torch.zeros(2), 1).tolist() == pytest.approx(
        [1 / math.log(2), 2 / math.log(2)]
    )

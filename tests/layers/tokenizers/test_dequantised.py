"""Dequantised pixels: levels come back, noise is uniform, and the density of a uniform image is eight bits a value."""

import math

import pytest
import torch

from layers.likelihood import bits_per_dim
from layers.tokenizers.base import to_uint8
from layers.tokenizers.dequantised import LEVEL, DequantisedTokenizer


def levels(batch: int, size: int) -> torch.Tensor:
    ramp = torch.arange(batch * 3 * size * size) * 7 % 256
    return ramp.reshape(batch, 3, size, size).to(torch.uint8)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_every_level_comes_back(patch_size: int) -> None:
    images = levels(4, 16)
    assert set(range(256)) == set(images.flatten().tolist())
    tokenizer = DequantisedTokenizer(16, patch_size)
    for seed in range(5):
        tokens = tokenizer({"image": images}, torch.Generator().manual_seed(seed))
        assert tokens.x.shape == (4, (16 // patch_size) ** 2, 3 * patch_size**2)
        assert torch.equal(to_uint8(tokenizer.decode(tokens.x)), images)


def test_ends_of_the_noise_bring_the_level_back() -> None:
    images, tokenizer = levels(4, 16), DequantisedTokenizer(16, 2)
    for end in (-20.0, 20.0):
        tokens = tokenizer({"image": images}, lambda shape, end=end: torch.full(tuple(shape), end))
        assert torch.equal(to_uint8(tokenizer.decode(tokens.x)), images)


def test_grey_is_one_channel_and_comes_back_as_three() -> None:
    grey = levels(2, 8)[:, :1].expand(-1, 3, -1, -1)
    tokenizer = DequantisedTokenizer(8, 2, channels=1)
    tokens = tokenizer({"image": grey}, torch.Generator().manual_seed(0))
    assert tokens.x.shape == (2, 16, 4)
    assert torch.equal(to_uint8(tokenizer.decode(tokens.x)), grey)


def test_noise_fills_the_interval_evenly() -> None:
    tokenizer = DequantisedTokenizer(32, 1)
    images = torch.full((8, 3, 32, 32), 100, dtype=torch.uint8)
    x = tokenizer({"image": images}, torch.Generator().manual_seed(0)).x
    u = (x + 1) / LEVEL - 100
    assert 0 < u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.003


@pytest.mark.parametrize("channels", [1, 3])
def test_an_even_density_costs_eight_bits_a_value(channels: int) -> None:
    tokenizer = DequantisedTokenizer(8, 2, channels=channels)
    tokens = tokenizer({"image": levels(2, 8)}, torch.Generator().manual_seed(0))
    dims = tokens.x[0].numel()
    log_prob = torch.full((2,), -dims * math.log(256 * LEVEL))  # spread over the whole range
    assert torch.allclose(bits_per_dim(log_prob, tokens.logdet, dims), torch.tensor(8.0, dtype=torch.float64))


def test_other_channel_counts_are_an_error() -> None:
    with pytest.raises(ValueError, match="channels is 4"):
        DequantisedTokenizer(8, 2, channels=4)

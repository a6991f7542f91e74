"""Dequantised pixels: levels come back, noise is uniform, and the density of a uniform image is eight bits a value."""

import math

import pytest
import torch

from layers.likelihood import bits_per_dim
from layers.tokenizers.base import to_uint8
from layers.tokenizers.dequantised import DequantisedTokenizer


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
    u = (x + 1) * 127.5 - 100
    assert u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.003


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("levels_of", [2, 17, 256])
def test_an_even_density_costs_the_bits_of_a_level(channels: int, levels_of: int) -> None:
    tokenizer = DequantisedTokenizer(8, 2, channels=channels, levels=levels_of)
    tokens = tokenizer({"image": levels(2, 8)}, torch.Generator().manual_seed(0))
    dims = tokens.x[0].numel()
    log_prob = torch.full((2,), -dims * math.log(levels_of * tokenizer.step))  # spread over the whole range
    expected = torch.tensor(math.log2(levels_of), dtype=torch.float64)
    torch.testing.assert_close(bits_per_dim(log_prob, tokens.logdet, dims), expected.expand(2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("levels_of", [2, 17])
def test_few_levels_come_back_and_others_are_rounded(levels_of: int) -> None:
    tokenizer = DequantisedTokenizer(16, 2, levels=levels_of)
    kept = ((levels(4, 16) % levels_of) * (255 / (levels_of - 1))).round().to(torch.uint8)
    for images, expected in (
        (kept, kept),
        (torch.full_like(kept, 130), torch.full_like(kept, 128 if levels_of == 17 else 255)),
    ):
        tokens = tokenizer({"image": images}, torch.Generator().manual_seed(0))
        assert torch.equal(to_uint8(tokenizer.decode(tokens.x)), expected)


def test_other_channel_counts_are_an_error() -> None:
    with pytest.raises(ValueError, match="channels is 4"):
        DequantisedTokenizer(8, 2, channels=4)


@pytest.mark.parametrize("levels_of", [1, 257])
def test_impossible_numbers_of_levels_are_an_error(levels_of: int) -> None:
    with pytest.raises(ValueError, match=f"levels is {levels_of}"):
        DequantisedTokenizer(8, 2, levels=levels_of)

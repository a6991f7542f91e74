"""Tokenizers: the two ends of the line, where images become tokens and tokens become images.

Three stages after EDM2: `encode_image` (uint8 -> raw; costly, deterministic, cacheable), `encode_raw` (raw -> tokens;
cheap, stochastic) and `decode` (tokens -> images in [-1, 1]).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layers.random import Generators

KEYS = "--model.init_args.tokenizer.init_args"  # as recipes and command lines name a tokenizer's arguments


class Tokens(NamedTuple):
    """x (B, L, D) continuous or (B, L) ids; logdet (B,) in nats per image for the whole map from integer pixels, or
    None where the map has no density."""

    x: Tensor
    logdet: Tensor | None = None


def from_uint8(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]: x / 255 * 2 - 1."""
    return images.float().div(255).mul(2).sub(1)


def to_uint8(images: Tensor) -> Tensor:
    """float in [-1, 1] -> uint8: (x + 1) / 2 * 255, clipped, then rounded half to even. NaN raises ValueError."""
    scaled = images.float().add(1).div(2).mul(255)
    if scaled.isnan().any():
        raise ValueError("images hold NaN: the weights or the sampler settings are broken (look at the training loss)")
    return scaled.clamp(0, 255).round().to(torch.uint8)


class Tokenizer(nn.Module):
    """Contract of every tokenizer. `grid` (h, w), `seq_len` = h*w, `token_dim`, `vocab_size` or None, `frozen`."""

    grid: tuple[int, int]
    token_dim: int
    image_size: int
    vocab_size: int | None = None
    frozen: bool = False

    @property
    def seq_len(self) -> int:
        """Tokens per image."""
        return self.grid[0] * self.grid[1]

    def init_args(self) -> dict[str, Any]:
        """Constructor arguments as plain values, so that a checkpoint can rebuild the tokenizer."""
        raise NotImplementedError

    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> raw, whatever this tokenizer caches."""
        raise NotImplementedError

    def encode_raw(self, raw: Tensor, generator: Generators = None) -> Tokens:
        """raw -> Tokens."""
        raise NotImplementedError

    def decode(self, x: Tensor) -> Tensor:
        """Tokens' x -> float images (B, 3, H, W) in [-1, 1]."""
        raise NotImplementedError

    def check_size(self, images: Tensor) -> None:
        """Raise ValueError for images (..., H, W) of another size than the tokenizer's."""
        if tuple(images.shape[-2:]) != (self.image_size, self.image_size):
            raise ValueError(
                f"images are {images.shape[-2]}x{images.shape[-1]}, the tokenizer expects {self.image_size}: give "
                f"--data.init_args.image_size and {KEYS}.image_size the same value"
            )

    def forward(self, batch: dict[str, Tensor], generator: Generators = None) -> Tokens:
        """A batch with `raw` (cached) or `image` (uint8) -> Tokens."""
        raw = batch["raw"] if "raw" in batch else self.encode_image(batch["image"])
        return self.encode_raw(raw, generator)

"""Patches of dequantised pixels as tokens: what a density model of pixels is trained on.

A level v of 0..255 stands for the interval [v, v + 1), of which one point is drawn anew each time (Theis et al., arXiv
1511.01844, section 3.1; JetFormer, arXiv 2411.19722): without that noise a density over whole numbers has no upper
bound. In: uint8 images (B, 3, H, W). Out: tokens (B, L, p*p*C) in [-1, 1 + 1/127.5), and their logdet (B,).
"""

import math

import torch
from torch import Tensor

from layers.patch import patchify, unpatchify
from layers.random import Generators, randn
from layers.tokenizers.base import Tokens
from layers.tokenizers.pixels import PixelTokenizer

LEVEL = 1 / 127.5  # distance of two levels in [-1, 1]
EDGE = 1e-4  # the point stays that far inside its interval, so that float32 brings its level back


class DequantisedTokenizer(PixelTokenizer):
    """As PixelTokenizer, with uniform noise and a density. channels: 3, or 1 for grey images (the mean of the three).

    Raises ValueError for other numbers of channels.
    """

    def __init__(self, image_size: int, patch_size: int, *, channels: int = 3) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels is {channels}: a dequantised image has 3 (colour) or 1 (grey)")
        super().__init__(image_size, patch_size, channels=channels)

    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> uint8 (B, C, H, W)."""
        images = super().encode_image(images)
        if self.channels == 3:
            return images
        return images.float().mean(1, keepdim=True).round().to(torch.uint8)

    def encode_raw(self, raw: Tensor, generator: Generators = None) -> Tokens:
        """Levels + uniform noise, scaled; logdet in nats: every value is divided by 127.5."""
        uniform = torch.special.ndtr(randn(raw.shape, generator, device=raw.device)).clamp(EDGE, 1 - EDGE)
        x = (raw.float() + uniform) * LEVEL - 1
        logdet = torch.full((len(raw),), math.log(LEVEL) * raw[0].numel(), device=raw.device)
        return Tokens(patchify(x, self.patch_size), logdet)

    def decode(self, x: Tensor) -> Tensor:
        """Tokens -> images (B, 3, H, W), half a level lower: `to_uint8` rounds, which then finds the interval's level."""
        images = unpatchify(x, self.patch_size, self.grid) - LEVEL / 2
        return images.expand(-1, 3, -1, -1)

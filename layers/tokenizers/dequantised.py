"""Patches of dequantised pixels as tokens: what a density model of pixels is trained on.

Level l stands for the interval [l, l + 1), of which one point is drawn anew each time (Theis et al., arXiv 1511.01844,
section 3.1; JetFormer, arXiv 2411.19722): without that noise a density over whole numbers has no upper bound.
In: uint8 images (B, 3, H, W). Out: tokens (B, L, p*p*C), from -1 to one level above 1, and their logdet (B,).
"""

import math
from typing import Any

import torch
from torch import Tensor

from layers.patch import patchify, unpatchify
from layers.random import Generators, randn
from layers.tokenizers.base import Tokens
from layers.tokenizers.pixels import PixelTokenizer

EDGE = 1e-4  # the point stays that far inside its interval, so that float32 brings its level back


class DequantisedTokenizer(PixelTokenizer):
    """As PixelTokenizer, with uniform noise and a density. channels: 3, or 1 for grey images (the mean of the three).

    levels: how many, evenly spaced from black to white; images are rounded to them, and decoded images have no others.
    Pictures with few levels, such as scikit-learn's digits with 17, want that number: among 256 a model learns first of
    all which of them never occur. Raises ValueError for other numbers of channels, or levels outside 2..256.
    """

    def __init__(self, image_size: int, patch_size: int, *, channels: int = 3, levels: int = 256) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels is {channels}: a dequantised image has 3 (colour) or 1 (grey)")
        if not 2 <= levels <= 256:
            raise ValueError(f"levels is {levels}: an image has 2 to 256 of them")
        super().__init__(image_size, patch_size, channels=channels)
        self.levels = levels
        self.step = 2 / (levels - 1)  # distance of two levels in [-1, 1]

    def init_args(self) -> dict[str, Any]:
        return super().init_args() | {"levels": self.levels}

    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> levels 0..levels-1, uint8 (B, C, H, W)."""
        values = super().encode_image(images).float()
        values = values if self.channels == 3 else values.mean(1, keepdim=True)
        return (values * ((self.levels - 1) / 255)).round().to(torch.uint8)

    def encode_raw(self, raw: Tensor, generator: Generators = None) -> Tokens:
        """Levels + uniform noise, scaled; logdet in nats: every value is multiplied by `step`."""
        uniform = torch.special.ndtr(randn(raw.shape, generator, device=raw.device)).clamp(EDGE, 1 - EDGE)
        x = (raw.float() + uniform) * self.step - 1
        logdet = torch.full((len(raw),), math.log(self.step) * raw[0].numel(), device=raw.device)
        return Tokens(patchify(x, self.patch_size), logdet)

    def decode(self, x: Tensor) -> Tensor:
        """Tokens -> images (B, 3, H, W): the level in whose interval a value lies, in [-1, 1]."""
        levels = ((unpatchify(x, self.patch_size, self.grid) + 1) / self.step).floor().clamp(0, self.levels - 1)
        return (levels * self.step - 1).expand(-1, 3, -1, -1)

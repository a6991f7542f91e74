"""Grey levels as ids: a discrete tokenizer without weights, for small pictures of few levels.

A token is the mean of a patch, rounded to one of `levels` from black to white; decoded, the patch has that level
everywhere. Lossless where a patch is one stored pixel, as with scikit-learn's digits, which have 17 levels and are
enlarged by whole factors. In: uint8 images (B, 3, H, W), seen grey. Out: ids (B, L) in raster order.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.random import Generators
from layers.tokenizers.base import Tokens
from layers.tokenizers.pixels import PixelTokenizer


class LevelsTokenizer(PixelTokenizer):
    """`levels` ids, 2 to 256; token_dim is 1, one id. raw is uint8 (B, L). Sizes as in PixelTokenizer."""

    def __init__(self, image_size: int, patch_size: int, *, levels: int) -> None:
        if not 2 <= levels <= 256:
            raise ValueError(f"levels is {levels}: an image has 2 to 256 of them")
        super().__init__(image_size, patch_size, channels=1)
        self.vocab_size, self.token_dim = levels, 1

    def init_args(self) -> dict[str, Any]:
        return {"image_size": self.image_size, "patch_size": self.patch_size, "levels": self.vocab_size}

    def encode_image(self, images: Tensor) -> Tensor:
        grey = super().encode_image(images).float().mean(1, keepdim=True)
        means = F.avg_pool2d(grey, self.patch_size).flatten(1)  # (B, L) in 0..255
        return (means * ((self.vocab_size - 1) / 255)).round().to(torch.uint8)

    def encode_raw(self, raw: Tensor, generator: Generators = None) -> Tokens:
        return Tokens(raw.long())

    def decode(self, x: Tensor) -> Tensor:
        """ids (B, L) -> images (B, 3, H, W). Raises ValueError for an id that is no level."""
        if not x.is_meta:
            low, high = (int(value) for value in x.aminmax())
            if low < 0 or high >= self.vocab_size:
                raise ValueError(f"ids lie in {low}..{high}, the levels are 0..{self.vocab_size - 1}")
        grey = (x.float() * (2 / (self.vocab_size - 1)) - 1).view(-1, 1, *self.grid)
        return grey.repeat_interleave(self.patch_size, 2).repeat_interleave(self.patch_size, 3).expand(-1, 3, -1, -1)

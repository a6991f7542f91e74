"""Patches of pixels as tokens: no learned part, no loss of information."""

from typing import Any

from torch import Tensor

from layers.patch import patchify, unpatchify
from layers.random import Generators
from layers.tokenizers.base import KEYS, Tokenizer, Tokens, from_uint8


class PixelTokenizer(Tokenizer):
    """Square images of `image_size` cut into patches of `patch_size`; token dim p*p*channels, values in [-1, 1].

    Raises ValueError if `image_size` is no multiple of `patch_size`, or an image has another size.
    """

    def __init__(self, image_size: int, patch_size: int, *, channels: int = 3) -> None:
        super().__init__()
        if image_size < 1 or patch_size < 1 or image_size % patch_size:
            raise ValueError(
                f"image_size {image_size} is not divisible by patch_size {patch_size}: "
                f"set {KEYS}.image_size or patch_size"
            )
        self.image_size, self.patch_size, self.channels = image_size, patch_size, channels
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.token_dim = patch_size**2 * channels

    def init_args(self) -> dict[str, Any]:
        return {"image_size": self.image_size, "patch_size": self.patch_size, "channels": self.channels}

    def encode_image(self, images: Tensor) -> Tensor:
        self.check_size(images)
        return images

    def encode_raw(self, raw: Tensor, generator: Generators = None) -> Tokens:
        return Tokens(patchify(from_uint8(raw), self.patch_size))  # (B, L, D)

    def decode(self, x: Tensor) -> Tensor:
        return unpatchify(x, self.patch_size, self.grid)  # (B, C, H, W)

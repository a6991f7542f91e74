"""Vectors that are tokens already: sequences of numbers instead of images, as of a known process or of features.

In: raw (B, L, D), given by the data. Out: the same, as tokens; decoded, a grid of dots coloured by the first numbers.
"""

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from layers.random import Generators
from layers.tokenizers.base import KEYS, Tokenizer, Tokens


class VectorTokenizer(Tokenizer):
    """`image_size`^2 vectors of `token_dim` numbers in raster order. logdet is 0: the density is of the vectors."""

    def __init__(self, image_size: int, token_dim: int) -> None:
        super().__init__()
        for name, value in (("image_size", image_size), ("token_dim", token_dim)):
            if value < 1:
                raise ValueError(f"{name} is {value}: use 1 or more")
        self.image_size, self.token_dim, self.grid = image_size, token_dim, (image_size, image_size)

    def init_args(self) -> dict[str, Any]:
        return {"image_size": self.image_size, "token_dim": self.token_dim}

    def encode_image(self, images: Tensor) -> NoReturn:
        """Raises ValueError: there is nothing to make vectors of images with."""
        raise ValueError(
            "VectorTokenizer reads rows of vectors (raw), not images: use data of vectors, such as "
            "datamodules.synthetic.MixtureData, or another tokenizer"
        )

    def encode_raw(self, raw: Tensor, generator: Generators = None) -> Tokens:
        """Raises ValueError for vectors of another shape."""
        if tuple(raw.shape[1:]) != (self.seq_len, self.token_dim):
            raise ValueError(
                f"rows are {tuple(raw.shape[1:])}, the tokenizer expects {(self.seq_len, self.token_dim)}: give "
                f"--data.init_args and {KEYS} the same image_size and token_dim"
            )
        return Tokens(raw.float(), torch.zeros(len(raw), device=raw.device))

    def decode(self, x: Tensor) -> Tensor:
        """Dots: red, green and blue are the first three numbers, halved."""
        colours = F.pad(x[..., :3], (0, max(0, 3 - self.token_dim))) / 2
        return rearrange(colours, "b (h w) c -> b c h w", h=self.image_size)

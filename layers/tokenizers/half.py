"""The same tokenizer for images of half the side: coarse tokens beside fine ones, with one set of weights.

For models of two resolutions (Matryoshka-DART, arXiv 2410.08159). In: a tokenizer of square images.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.tokenizers.base import Tokenizer


def half_size(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer of images of half the side and half the grid, that shares the weights of this one.

    Raises ValueError where the grid has an odd side.
    """
    if any(side % 2 for side in tokenizer.grid):
        raise ValueError(
            f"tokens are {tokenizer.grid[0]}x{tokenizer.grid[1]}, which has no half: choose image_size and patch_size "
            f"so that their number a side is even"
        )
    coarse = copy.copy(tokenizer)
    coarse.image_size = tokenizer.image_size // 2
    coarse.grid = (tokenizer.grid[0] // 2, tokenizer.grid[1] // 2)
    if hasattr(tokenizer, "latent_size"):
        coarse.latent_size = tokenizer.latent_size // 2
    return coarse


def halved(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> uint8 (B, 3, H/2, W/2), means of four pixels."""
    return F.avg_pool2d(images.float(), 2).round().to(torch.uint8)

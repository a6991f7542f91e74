"""The only two places where pixels and tokens change layout.

Images are (B, C, H, W); tokens are (B, L, D) in raster order with D = p*p*C, and inside a token the order is
(row, column, channel), channel fastest, for every method. An official file that orders a patch otherwise is permuted
once, in the checkpoint rules of its method.
"""

import torch
from einops import rearrange
from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, L, p*p*C). Raises ValueError if a side is no multiple of `patch_size`."""
    height, width = images.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"image of {height}x{width} pixels cannot be cut into patches of {patch_size}")
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(tokens: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """(B, h*w, p*p*C) -> (B, C, h*p, w*p): the inverse of `patchify` for a token grid of (h, w)."""
    h, w = grid
    return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=patch_size, q=patch_size)


def channel_major_to_ours(patch_size: int, channels: int) -> Tensor:
    """Index (p*p*C,) with ours = official[..., index], for official tokens ordered (channel, row, column)."""
    index = torch.arange(channels * patch_size**2)
    return rearrange(index, "(c p q) -> (p q c)", p=patch_size, q=patch_size)


def ours_to_channel_major(patch_size: int, channels: int) -> Tensor:
    """The inverse: official = ours[..., index]."""
    index = torch.arange(channels * patch_size**2)
    return rearrange(index, "(p q c) -> (c p q)", p=patch_size, q=patch_size)

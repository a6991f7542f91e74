"""Rotary positions (Su et al. 2021) in the two-dimensional axial form of EVA and JiT.

The first half of a head's dims turns with the row, the second half with the column; the rotation acts on adjacent
pairs (2m, 2m+1). Tokens that have no place in the grid (prefixes) get the identity. Angles are float32.
"""

import torch
from torch import Tensor


def axial_rope(head_dim: int, grid: tuple[int, int], *, num_prefix: int = 0, theta: float = 10000.0) -> Tensor:
    """cos and sin tables for a raster grid of (h, w) behind `num_prefix` unrotated tokens.

    Returns (2, num_prefix + h*w, head_dim): [0] cos, [1] sin, each frequency repeated for its pair.
    Raises ValueError if `head_dim` is no multiple of 4 (two axes, pairs on each).
    """
    if head_dim % 4:
        raise ValueError(f"2-D rotary positions need a head dim divisible by 4, not {head_dim}")
    axis_dim = head_dim // 2
    freqs = theta ** -(torch.arange(0, axis_dim, 2, dtype=torch.float32) / axis_dim)  # (axis_dim/2,)
    rows, cols = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = torch.cat([rows.reshape(-1, 1) * freqs, cols.reshape(-1, 1) * freqs], dim=1)  # (h*w, head_dim/2)
    angles = torch.cat([angles.new_zeros(num_prefix, head_dim // 2), angles])  # (num_prefix + h*w, head_dim/2)
    return torch.stack([angles.cos(), angles.sin()]).repeat_interleave(2, dim=-1)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate adjacent pairs: (u, v) -> (u cos - v sin, v cos + u sin). x (B, N, L, d), rope (2, L, d) -> (B, N, L, d).

    float32 island: computed in the table's dtype, returned in x's.
    """
    cos, sin = rope
    u, v = x.to(rope.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-v, u], dim=-1).flatten(-2)
    return torch.addcmul(x * cos, turned, sin).to(x.dtype)

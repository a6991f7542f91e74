"""Rotary positions (Su et al. 2021), in two forms. Angles are float32.

`axial_rope` with `apply_rope` is that of EVA and JiT, on a grid: the first half of a head's dims turns with the row,
the second half with the column, in adjacent pairs (2m, 2m+1); tokens that have no place in the grid (prefixes) get the
identity. `rotary_table` with `rotate_halves` is Gemma's, on a sequence: dim m turns with dim m + d/2.
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


def rotary_table(positions: Tensor, head_dim: int, *, theta: float = 10000.0) -> Tensor:
    """cos and sin of position * theta^(-2m/d) for tokens at `positions` (B, L), which may repeat or be negative.

    Returns (2, B, 1, L, head_dim/2): [0] cos, [1] sin, the same for all heads. Raises ValueError if `head_dim` is odd.
    """
    if head_dim % 2:
        raise ValueError(f"rotary positions turn pairs, so they need an even head dim, not {head_dim}")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[:, None, :, None] / theta**exponents  # (B, 1, L, head_dim/2)
    return torch.stack([angles.cos(), angles.sin()])


def rotate_halves(x: Tensor, table: Tensor) -> Tensor:
    """Rotate pairs (m, m + d/2): (u, v) -> (u cos - v sin, v cos + u sin). x (B, N, L, d) -> (B, N, L, d).

    float32 island: computed in the table's dtype, returned in x's.
    """
    cos, sin = table
    u, v = x.to(table.dtype).chunk(2, dim=-1)
    return torch.cat([u * cos - v * sin, v * cos + u * sin], dim=-1).to(x.dtype)

"""Rotary positions on several axes, as DART has them for step, row and column (Gu et al., arXiv 2410.08159).

A head's channels are cut into contiguous slices, one per axis; each is rotated by halves, with frequencies of its own
width (rope.py). A product of query and key then depends on the difference of two coordinates on each axis, and a slice
on its axis alone. Unusual: all slices turn in one pass. Coordinates may be fractions. Angles are float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from layers.rope import rotary_table


def axes_table(coordinates: Tensor, widths: Sequence[int]) -> Tensor:
    """Factors of channels and of their partners, in slices of `widths` (A,), for tokens at `coordinates` (L, A).

    Returns (2, L, sum(widths)): [0] cos, [1] sin, the latter negative in the first half of each slice. Raises
    ValueError for an odd width.
    """
    parts = []
    for axis, width in zip(coordinates.unbind(1), widths, strict=True):
        cos, sin = rotary_table(axis[None], width)[:, 0, 0]  # (L, width/2) each
        parts.append(torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)]))
    return torch.cat(parts, dim=-1)


def rotate_axes(x: Tensor, table: Tensor, widths: Sequence[int]) -> Tensor:
    """Rotate pairs (m, m + width/2) of each slice: x (B, N, L, d), table (2, L, d) -> (B, N, L, d).

    float32 island: computed in the table's dtype, returned in x's.
    """
    cos, sin = table
    wide = x.to(table.dtype)
    halves = wide.split([width // 2 for width in widths for _ in range(2)], dim=-1)
    partners = torch.cat([half for u, v in zip(halves[::2], halves[1::2], strict=True) for half in (v, u)], dim=-1)
    return torch.addcmul(wide * cos, partners, sin).to(x.dtype)

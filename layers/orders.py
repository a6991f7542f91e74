"""Orders in which the tokens of a grid are generated: named scans, and random orders that anneal to one.

RAR (Yu et al., arXiv 2411.00776, Table 3) compares six scans; our MAR takes them, too. What the names mean is VQGAN's
(Esser et al., arXiv 2012.09841; taming-transformers `permuter.py`), here for any grid: RAR's own code has raster only.
An order (L,) holds raster places: entry i says where the i-th token lies.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Scan = Literal["raster", "z_curve", "subsample", "spiral_in", "spiral_out", "alternate"]

Cell = tuple[int, int]  # (row, column)


def scan_order(name: Scan, grid: tuple[int, int]) -> list[int]:
    """Raster places of an (h, w) grid in the order of a scan. Raises ValueError for a name that is none of `Scan`.

    raster: rows from above, each from the left.  alternate: every second row from the right.  z_curve: quarters in
    raster order, and so inside each.  subsample: every second place of every second row, ever finer.  spiral_in: along
    the edge, from the last place upwards, to the middle.  spiral_out: the reverse.
    """
    if name not in get_args(Scan):
        raise ValueError(f"the scan order is '{name}': use {', '.join(get_args(Scan))}")
    height, width = grid
    cells = [(row, column) for row in range(height) for column in range(width)]
    if name.startswith("spiral"):
        inwards = spiral(height, width)
        return inwards if name == "spiral_in" else inwards[::-1]
    if name == "alternate":
        return [row * width + (width - 1 - column if row % 2 else column) for row, column in cells]
    bits = (max(grid) - 1).bit_length()
    keys = {"raster": lambda cell: cell, "z_curve": lambda cell: z_key(cell, bits)[::-1]}
    keys["subsample"] = lambda cell: z_key(cell, bits)
    return [row * width + column for row, column in sorted(cells, key=keys[name])]


def z_key(cell: Cell, bits: int) -> list[Cell]:
    """The bits of (row, column) in pairs, lowest first; sorted by them, highest first, cells lie on the z-curve."""
    row, column = cell
    return [(row >> bit & 1, column >> bit & 1) for bit in range(bits)]


def spiral(height: int, width: int) -> list[int]:
    """Raster places from the last column upwards, along the edge and then inwards."""
    left, order = [list(range(row * width, (row + 1) * width)) for row in range(height)], []
    while left and left[0]:
        order += [row.pop() for row in reversed(left)]
        left = [list(row) for row in zip(*reversed(left), strict=True)]  # turned: the first row is the last column
    return order


def random_ratio(step: int, *, start: int, end: int) -> float:
    """Share of randomly ordered items after `step` optimiser steps: 1 before `start`, 0 from `end` on, linear between.

    Official `train_utils.py`; it is asked anew at every step.
    """
    if step >= end:
        return 0.0
    return 1.0 if step < start else 1.0 - (step - start) / (end - start)


def annealed_orders(coins: Tensor, keys: Tensor, scan: Tensor, ratio: float) -> Tensor:
    """Orders (B, L): random where the coin (B,), uniform, falls below `ratio`, else `scan` (L,); keys (B, L) uniform.

    Official `sample_orders`, which draws item by item on the host.
    """
    return torch.where((coins < ratio)[:, None], keys.argsort(dim=1), scan)

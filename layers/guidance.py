"""Classifier-free guidance (Ho & Salimans 2022) and its schedules.

Convention everywhere: uncond + cfg_scale (cond - uncond), off at 1. A paper's w is cfg_scale - 1.
"""

import torch
from torch import Tensor


def cfg(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Guided prediction; all tensors of one shape."""
    return uncond + scale * (cond - uncond)


def interval_scale(t: Tensor, scale: float, interval: tuple[float, float]) -> float:
    """`scale` inside the guidance interval (Kynkaanniemi et al. 2024), else 1.

    Open at both ends, except that a lower end of 0 includes t = 0. `t` is one time on the host, float32: the ends are
    compared in its precision, as the official JiT does, so that a grid point that equals an end lies outside.
    """
    low, high = interval
    inside = bool(t < high) and (low == 0 or bool(t > low))
    return scale if inside else 1.0


def for_branches(x: Tensor, rows: Tensor) -> Tensor:
    """x (B, ...) for both guidance branches in one batch, conditional rows first: (2B, ...) where `rows` is as long."""
    return x if len(x) == len(rows) else torch.cat([x, x])

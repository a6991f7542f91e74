"""Classifier-free guidance (Ho & Salimans 2022) and its schedules.

Convention everywhere: uncond + cfg_scale (cond - uncond), off at 1. A paper's w is cfg_scale - 1.
"""

import math

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


def power_cosine_scale(cfg_scale: float, step: int, num_steps: int, power: float) -> float:
    """Guidance of step 0..num_steps-1 that grows along half a cosine of (step / num_steps)^power, from 1 to cfg_scale.

    MDT (Gao et al. 2023); RAR `modeling/rar.py`. With power 0 it is cfg_scale at every step, also the first.
    """
    return 1 + (cfg_scale - 1) * (1 - math.cos(math.pi * (step / num_steps) ** power)) / 2


def for_branches(x: Tensor, rows: Tensor) -> Tensor:
    """x (B, ...) for both guidance branches in one batch, conditional rows first: (2B, ...) where `rows` is as long."""
    return x if len(x) == len(rows) else torch.cat([x, x])

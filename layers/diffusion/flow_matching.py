"""Linear flow-matching path and the conversions between x-, eps- and v-prediction.

Time is continuous, t = 0 noise and t = 1 data: z = t x + (1 - t) e, v = x - e (Liu et al. 2022; Lipman et al. 2022;
JiT, Li & He 2025, Table 1). Shapes: x, e, z (B, ...), t broadcastable to them.
"""

from typing import Literal

import torch
from torch import Tensor

Space = Literal["x", "eps", "v"]


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t on the straight path from noise to data."""
    return t * x + (1 - t) * noise


def logit_normal(normal: Tensor, *, mean: float, std: float) -> Tensor:
    """Times with logit(t) ~ N(mean, std^2) from standard normal draws (Esser et al. 2024)."""
    return torch.sigmoid(normal * std + mean)


def target(space: Space, x: Tensor, noise: Tensor) -> Tensor:
    """What a network that predicts in `space` should return."""
    return {"x": lambda: x, "eps": lambda: noise, "v": lambda: x - noise}[space]()


def convert(value: Tensor, z: Tensor, t: Tensor, *, source: Space, to: Space, t_eps: float) -> Tensor:
    """A quantity in space `source` at (z, t), expressed in space `to`; every divisor is at least `t_eps`.

    JiT's Table 1 with the clamp of its section 4.3 wherever t or 1 - t divides. Only x -> v is in the official code;
    the clamp of the other cells follows the same rule by our choice.
    """
    if source == to:
        return value
    if source == "v":
        return z + (1 - t) * value if to == "x" else z - t * value
    if source == "x":
        divisor = (1 - t).clamp_min(t_eps)
        return (value - z) / divisor if to == "v" else (z - t * value) / divisor
    divisor = t.clamp_min(t_eps)
    return (z - value) / divisor if to == "v" else (z - (1 - t) * value) / divisor

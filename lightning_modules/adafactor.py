"""Adafactor as big_vision has it (Shazeer & Stern, arXiv 1804.04235; Zhai et al., arXiv 2106.04560; official
`optax.py`, `scale_by_adafactor`): factored second moments, and a first moment in bfloat16.

Unlike the paper's: no clipping, no relative step size, a cap on the second moment's decay, so that it never freezes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_modules.pieces import piece_like, whole

DECAY_EXPONENT = 0.8  # the second moment's decay is 1 - t^-0.8, up to its cap
MIN_FACTORED = 32  # two sides of at least this length are factored
EPS = 1e-30  # on squared gradients


class Adafactor(torch.optim.Optimizer):
    """p <- p - lr (m + weight_decay p), with m = betas[0] m + (1 - betas[0]) g / sqrt(v); v decays by betas[1] at most.

    `shapes`: the shape in which a parameter is factored, where it is another than the one it is stored in.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        shapes: Mapping[nn.Parameter, Sequence[int]] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.shapes = dict(shapes or {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; `closure` as in every optimiser."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)
        return loss

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        grad = whole(param.grad).reshape(self.shapes.get(param, param.shape))  # means over axes need all of it
        state = self.state[param]
        if not state:
            state |= {"step": 0, "momentum": torch.zeros_like(grad, dtype=torch.bfloat16), **empty_moments(grad)}
        state["step"] += 1
        momentum, cap = group["betas"]
        update = rescale(grad, state, decay=min(cap, 1 - state["step"] ** -DECAY_EXPONENT))
        # officially the product with the decay is rounded to bfloat16, and the sum is one of float32
        update = (state["momentum"] * momentum).float().add_(update, alpha=1 - momentum)
        state["momentum"].copy_(update)
        update = piece_like(update.view(param.shape), param)
        if group["weight_decay"]:
            update.add_(param, alpha=group["weight_decay"])
        param.sub_(update, alpha=group["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimiser's, but for the first moment, which torch would turn into float32."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["momentum"] = state["momentum"].to(torch.bfloat16)


class Sides(NamedTuple):
    """The two longest sides of a tensor: means over `rows` are kept, and means over `columns`."""

    columns: int
    rows: int


def factored_sides(shape: Sequence[int]) -> Sides | None:
    """The longest side (`rows`) and the second longest (`columns`; the later of equals is the longer), or None where
    that one is shorter than MIN_FACTORED."""
    order = sorted(range(len(shape)), key=lambda axis: shape[axis])
    if len(shape) < 2 or shape[order[-2]] < MIN_FACTORED:
        return None
    return Sides(order[-2], order[-1])


def empty_moments(grad: Tensor) -> dict[str, Tensor]:
    """Second moments of a gradient, all zero: two factors, or one of the gradient's shape."""
    sides = factored_sides(grad.shape)
    if sides is None:
        return {"square": torch.zeros_like(grad)}
    return {"row": torch.zeros_like(grad.mean(sides.rows)), "column": torch.zeros_like(grad.mean(sides.columns))}


def rescale(grad: Tensor, moments: dict[str, Tensor], *, decay: float) -> Tensor:
    """The gradient over the root of its second moment, which is updated first."""
    square, sides = grad.square().add_(EPS), factored_sides(grad.shape)
    if sides is None:
        return grad * moments["square"].lerp_(square, 1 - decay).rsqrt()
    row = moments["row"].lerp_(square.mean(sides.rows), 1 - decay).unsqueeze(sides.rows)
    column = moments["column"].lerp_(square.mean(sides.columns), 1 - decay).unsqueeze(sides.columns)
    return grad * (row / row.mean(sides.columns, keepdim=True)).rsqrt() * column.rsqrt()

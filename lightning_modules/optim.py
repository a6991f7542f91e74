"""Optimisers, their parameter groups and the warm-up schedule, as the recipes state them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lightning_modules.adafactor import Adafactor


@dataclass
class OptimConfig:
    """Exactly one of `lr` and `blr`; at most one of `warmup_steps` and `warmup_epochs`."""

    lr: float | None = None  # learning rate
    blr: float | None = None  # learning rate per 256 images of the global batch
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)  # adafactor: the second is the largest that the decay comes to
    eps: float = 1e-8  # of adamw
    weight_decay: float = 0.0  # per step: times the learning rate, before the multipliers that single parameters have
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up, until the end of training
    min_lr: float = 0.0  # end of the cosine
    warmup_steps: int | None = None  # optimiser steps, linear from 0
    warmup_epochs: float | None = None

    def __post_init__(self) -> None:
        if (self.lr is None) == (self.blr is None):
            raise ValueError(f"give exactly one of optim.lr ({self.lr}) and optim.blr ({self.blr})")
        for name in ("lr", "blr", "min_lr", "weight_decay", "warmup_steps", "warmup_epochs"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"optim.{name} is {getattr(self, name)}: it cannot be negative")
        if self.warmup_steps is not None and self.warmup_epochs is not None:
            raise ValueError(
                f"give at most one of optim.warmup_steps ({self.warmup_steps}) and warmup_epochs ({self.warmup_epochs})"
            )

    def peak_lr(self, global_batch_size: int) -> float:
        """`lr`, or `blr` x global batch / 256 (Goyal et al. 2017)."""
        return self.lr if self.lr is not None else self.blr * global_batch_size / 256

    def warmup(self, steps_per_epoch: int) -> float:
        """Length of the warm-up in optimiser steps."""
        return self.warmup_steps or (self.warmup_epochs or 0) * steps_per_epoch


def learning_rate(
    at: float, *, peak: float, warmup: float, total: float, schedule: str = "constant", min_lr: float = 0.0
) -> float:
    """Linear warm-up from 0, then constant or half a cosine down to `min_lr` (MAE, JiT `util/lr_sched.py`).

    `at`, `warmup` and `total` share a unit: optimiser steps here, fractional epochs in the official code.
    """
    if at < warmup:
        return peak * at / warmup
    if schedule == "constant":
        return peak
    progress = min(1.0, (at - warmup) / max(total - warmup, 1e-12))
    return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    *,
    no_weight_decay: Callable[[str, nn.Parameter], bool],
    lr_multiplier: Callable[[str, nn.Parameter], float] = lambda name, param: 1.0,
) -> list[dict[str, Any]]:
    """Groups in the official order: without decay (1-D, biases, the method's exceptions), then with decay.

    Parameters whose multiplier of the learning rate is not 1 come first, two groups for each multiplier
    ("lr_multiplier"). Raises ValueError for a multiplier that is not positive.
    """
    groups: dict[float, tuple[list, list]] = {1.0: ([], [])}
    for name, param in named_parameters:
        if param.requires_grad:
            multiplier = lr_multiplier(name, param)
            if multiplier <= 0:
                raise ValueError(f"the learning rate's multiplier of {name} is {multiplier}: freeze it instead")
            free, decayed = groups.setdefault(multiplier, ([], []))
            exempt = param.ndim == 1 or name.endswith(".bias") or no_weight_decay(name, param)
            (free if exempt else decayed).append(param)
    groups[1.0] = groups.pop(1.0)  # last: its learning rate is the one that is logged
    return [
        {"params": params, "weight_decay": decay} | ({"lr_multiplier": multiplier} if multiplier != 1 else {})
        for multiplier, pair in groups.items()
        for params, decay in zip(pair, (0.0, weight_decay), strict=True)
    ]


def make_optimizer(
    groups: list[dict[str, Any]],
    config: OptimConfig,
    lr: float,
    *,
    shapes: Mapping[nn.Parameter, Sequence[int]] | None = None,
) -> torch.optim.Optimizer:
    """The recipe's optimiser over `param_groups`. `shapes`: see Adafactor, which alone minds them."""
    groups = [scaled_group(group, lr) for group in groups]
    if config.optimizer == "adafactor":
        return Adafactor(groups, lr=lr, betas=config.betas, shapes=shapes)
    return adamw(groups, config, lr)


def scaled_group(group: dict[str, Any], lr: float) -> dict[str, Any]:
    """A group with the rate that its multiplier means; the decay of a step stays what it is (big_vision `optax.py`)."""
    rest = {name: value for name, value in group.items() if name != "lr_multiplier"}
    multiplier = group.get("lr_multiplier", 1.0)
    if multiplier == 1:
        return rest
    return rest | {"lr": lr * multiplier, "weight_decay": group["weight_decay"] / multiplier}


def adamw(groups: list[dict], config: OptimConfig, lr: float) -> torch.optim.AdamW:
    """Fused where the parameters lie on CUDA; the plain kernels elsewhere are the reference for bit-exact resume."""
    fused = all(param.is_cuda for group in groups for param in group["params"])
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=fused)

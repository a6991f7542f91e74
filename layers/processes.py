"""Means over the processes of a distributed training, with gradients.

Where a loss is no mean over images (a batch's statistics, a ratio of norms), processes have to share what they see:
else their number would change what is trained. Each must call this as often as the others, with as many rows of the
global batch, so in training only. One process alone has its own values back.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of all processes' `x`, of any shape; its gradient is that of the mean of their losses."""
    return _Mean.apply(x) if several_processes() else x


def several_processes() -> bool:
    """Whether there is anyone to share with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _Mean(torch.autograd.Function):
    """The gradient of a mean over processes is a mean over processes, too: each loss depends on every process's x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _mean(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _mean(grad)


def _mean(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / dist.get_world_size()

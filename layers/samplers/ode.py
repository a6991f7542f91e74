"""Fixed-grid solvers for dx/dt = velocity(x, t).

`times` is a 1-D float32 tensor on the host, so that loops never wait for the device; `velocity(x, t)` receives its
0-dim entries. Solvers yield the state after each
interval (`solve` keeps the last). float32 island: the state keeps x's dtype.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]


def uniform_times(num_steps: int) -> Tensor:
    """num_steps + 1 evenly spaced times from 0 to 1. Raises ValueError below one step."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}: sampling needs at least one step")
    return torch.linspace(0.0, 1.0, num_steps + 1)


def euler(velocity: Velocity, x: Tensor, times: Tensor) -> Iterator[Tensor]:
    """One evaluation per interval. x (B, ...) -> the state after each interval."""
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, t)
        yield x


def heun(velocity: Velocity, x: Tensor, times: Tensor) -> Iterator[Tensor]:
    """Trapezoidal rule with an Euler predictor; the last interval is Euler, so that t = 1 is never evaluated.

    x (B, ...) -> the state after each interval. Source: JiT `denoiser.py`; EDM (Karras et al. 2022), Algorithm 1, ends
    likewise.
    """
    for t, t_next in pairwise(times[:-1]):
        slope = velocity(x, t)
        slope_next = velocity(x + (t_next - t) * slope, t_next)
        x = x + (t_next - t) * (slope + slope_next) / 2
        yield x
    yield from euler(velocity, x, times[-2:])


SOLVERS = {"euler": euler, "heun": heun}


def solve(path: Iterator[Tensor]) -> Tensor:
    """The last state of a solver's path; the others are let go as they come."""
    state = None
    for state in path:  # noqa: B007
        pass
    return state

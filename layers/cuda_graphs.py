"""CUDA graphs of a function of tensors: all its kernels in one launch, for code that is bound by launching them.

One graph per combination of shapes, captured when it first occurs, replayed afterwards; no gradients. The kernels and
their order are the eager ones, so the results are too.
"""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

WARMUP_CALLS = 2  # libraries allocate, and compilers compile, in the first ones, which a capture does not allow


class Captured(NamedTuple):
    """A captured call: where it reads its arguments, what replays it, where its result appears."""

    arguments: list[Any]
    replay: Callable[[], None]
    result: Tensor


Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


class CUDACapture:
    """() -> Tensor on the current device into (what replays it, its result). Graphs share their working memory, so one
    must not be replayed before another's result has been copied."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP_CALLS):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = call()
        return graph.replay, result


class Graphed:
    """`function` of tensors and plain values -> Tensor, captured for each combination of shapes and values.

    The function must not draw random numbers nor read a tensor on the host, and what it reads besides its arguments
    (weights) must stay where it is; autocast is that of the first call.
    """

    def __init__(self, function: Callable[..., Tensor], *, capture: Capture | None = None) -> None:
        self.function, self.capture = function, capture or CUDACapture()
        self._captured: dict[Hashable, Captured] = {}

    def __call__(self, *arguments: Any) -> Tensor:
        """The function's result, in memory of its own."""
        key = tuple((a.shape, a.dtype, a.device) if isinstance(a, Tensor) else a for a in arguments)
        if key not in self._captured:
            self._captured[key] = self._make(arguments)
        made = self._captured[key]
        for place, value in zip(made.arguments, arguments, strict=True):
            if isinstance(value, Tensor):
                place.copy_(value)
        made.replay()
        return made.result.clone()

    def _make(self, arguments: tuple[Any, ...]) -> Captured:
        with torch.inference_mode(False), torch.no_grad():  # later calls may be in either mode
            places = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
            return Captured(places, *self.capture(partial(self.function, *places)))

"""Timing and memory of one callable, on the host or on CUDA; what a benchmark runs unless its options say else."""

import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Sizes:
    """What a method is timed with on a device: images per training step and per sampled batch, sampler settings."""

    train_batch: int
    sample_batch: tuple[int, ...]
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass
class Measured:
    """Median, fastest and slowest call in seconds; peak device memory in bytes (0 on the host)."""

    median: float
    fastest: float
    slowest: float
    peak_bytes: int


def measure(calls: Sequence[Callable[[], object]], *, device: str, repeats: int, warmup: int) -> list[Measured]:
    """Time `repeats` calls of each after `warmup` ones; on CUDA by device events. Calls take turns, so that a machine
    whose load changes slows all of them down."""
    for _ in range(warmup):
        for call in calls:
            call()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = _host_seconds if device == "cpu" else _device_seconds
    rounds = [[seconds(call) for call in calls] for _ in range(repeats)]
    peak = 0 if device == "cpu" else torch.cuda.max_memory_allocated()
    return [Measured(statistics.median(t), min(t), max(t), peak) for t in zip(*rounds, strict=True)]


def _host_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _device_seconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most that a call's own tensors hold at once; on CUDA by the allocator, with the workspaces of libraries."""
    if device == "cpu":
        with LiveBytes() as meter:
            call()
        return meter.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class LiveBytes(TorchDispatchMode):
    """How many bytes of tensors live at once, counted after each operation: the same on every machine.

    As a context: `peak` is the most that tensors made inside it held at once, backward passes included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage(), before)
        self.peak = max(self.peak, self.now)
        return out

    def _watch(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        key, size = id(storage), storage.nbytes()
        if key in before or key in self._known:  # a view, or what was given
            return
        self._known.add(key)
        self.now += size
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

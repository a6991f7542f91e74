"""Timing and memory of one callable, on the host or on CUDA; what a benchmark runs unless its options say else."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


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

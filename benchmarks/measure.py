"""Timing and memory of one callable, on the host or on CUDA."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Measured:
    """Median, fastest and slowest call in seconds; peak device memory in bytes (0 on the host)."""

    median: float
    fastest: float
    slowest: float
    peak_bytes: int


def measure(call: Callable[[], object], *, device: str, repeats: int, warmup: int) -> Measured:
    """Time `repeats` calls after `warmup` ones; on CUDA by device events."""
    for _ in range(warmup):
        call()
    if device == "cpu":
        times = [_host_seconds(call) for _ in range(repeats)]
        return Measured(statistics.median(times), min(times), max(times), 0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = [_device_seconds(call) for _ in range(repeats)]
    return Measured(statistics.median(times), min(times), max(times), torch.cuda.max_memory_allocated())


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

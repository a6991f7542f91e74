"""Pieces of a method, each done plainly and our way: what `make bench` compares besides training steps and samples."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Measured, measure, peak_bytes

SHORT, MORE = 0.1, 10  # seconds of a plain call; as many times more, since single ones are at the scheduler's mercy


class Part(NamedTuple):
    """One piece of work in both ways; each call starts from nothing, so that calls can be repeated. `timed`: False for
    tensors on the meta device, of which only the memory says something."""

    name: str
    plain: Callable[[], object]
    ours: Callable[[], object]
    timed: bool = True


def time_parts(parts: Iterable[Part], *, device: str, repeats: int) -> list[dict[str, Any]]:
    """A row for each part; the call whose memory is counted is the warm-up, and short parts are repeated more often."""
    rows = []
    for part in parts:
        calls = part.plain, part.ours
        peaks = [peak_bytes(call, device) for call in calls]
        if not part.timed:
            rows.append(row(part.name, None, peaks))
            continue
        once, _ = measure(calls, device=device, repeats=1, warmup=0)
        rounds = repeats * (MORE if once.median < SHORT else 1)
        rows.append(row(part.name, measure(calls, device=device, repeats=rounds, warmup=0), peaks))
    return rows


def row(name: str, measured: list[Measured] | None, peaks: list[int]) -> dict[str, Any]:
    """Figures of both ways, the plain one first; those of time are None without measured ones."""
    plain, ours = [m.median for m in measured] if measured else (None, None)
    return {
        "part": name,
        "plain_ms": plain and plain * 1000,
        "ours_ms": ours and ours * 1000,
        "time_ratio": plain and plain / ours,
        "plain_mb": peaks[0] / 1e6,
        "ours_mb": peaks[1] / 1e6,
        "memory_ratio": peaks[0] / peaks[1] if peaks[1] else None,
    }


def show_parts(rows: list[dict[str, Any]]) -> None:
    """The rows as a table."""
    table = Table(title="parts: median time, and the most memory that a call's own tensors held", title_justify="left")
    for column in ("part", "plain ms", "ours ms", "ratio", "plain MB", "ours MB", "ratio"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for r in rows:
        table.add_row(
            r["part"],
            *(f"{r[name]:.2f}" if r[name] else "-" for name in ("plain_ms", "ours_ms")),
            f"{r['time_ratio']:.2f}x" if r["time_ratio"] else "-",
            f"{r['plain_mb']:.3f}",
            f"{r['ours_mb']:.3f}",
            f"{r['memory_ratio']:.2f}x" if r["memory_ratio"] else "-",
        )
    Console(width=110).print(table)

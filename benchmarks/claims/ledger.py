"""The claims ledger: papers' claims reproduced at small scale, `docs/claims.md` written from stored results.

A claim is a module of this folder with a `CLAIM`. It consists of cells (one model each), computed independently and
kept in `runs/claims/<name>/` as they come, so that a stopped run goes on where it was (after a change of code, remove
that folder first). When all are there, the results
go to `benchmarks/results/claims/<name>.json`, and its section of the ledger and its picture are written from them.
`python -m benchmarks.claims.ledger` writes every section anew from the stored results; nothing is computed.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.errors import one_line_errors

# modules of this folder, in the ledger's order
CLAIMS = (
    "jit_toy",
    "jit_prediction",
    "mar_loss",
    "mar_head",
    "givt_mixture",
    "givt_sampling",
    "jetformer_flow",
    "jetformer_recipe",
    "rar_orders",
    "dart_history",
)
ROOT = Path(__file__).parents[2]
HEADER = """# Claims

What the papers claim, tried at a scale that 2 CPU cores can bear. Each section is written by its command from
`benchmarks/results/claims/`; whether it agrees is decided by rules that were fixed before the run and stand with it.
Small scale can contradict a paper without the paper being wrong: where it does, the section says so.
`python -m benchmarks.claims.ledger` writes this file anew from the stored results.
"""

Cell = dict[str, Any]  # figures, or named groups of them; "points" are for the picture only and are not stored
Settings = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """One claim. `cells(settings)` names them; `compute(key, settings)` makes one, deterministically but for seconds;
    `verdict` and `tables` turn {key: cell} into markdown; `draw` makes the picture from cells that still have their
    points."""

    name: str  # the module's
    title: str
    statement: str  # what the paper says, with its source
    setting: Callable[[Settings], str]  # what we do
    settings: Settings
    cells: Callable[[Settings], list[str]]
    compute: Callable[[str, Settings], Cell]
    verdict: Callable[[dict[str, Cell], Settings], str]
    tables: Callable[[dict[str, Cell], Settings], str]
    draw: Callable[[dict[str, Cell], Settings, Path], None]
    caption: str


@dataclass(frozen=True)
class Places:
    """Where things go."""

    results: Path = ROOT / "benchmarks/results/claims"
    ledger: Path = ROOT / "docs/claims.md"
    pictures: Path = ROOT / "docs/claims"
    work: Path = Path("runs/claims")  # relative to the working directory, as all runs are


def find(name: str) -> Claim:
    return importlib.import_module(f"benchmarks.claims.{name}").CLAIM


def compute_cell(name: str, key: str, settings: Settings) -> tuple[str, Cell]:
    """One cell on one thread, in whatever process: figures to six digits, and its seconds."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    cell = find(name).compute(key, settings)
    return key, {**_rounded(cell), "seconds": round(time.perf_counter() - start, 1)}


def _rounded(value: Any) -> Any:
    """Floats to six digits, also in groups."""
    if isinstance(value, dict):
        return {name: _rounded(v) for name, v in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def run(claim: Claim, *, settings: Settings | None = None, places: Places = Places(), workers: int = 1) -> None:
    """Compute what is missing, store the results, write picture and section."""
    settings = settings or claim.settings
    work = places.work / claim.name
    start = time.perf_counter()
    keys = claim.cells(settings)
    cells = {key: cell for key in keys if (cell := _kept(work, key, settings)) is not None}
    print(f"{claim.name}: {len(keys)} cells, {len(cells)} of them kept from an earlier run in {work}", flush=True)
    missing = [key for key in keys if key not in cells]
    for key, cell in _computed(claim.name, missing, settings, workers):
        _keep(work, key, settings, cell)
        cells[key] = cell
        minutes = (time.perf_counter() - start) / 60
        print(f"[{len(cells)}/{len(keys)}] {key}: {cell['seconds']} s; {minutes:.1f} min in all", flush=True)
    cells = {key: cells[key] for key in keys}
    claim.draw(cells, settings, _parent_made(places.pictures / f"{claim.name}.png"))
    path = places.results / f"{claim.name}.json"
    _write(path, json.dumps(stored(claim, cells, settings, workers), indent=1) + "\n")
    write_ledger(places)
    shutil.rmtree(work)  # the next call computes anew
    print(f"wrote {path}, {places.pictures / claim.name}.png and {places.ledger}\n\n{claim.verdict(cells, settings)}")


def _computed(name: str, keys: Sequence[str], settings: Settings, workers: int) -> Iterator[tuple[str, Cell]]:
    """Cells as they are done, here or in `workers` processes of one thread each."""
    if workers == 1:
        yield from (compute_cell(name, key, settings) for key in keys)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:  # ends its processes when it is left, however
        yield from pool.imap_unordered(partial(compute_cell, name, settings=settings), keys)


def _cell_file(work: Path, key: str) -> Path:
    return work / f"{key.replace('/', '_').replace(' ', '_')}.json"


def _keep(work: Path, key: str, settings: Settings, cell: Cell) -> None:
    _write(_cell_file(work, key), json.dumps({"settings": settings, "cell": cell}))


def _kept(work: Path, key: str, settings: Settings) -> Cell | None:
    """A cell of a run that was stopped; one that was made with other settings does not count."""
    path = _cell_file(work, key)
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    return kept["cell"] if kept["settings"] == json.loads(json.dumps(settings)) else None


def stored(claim: Claim, cells: dict[str, Cell], settings: Settings, workers: int) -> dict[str, Any]:
    """What goes to the results file."""
    return {
        "claim": claim.name,
        "torch": torch.__version__.partition("+")[0],
        "python": platform.python_version(),
        "workers": workers,
        "core_minutes": round(sum(cell["seconds"] for cell in cells.values()) / 60, 1),
        "settings": settings,
        "cells": {key: {n: v for n, v in cell.items() if n != "points"} for key, cell in cells.items()},
    }


def section(claim: Claim, results: dict[str, Any], *, picture: str) -> str:
    """A claim's part of the ledger, from its stored results alone."""
    cells, settings = results["cells"], results["settings"]
    made = (
        f"{len(cells)} cells, {results['core_minutes']:.0f} core minutes in {results['workers']} processes of one "
        f"thread, torch {results['torch']}, Python {results['python']}"
    )
    parts = [
        f"## {claim.title}",
        f"**Claim.** {claim.statement}",
        f"**Ours.** {claim.setting(settings)} `python -m benchmarks.claims.{claim.name}` ({made}).",
        f"**Outcome.** {claim.verdict(cells, settings)}",
        claim.tables(cells, settings),
        f"![{claim.caption}]({picture})",
        claim.caption,
    ]
    return "\n\n".join(part.strip() for part in parts)


def write_ledger(places: Places = Places()) -> None:
    """Put each claim with stored results between its markers; what else stands in the file stays."""
    old = places.ledger.read_text() if places.ledger.exists() else HEADER
    _write(places.ledger, updated(old, places))


def updated(text: str, places: Places = Places()) -> str:
    """The ledger's text with every section as the stored results have it; new ones at the end."""
    for name in CLAIMS:
        path = places.results / f"{name}.json"
        if not path.exists():
            continue
        picture = os.path.relpath(places.pictures / f"{name}.png", places.ledger.parent)
        body = section(find(name), json.loads(path.read_text()), picture=picture)
        text = replace_section(text, name, body)
    return text


def replace_section(text: str, name: str, body: str) -> str:
    """Raises ValueError for a marker without its partner."""
    begin, end = f"<!-- claim {name} -->", f"<!-- end of {name} -->"
    block = f"{begin}\n\n{body}\n\n{end}"
    if begin not in text and end not in text:
        return f"{text.rstrip()}\n\n{block}\n"
    head, _, rest = text.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise ValueError(f"the ledger has only one of the markers '{begin}' and '{end}': restore or remove it")
    return head + block + tail


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column left, the others right."""
    lines = [list(header), ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean over seeds and, in brackets, the range."""
    low, high = (f"{value:.{digits}g}" for value in (min(values), max(values)))
    return low if low == high else f"{mean(values):.{digits}g} ({low} to {high})"


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = _parent_made(path).with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def _parent_made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def command(claim: Claim) -> None:
    """The command line of a claim's module."""
    parser = argparse.ArgumentParser(prog=claim.name, description=claim.title, allow_abbrev=False)
    cores = min(2, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=cores, help="processes, of one thread each")
    options = parser.parse_args()
    if options.workers < 1:
        raise ValueError(f"--workers is {options.workers}: give at least 1")
    try:
        run(claim, workers=options.workers)
    except KeyboardInterrupt:
        print("stopped: finished cells are kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)


@one_line_errors
def main() -> None:
    argparse.ArgumentParser(prog="ledger", description=__doc__, allow_abbrev=False).parse_args()
    write_ledger()
    print(f"wrote {Places().ledger}")


if __name__ == "__main__":
    main()

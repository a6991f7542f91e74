"""Rows of evaluations: a table on the screen, results.json and results.csv on disk, and which code made them."""

import csv
import datetime
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lightning_modules.paths import shown

T = TypeVar("T")
NOT_FIGURES = ("seed", "batch_size", "num_images", "cfg_scale")  # numbers that are settings


def code_version() -> dict[str, str]:
    """Version of this code (with the git revision, "+changes" for an edited tree), of torch, and the date."""
    version = importlib.metadata.version("softtokens") if _installed() else "unknown"
    revision = _git("rev-parse", "--short", "HEAD")
    changes = "+changes" if revision and _git("status", "--porcelain", "--untracked-files=no") else ""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"code": f"{version}{f' {revision}' if revision else ''}{changes}", "torch": torch.__version__, "date": now}


def _installed() -> bool:
    try:
        importlib.metadata.version("softtokens")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _git(*words: str) -> str:
    folder = Path(__file__).parents[1]
    if not (folder / ".git").exists():  # an installed copy may lie inside another repository
        return ""
    try:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def earlier(folder: Path) -> list[dict[str, Any]]:
    """Rows that a folder holds already; it is made if it is missing. Called before hours are spent on new ones.

    Raises ValueError if the folder is a file or its results.json is damaged.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"OUT is '{folder}', which is a file: give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    try:
        rows = json.loads(path.read_text()) if path.exists() else []
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}' is no JSON ({error}): move it away, or give another folder with OUT=") from error
    if not isinstance(rows, list):
        raise ValueError(f"'{path}' holds no list of rows: move it away, or give another folder with OUT=")
    return rows


def append(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Add rows to results.json and write results.csv anew from all of them; both atomically.

    Raises ValueError for a results.json that is damaged.
    """
    there = [*earlier(folder), *rows]
    path = folder / "results.json"
    _replace(path, json.dumps(there, indent=2) + "\n")
    columns = list(dict.fromkeys(name for row in there for name in row))
    part = folder / f"results.csv.{os.getpid()}.part"
    with open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in there)
    os.replace(part, folder / "results.csv")


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(f"{path.suffix}.{os.getpid()}.part")
    part.write_text(text)
    os.replace(part, path)


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict | list) else value


def show(rows: Sequence[dict[str, Any]], *, title: str, folder: Path, columns: Sequence[str] = ()) -> None:
    """Figures as a table (with `columns` before them), then settings and what makes them incomparable, of the last."""
    names = [n for n in dict.fromkeys(n for row in rows for n in row) if _is_figure(n, rows) and n not in columns]
    table = Table(title=title, title_justify="left", show_header=len(rows) > 1)
    if len(rows) == 1:  # figures below each other, which stays readable at any width
        for name in names:
            table.add_row(name, _text(rows[0][name]))
    else:
        names = [*columns, *(name for name in names if not name.endswith("_std"))]
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*[_text(row.get(name)) for name in names])
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
    for line in _remarks(rows[-1]):
        console.print(line, highlight=False, markup=False)
    console.print(f"in {shown(folder)}: results.json, results.csv", highlight=False)


def _remarks(row: dict[str, Any]) -> Iterator[str]:
    if row.get("statistics"):
        yield (
            f"against {row['statistics']} (sha256 {row['statistics_sha256'][:12]}), "
            f"extractor {row['extractor']} ({row['extractor_sha256'][:12]})"
        )
    if row.get("not_comparable"):
        yield f"warning: not comparable with published figures: {'; '.join(row['not_comparable'])}"
    if row.get("paper_protocol"):
        yield f"the paper's protocol: {row['paper_protocol']}"


def _is_figure(name: str, rows: Sequence[dict[str, Any]]) -> bool:
    numbers = all(isinstance(row[name], int | float) for row in rows if name in row)
    return numbers and name not in NOT_FIGURES


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def progress(items: Iterable[T], total: int, visible: bool) -> Iterator[T]:
    """The items, with a progress bar where it is visible."""
    return iter(track(items, description="drawing", total=total, disable=not visible, transient=True))

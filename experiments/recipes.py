"""Which recipe files make an experiment, and where its runs lie."""

import difflib
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_modules.weights import check_whole, is_zip

FOLDER = Path(__file__).parent
RUNS = Path("runs")  # relative to the working directory
NOT_EXPERIMENTS = {"default", "smoke"}


def names() -> list[str]:
    """Every experiment in the folder."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml") if p.stem not in NOT_EXPERIMENTS)


def files(experiment: str) -> list[Path]:
    """default.yaml, then one file per name prefix: mar_l_512 -> default, mar, mar_l, mar_l_512.

    Raises ValueError for an unknown experiment, with the nearest names.
    """
    if experiment not in names():
        near = difflib.get_close_matches(experiment, names(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names())}"
        raise ValueError(f"unknown experiment '{experiment}' (EXP=): {hint}")
    parts = experiment.split("_")
    prefixes = ["_".join(parts[: i + 1]) for i in range(len(parts))]
    paths = [FOLDER / f"{name}.yaml" for name in ["default", *prefixes]]
    return [path for path in paths if path.exists()]


def find_checkpoint(experiment: str, wanted: str) -> Path:
    """A checkpoint by path, or "last": the newest of the experiment's runs that is whole.

    Raises FileNotFoundError: a run never starts from scratch because a checkpoint was not found; ValueError for a file
    that is damaged.
    """
    if wanted != "last":
        return _whole(Path(wanted), experiment)
    folder = RUNS / experiment
    # a run without a logger has no folder of its own
    found = newest_whole([*folder.glob("*/checkpoints/*.ckpt"), *folder.glob("checkpoints/*.ckpt")])
    if found is None:
        raise FileNotFoundError(f"no checkpoint in '{folder}' (CKPT=last): train first, make train EXP={experiment}")
    return found


def _whole(path: Path, experiment: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at '{path}' (CKPT=): give a file, or 'last' for the newest of {experiment}"
        )
    if is_zip(path):  # what is none is no checkpoint of ours, and whoever reads it says so
        try:
            check_whole(path)
        except ValueError as error:
            raise ValueError(f"{error} (CKPT=): give another, or 'last' for the newest that is whole") from error
    return path


def newest_whole(paths: Iterable[Path]) -> Path | None:
    """The newest file that reads well to its last byte; a damaged one is named in a warning and passed over."""
    for path in sorted(paths, key=_time, reverse=True):
        try:
            check_whole(path)
        except FileNotFoundError:  # a run that goes on meanwhile has replaced it
            continue
        except (ValueError, OSError) as error:
            rank_zero_warn(f"{error}: passed over for an older checkpoint")
            continue
        return path
    return None


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def run_version(checkpoint: Path, experiment: str) -> str | None:
    """Name of the run folder that holds a checkpoint of this experiment (runs/<experiment>/<version>/checkpoints/)."""
    version = checkpoint.resolve().parent.parent
    return version.name if version.parent == (RUNS / experiment).resolve() else None

"""Which recipe files make an experiment, and where its runs lie."""

import difflib
from pathlib import Path

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
    """A checkpoint by path, or "last": the newest of the experiment's runs.

    Raises FileNotFoundError: a run never starts from scratch because a checkpoint was not found.
    """
    if wanted != "last":
        path = Path(wanted)
        if path.is_file():
            return path
        raise FileNotFoundError(
            f"no checkpoint at '{wanted}' (CKPT=): give a file, or 'last' for the newest of {experiment}"
        )
    found = sorted((RUNS / experiment).glob("*/checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"no checkpoint in '{RUNS / experiment}' (CKPT=last): train first, make train EXP={experiment}"
        )
    return found[-1]


def run_version(checkpoint: Path, experiment: str) -> str | None:
    """Name of the run folder that holds a checkpoint of this experiment (runs/<experiment>/<version>/checkpoints/)."""
    version = checkpoint.resolve().parent.parent
    return version.name if version.parent == (RUNS / experiment).resolve() else None

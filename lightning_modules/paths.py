"""Where a run's files lie, and how paths are shown."""

from pathlib import Path

import lightning as L


def run_folder(trainer: L.Trainer) -> Path:
    """Folder of this run's files: the logger's, else the trainer's default. Rank zero only."""
    return Path(getattr(trainer.logger, "log_dir", None) or trainer.default_root_dir)


def shown(path: str | Path) -> str:
    """Relative to the working directory where it lies below it."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)

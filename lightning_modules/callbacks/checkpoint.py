"""Checkpoints that are whole or absent."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, then renames: a kill at any moment leaves the old file or the new.

    Lightning's own writer goes through a temporary file that may lie on another disk, where a move is a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Tensors and plain values only, whatever `weights_only` says."""
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)


class LatestCheckpoint(ModelCheckpoint):
    """Every `every_n_train_steps` optimiser steps and after the last one; only the newest file is kept.

    The file that a run was resumed from goes too, once a newer one is written, if it lies in the same folder.
    """

    def __init__(self, every_n_train_steps: int = 1000, dirpath: str | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="step={step:07d}",
            auto_insert_metric_name=False,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        finished = trainer.global_step >= trainer.estimated_stepping_batches
        if finished and self._last_global_step_saved != trainer.global_step:
            self.save_now(trainer)

    def save_now(self, trainer: L.Trainer) -> str:
        """Save at the current step, whatever the interval; returns the path."""
        self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        return self.best_model_path

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Any]) -> None:
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        resumed, newest = Path(trainer.ckpt_path or ""), Path(self.best_model_path)
        ours = resumed.match("step=*.ckpt") and resumed.resolve().parent == newest.resolve().parent
        if ours and resumed.resolve() != newest.resolve() and resumed.exists():
            trainer.strategy.remove_checkpoint(resumed)  # on rank zero only


class MilestoneCheckpoint(ModelCheckpoint):
    """Every `every_n_epochs` epochs; all are kept."""

    def __init__(self, every_n_epochs: int = 100, dirpath: str | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="epoch={epoch:04d}",
            auto_insert_metric_name=False,
            every_n_epochs=every_n_epochs,
            save_top_k=-1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )


def latest_checkpoint(trainer: L.Trainer) -> LatestCheckpoint | None:
    """The trainer's LatestCheckpoint, None if it has none."""
    return next((c for c in trainer.checkpoint_callbacks if isinstance(c, LatestCheckpoint)), None)

"""A Rich progress bar over the whole run in optimiser steps."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar


class StepProgressBar(RichProgressBar):
    """One bar from the first step to the last, instead of one per epoch.

    Lightning's bar reads every metric at every step, which makes the host wait for the device each time; this one reads
    them at the logging interval only.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=4)  # per second

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.is_enabled and self.train_progress_bar_id is None:
            self.train_progress_bar_id = self._add_task(trainer.estimated_stepping_batches, "step")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.on_train_epoch_start(trainer, pl_module)  # a run resumed within an epoch does not start one
        if self.is_enabled:
            self.progress.update(self.train_progress_bar_id, completed=trainer.global_step)
        if trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0:
            self._update_metrics(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing: metrics are read at the logging interval."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Without the version number, which the opening line names in full."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

"""What a run says of itself: a line at the start, plain lines where no progress bar shows, a table at the end."""

import math
import time
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table

from lightning_modules.callbacks.checkpoint import latest_checkpoint
from lightning_modules.callbacks.samples import SampleGrid
from lightning_modules.callbacks.throughput import Throughput
from lightning_modules.paths import run_folder, shown


class Report(L.Callback):
    """First process only. `experiment` fills in the commands of the closing table, which says where pictures,
    checkpoint and logs are."""

    def __init__(self, experiment: str = "") -> None:
        self.experiment = experiment
        self._start = 0.0
        self._reported = -1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._reported = trainer.global_step
        if trainer.is_global_zero:
            size = sum(p.numel() for p in pl_module.parameters()) / 1e6
            print(
                f"{self.experiment or type(pl_module).__name__}: {size:.2f} M parameters, "
                f"steps {trainer.global_step} to {_total(trainer) or 'no set end'}, "
                f"{trainer.world_size} x {pl_module.device.type}, {trainer.precision}, in {shown(run_folder(trainer))}",
                flush=True,
            )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Without a terminal there is no bar: a line at every tenth of the run instead."""
        step, total = trainer.global_step, _total(trainer)
        due = step % max(1, (total or 10_000) // 10) == 0 and step != self._reported
        if due and trainer.is_global_zero and not Console().is_terminal:
            self._reported = step
            print(f"step {step}{f'/{total}' if total else ''}  loss {_metric(trainer, 'train/loss')}", flush=True)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            if self._reported < 0:
                print(f"nothing left to train at step {trainer.global_step}: raise --trainer.max_steps or max_epochs")
            Console().print(self._table(trainer))

    def _table(self, trainer: L.Trainer) -> Table:
        minutes = (time.perf_counter() - self._start) / 60
        title = f"{self.experiment or 'run'}: step {trainer.global_step}, {minutes:.1f} min"
        table = Table(title=title, show_header=False, title_justify="left")
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        samples = next((c for c in trainer.callbacks if isinstance(c, SampleGrid)), None)
        speed = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)
        latest = latest_checkpoint(trainer)
        saved = latest and (latest.newest or trainer.ckpt_path)
        rows = {
            "pictures": samples and samples.last_picture and shown(samples.last_picture),
            "checkpoint": saved and shown(saved),
            "logs": shown(run_folder(trainer)),
            "speed": speed and speed.images_per_s and f"{speed.images_per_s:.0f} images/s",
            "loss": _metric(trainer, "train/loss"),
            "val loss": _metric(trainer, "val/loss"),
            "draw more": self.experiment and saved and f"make sample EXP={self.experiment} CKPT=last NUM=64 OUT=out/",
            "curves": isinstance(trainer.logger, TensorBoardLogger) and "make tensorboard",
        }
        for name, value in rows.items():
            if value:
                table.add_row(name, value)
        return table


def _total(trainer: L.Trainer) -> int | None:
    """Optimiser steps of the whole run, None if nothing bounds them."""
    total = trainer.estimated_stepping_batches
    return int(total) if math.isfinite(total) and total > 0 else None


def _metric(trainer: L.Trainer, name: str) -> str:
    value = trainer.callback_metrics.get(name)
    return "" if value is None else f"{float(value):.4f}"

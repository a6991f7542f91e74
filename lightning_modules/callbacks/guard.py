"""Ends a run so that it can go on: at a signal after the step in progress is saved, when losses stay non-finite before
they do harm."""

import signal
from types import FrameType
from typing import Any

import lightning as L
import torch

from lightning_modules.callbacks import slurm
from lightning_modules.callbacks.checkpoint import latest_checkpoint
from lightning_modules.callbacks.ema import averages
from lightning_modules.callbacks.finite import FiniteSteps
from lightning_modules.paths import shown


class Guard(L.Callback):
    """SIGINT, SIGTERM or SIGUSR1 saves a checkpoint at the next step's end and exits with 128 + signal; a second one
    exits at once. Under SLURM the signal before the time limit (SIGUSR1) also puts the job back into the queue.

    A step whose loss or gradient is not finite is skipped and reported (`FiniteSteps`): the weights and the optimiser
    stay as they were. More than `max_skips` of them within 1000 steps end the run with ValueError; nothing is saved
    while the last step was one. On CUDA looking it up and the agreement of ranks wait for the logging interval, so that
    no step waits for the device; a save always looks.
    """

    def __init__(self, max_skips: int = 10) -> None:
        if max_skips < 0:
            raise ValueError(f"guard.max_skips is {max_skips}: 0 ends the run at the first step that is not finite")
        self._finite = FiniteSteps(max_skips)
        self._training = False
        self._signal: int | None = None
        self._requeue_at: int | None = None
        self._last_step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._requeue_at = slurm.take_over_requeue(trainer)
        if stage == "fit" and self._requeue_at is not None:  # until the first step it would end the process
            signal.signal(self._requeue_at, self._note)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._training = True
        self._finite.start(pl_module)
        self._last_step = trainer.global_step
        if latest := latest_checkpoint(trainer):
            latest.hold = lambda: self._finite.skipping(trainer)
        if trainer.received_sigterm:  # while data was made ready, by Lightning's handler, which would end with 0
            self._signal = self._signal or signal.SIGTERM
            trainer._signal_connector.received_sigterm = False
        for number in {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, self._requeue_at or signal.SIGUSR1}:
            signal.signal(number, self._note)  # Lightning puts back what was there before the run

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            raise SystemExit(128 + number)
        self._signal = number

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._finite.saw_batch(trainer)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        self._finite.saw_loss(loss)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._finite.before_step(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = trainer.log_every_n_steps or 50  # 0 switches logging off, not this
        due = pl_module.device.type != "cuda" or trainer.global_step % every == 0
        if due:
            self._finite.check(trainer)
        stepped = trainer.global_step != self._last_step  # a save between accumulated batches would lose gradients
        self._last_step = trainer.global_step
        if stepped and self._stop_is_asked(trainer, due) and not self._finite.skipping(trainer):
            self._save_and_exit(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finite.check(trainer)

    def _stop_is_asked(self, trainer: L.Trainer, due: bool) -> bool:
        if trainer.world_size == 1:
            return self._signal is not None
        # ranks hear a signal at different steps: they must agree on one, or a collective would hang
        return due and trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)

    def _save_and_exit(self, trainer: L.Trainer) -> None:
        number = self._signal or signal.SIGTERM
        requeue = self._requeue_at is not None and self._signal == self._requeue_at
        requeue = trainer.strategy.reduce_boolean_decision(requeue, all=False)  # the first process may not have heard
        latest = latest_checkpoint(trainer)
        path = latest.save_now(trainer) if latest else None
        if trainer.is_global_zero:
            saved = f"saved {shown(path)}" if path else "nothing saved: no checkpoint callback"
            then = slurm.requeue() if requeue else "go on with CKPT=last"
            print(f"\n{signal.Signals(number).name} at step {trainer.global_step}: {saved}; {then}", flush=True)
        raise SystemExit(128 + number)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Bad weights must not replace good ones."""
        if self._training:  # not of a checkpoint that somebody saves outside training
            self._finite.check(trainer)
            self._finite.check_saved(trainer, averages(trainer).shadows)

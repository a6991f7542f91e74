"""Ends a run cleanly: on SIGINT or SIGTERM after the step in progress is saved, on a non-finite loss before it is."""

import signal
from types import FrameType
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_modules.callbacks.checkpoint import latest_checkpoint
from lightning_modules.paths import shown


class Guard(L.Callback):
    """An interrupt saves a checkpoint at the next step's end and exits with 128 + signal; a second one exits at once.

    A loss that is not finite raises ValueError with step and cure; such weights are never saved. On CUDA the check and
    the agreement of ranks wait for the logging interval, so that no step waits for the device; a save always checks.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._finite: Tensor | None = None
        self._previous: dict[int, Any] = {}
        self._last_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finite = torch.ones((), dtype=torch.bool, device=pl_module.device)
        self._last_step = trainer.global_step
        for number in (signal.SIGINT, signal.SIGTERM):  # after Lightning's own, whose SIGTERM handler saves nothing
            self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            raise SystemExit(128 + number)
        self._signal = number

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._finite &= torch.isfinite(outputs["loss"]).all()
        every = trainer.log_every_n_steps or 50  # 0 switches logging off, not this
        due = pl_module.device.type != "cuda" or trainer.global_step % every == 0
        if due:
            self._check_finite(trainer, pl_module)
        stepped = trainer.global_step != self._last_step  # a save between accumulated batches would lose gradients
        self._last_step = trainer.global_step
        if stepped and self._stop_is_asked(trainer, due):
            self._save_and_exit(trainer)

    def _stop_is_asked(self, trainer: L.Trainer, due: bool) -> bool:
        if trainer.world_size == 1:
            return self._signal is not None
        # ranks hear a signal at different steps: they must agree on one, or a collective would hang
        return due and trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)

    def _save_and_exit(self, trainer: L.Trainer) -> None:
        number = self._signal or signal.SIGTERM
        latest = latest_checkpoint(trainer)
        path = latest.save_now(trainer) if latest else None
        if trainer.is_global_zero:
            saved = f"saved {shown(path)}; go on with CKPT=last" if path else "nothing saved: no checkpoint callback"
            print(f"\n{signal.Signals(number).name} at step {trainer.global_step}: {saved}", flush=True)
        raise SystemExit(128 + number)

    def _check_finite(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._finite:
            latest = latest_checkpoint(trainer)
            kept = latest and latest.best_model_path and shown(latest.best_model_path)
            raise ValueError(
                f"the loss is not finite (nan or inf) at step {trainer.global_step}: lower the learning rate "
                f"(--model.init_args.optim.lr) or use --trainer.precision=32-true, and if it was so from the first "
                f"step, look for such values in the data or in what the tokenizer makes of it; "
                + (f"the last good checkpoint is {kept}" if kept else "no checkpoint was saved yet")
            )

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The last line of defence: bad weights must not replace good ones."""
        if self._finite is None:  # a checkpoint saved outside training
            return
        weights = [p for p in pl_module.parameters() if p.requires_grad]
        self._finite &= torch.stack(torch._foreach_norm(weights)).isfinite().all()
        self._check_finite(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

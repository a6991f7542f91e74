"""A callback that stops its own process: how the tests interrupt a run at a known place."""

import os
import signal
from typing import Any, Literal

import lightning as L
from jsonargparse import set_parsing_settings

set_parsing_settings(import_path_allowlist=["tests"])  # in this process; others are started with --trust-config


class StopAt(L.Callback):
    """Sends `signum` to this process at optimiser step `step`, at the given place in the loop, once."""

    def __init__(
        self, step: int, signum: int, where: Literal["forward", "batch_end", "validation"] = "forward"
    ) -> None:
        self.step, self.signum, self.where = step, signum, where

    def _stop(self, trainer: L.Trainer, where: str) -> None:
        if where == self.where and trainer.global_step == self.step:
            self.where = "done"
            os.kill(os.getpid(), self.signum)

    def on_before_backward(self, trainer: L.Trainer, *args: Any) -> None:
        self._stop(trainer, "forward")

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._stop(trainer, "batch_end")

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._stop(trainer, "validation")


def option(step: int, signum: int = signal.SIGTERM, where: str = "forward") -> str:
    """Command-line word that adds the callback."""
    arguments = f'{{"step": {step}, "signum": {int(signum)}, "where": "{where}"}}'
    return f'--trainer.callbacks+={{"class_path": "tests.signals.StopAt", "init_args": {arguments}}}'

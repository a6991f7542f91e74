"""A callback that stops its own process: how the tests interrupt a run at a known place."""

import os
import signal
from typing import Any, Literal

import lightning as L
from jsonargparse import set_parsing_settings

from experiments import load

# This file is known in this process; others are started with --trust-config.
set_parsing_settings(import_path_allowlist=[__name__])
_known = load.is_known
load.is_known = lambda class_path: _known(class_path) or str(class_path).startswith(__name__)


class StopAt(L.Callback):
    """Sends `signum` to this process at optimiser step `step`, at the given place in the loop, once; 0 tells the
    trainer that it should stop, as EarlyStopping does."""

    def __init__(
        self, step: int, signum: int, where: Literal["forward", "batch_end", "validation"] = "forward"
    ) -> None:
        self.step, self.signum, self.where = step, signum, where

    def _stop(self, trainer: L.Trainer, where: str) -> None:
        if where == self.where and trainer.global_step == self.step:
            self.where = "done"
            if self.signum:
                os.kill(os.getpid(), self.signum)
            trainer.should_stop = trainer.should_stop or not self.signum

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

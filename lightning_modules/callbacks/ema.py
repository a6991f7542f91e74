"""Exponential moving averages of the weights, several decays at once.

shadow <- decay * shadow + (1 - decay) * weight after every optimiser step, from the initial weights, without warm-up or
bias correction (the official MAR and JiT rule). Shadows are float32: bf16 ones would never move at 0.9999.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_modules.pieces import exchange, piece_like
from lightning_modules.sharding import release
from lightning_modules.weights import EMA_STATE


class EMA(L.Callback):
    """Keeps one average per decay, swaps the first in for validation, test and predict, and stores all in checkpoints.

    Trainable parameters only; no decay, no average. Raises ValueError for a decay outside [0, 1).
    """

    def __init__(self, decays: Sequence[float] = (0.9999,)) -> None:
        for decay in decays:
            if not 0 <= decay < 1:
                raise ValueError(f"EMA decay {decay} is not in [0, 1): typical values are 0.99 to 0.9999")
        self.decays = tuple(decays)
        self.shadows: list[dict[str, Tensor]] = []
        self._restored: dict[str, Any] | None = None
        self._swapped = False
        self._last_step = 0

    @property
    def state_key(self) -> str:
        return EMA_STATE

    @property
    def names(self) -> list[str]:
        """Names under which the averages can be chosen: the decays."""
        return [str(decay) for decay in self.decays]

    def state_dict(self) -> dict[str, Any]:
        return {"decays": list(self.decays), "shadows": self.shadows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last_step = trainer.global_step  # a resumed run's is known only now
        self._warn_if_short(trainer.estimated_stepping_batches)

    def start(self, pl_module: L.LightningModule) -> None:
        """Averages from a restored checkpoint, else copies of the weights as they are.

        Raises ValueError if the checkpoint did not keep one of the decays, or if the weights are not float32.
        """
        params = {n: p.detach() for n, p in pl_module.named_parameters() if p.requires_grad}
        for name, param in params.items():
            if self.decays and param.dtype != torch.float32:
                raise ValueError(
                    f"EMA needs float32 weights and {name} is {param.dtype}: set --trainer.precision=bf16-mixed"
                )
        stored = self._restored or {"decays": [], "shadows": []}
        if len(stored["decays"]) != len(stored["shadows"]):
            raise ValueError("the checkpoint's EMA has not one average for each decay: give another CKPT=")
        kept = dict(zip(stored["decays"], stored["shadows"], strict=True))
        if missing := [decay for decay in self.decays if self._restored and decay not in kept]:
            raise ValueError(f"the checkpoint has no EMA of decay {missing[0]}, only {sorted(kept)}: set ema.decays so")
        for decay, shadow in kept.items():
            _check_kept(decay, shadow, params)
        self.shadows = [
            {n: piece_like(kept.get(decay, params)[n], p).to(p.device, copy=True) for n, p in params.items()}
            for decay in self.decays
        ]
        self._restored = None

    def _warn_if_short(self, num_steps: float) -> None:
        for decay in self.decays:
            share = decay**num_steps if num_steps > 0 else 0.0
            if share > 0.01:
                advice = 1 - 10 / max(num_steps, 10)
                warnings.warn(
                    f"EMA {decay} will still be {share:.0%} initial weights after this run's {int(num_steps)} steps, "
                    f"so its samples will look bad: train longer, or set ema.decays near {advice:.4g}",
                    stacklevel=2,
                )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == self._last_step:  # accumulating: no optimiser step was taken
            return
        self._last_step = trainer.global_step
        self.update(pl_module)

    @torch.no_grad()
    def update(self, pl_module: L.LightningModule) -> None:
        """One step of every average."""
        params = dict(pl_module.named_parameters())
        for decay, shadow in zip(self.decays, self.shadows, strict=True):
            weights = [params[name].detach() for name in shadow]
            torch._foreach_lerp_(list(shadow.values()), weights, 1 - decay)

    def _exchange(self, pl_module: L.LightningModule, index: int) -> None:
        release(pl_module)  # gathered weights are copies of what is to be exchanged
        shadow, params = self.shadows[index], dict(pl_module.named_parameters())
        for name in shadow:
            exchange(params[name], shadow[name])

    @property
    def first(self) -> str:
        """The name of the first average; without any, of the raw weights."""
        return self.names[0] if self.decays else "raw"

    @contextmanager
    def weights(self, pl_module: L.LightningModule, which: str) -> Iterator[None]:
        """Within the context the module holds the average of decay `which`; "raw" changes nothing. Exception-safe."""
        if which == "raw":
            yield
            return
        index = self.names.index(which)
        self._exchange(pl_module, index)
        try:
            yield
        finally:
            self._exchange(pl_module, index)

    def _swap_in(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.shadows and self._restored:  # validate, test or predict of a checkpoint
            self.start(pl_module)
        if self.shadows and not self._swapped:
            self._exchange(pl_module, 0)
            self._swapped = True

    def _swap_out(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self._swapped:
            self._exchange(pl_module, 0)
            self._swapped = False

    on_validation_start = on_test_start = on_predict_start = _swap_in
    on_validation_end = on_test_end = on_predict_end = _swap_out
    on_exception = _swap_out  # whatever is saved after an interrupt must be the raw weights


def _check_kept(decay: float, shadow: Any, params: dict[str, Tensor]) -> None:
    """Raise ValueError for a stored average that is not of these parameters."""
    for name, param in params.items():
        tensor = shadow.get(name) if isinstance(shadow, dict) else None
        if not isinstance(tensor, Tensor) or tensor.shape != param.shape:
            raise ValueError(
                f"the checkpoint's EMA of decay {decay} has no average of {name} {tuple(param.shape)}: it is of "
                f"another model, or damaged; give another CKPT="
            )


def averages(trainer: L.Trainer) -> EMA:
    """The trainer's averages; of one that keeps none, an EMA without decays, whose only weights are the raw ones."""
    return next((c for c in trainer.callbacks if isinstance(c, EMA)), EMA(()))

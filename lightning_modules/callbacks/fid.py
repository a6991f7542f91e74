"""FID and its kin while training: images of the first average, scored every so many steps.

The extractor is no part of the LightningModule (its weights stay out of checkpoints, its type is not cast) and runs
outside autocast. All processes draw; the figures are exact and the same on each.
"""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_modules.base import GenerativeModule
from lightning_modules.callbacks.checkpoint import save_if_due
from lightning_modules.callbacks.ema import averages
from lightning_modules.evaluation import Evaluation
from lightning_modules.extractors import make_extractor
from lightning_modules.generate import class_major_labels, draw_images
from lightning_modules.reference import load_reference
from lightning_modules.sharding import gathered


class FID(L.Callback):
    """Every `every_n_steps` optimiser steps and at the end (None: never) draws `num_images`, logs val/fid, val/is, ...

    stats: npz of `make stats`, or ADM's or JiT's.  extractor: inception, effnet_lite0, randconv, or null for what the
    data set itself can judge (attribute accuracy of shapes).  inception: a weights file in another place.
    weights: raw or a decay (default: the first average).  The keys are those of `make eval`, below val/.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        num_images: int = 50_000,
        batch_size: int = 64,
        extractor: str | None = "inception",
        stats: str | None = None,
        inception: str | None = None,
        weights: str | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("num_images", num_images), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"fid.{name} is {value}: it must be positive")
        self.every_n_steps, self.num_images, self.batch_size = every_n_steps, num_images, batch_size
        self.extractor, self.stats, self.inception = extractor, stats, inception
        self.which, self.seed = weights, seed
        self.last: dict[str, float] = {}
        self._evaluation: Evaluation | None = None
        self._done_at = -1

    def on_fit_start(self, trainer: L.Trainer, pl_module: GenerativeModule) -> None:
        """Missing weights or statistics are an error before the first step, not at the first evaluation."""
        if self.every_n_steps is None:
            return
        names = ["raw", *averages(trainer).names]
        if self.which not in (None, *names):
            raise ValueError(f"fid.weights is {self.which}: there are {', '.join(names)}")
        judge = getattr(trainer.datamodule, "score_samples", None)
        if self.extractor and not self.stats:
            raise ValueError(
                f"fid.extractor is {self.extractor} and fid.stats is missing: make stats makes such a file"
            )
        if self.stats and not self.extractor:
            raise ValueError(
                f"fid.stats is {self.stats} and fid.extractor is null: name the extractor it was made with"
            )
        if not self.extractor and judge is None:
            raise ValueError("fid.extractor is null, and this data cannot judge images by itself: name an extractor")
        extractor = make_extractor(self.extractor, weights=self.inception) if self.extractor else None
        reference = load_reference(self.stats) if self.stats else None
        if reference is not None and extractor is not None:
            reference.check(extractor, image_size=pl_module.tokenizer.image_size)
        self._evaluation = Evaluation(
            self.num_images,
            extractor.to(pl_module.device) if extractor else None,
            reference,
            judge,
        )
        if reference is not None and trainer.is_global_zero and isinstance(trainer.logger, TensorBoardLogger):
            text = f"{extractor.key} against {reference.path} (sha256 {reference.sha256}), {self.num_images} images"
            trainer.logger.experiment.add_text("val/statistics", text)

    def on_train_start(self, trainer: L.Trainer, pl_module: GenerativeModule) -> None:
        self._done_at = trainer.global_step  # a resumed run's is known only now

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: GenerativeModule, *args: Any) -> None:
        step = trainer.global_step
        if self._evaluation is None or step == self._done_at:
            return
        if step % self.every_n_steps == 0 or step >= trainer.estimated_stepping_batches:
            self._done_at = step
            save_if_due(trainer, pl_module)
            self.last = self._score(trainer, pl_module)
            values = {f"val/{name}": value for name, value in self.last.items()}
            pl_module.log_dict(values, batch_size=1, logger=False)
            for logger in trainer.loggers:  # by hand: log_dict would write at the logging interval only
                logger.log_metrics(values, step=step)
            if trainer.is_global_zero:
                line = "  ".join(f"{name} {value:.4g}" for name, value in self.last.items())
                print(f"step {step}  {line}", flush=True)

    @torch.no_grad()
    def _score(self, trainer: L.Trainer, pl_module: GenerativeModule) -> dict[str, float]:
        ema = averages(trainer)
        drawn = draw_images(
            pl_module,
            class_major_labels(self.num_images, pl_module.num_classes),
            seed=self.seed,
            batch_size=self.batch_size,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        weights = ema.weights(pl_module, self.which or ema.first)
        with weights, gathered(pl_module), trainer.precision_plugin.forward_context():
            return self._evaluation(drawn, device=pl_module.device)

"""Sample grids while training, from the raw weights and from every EMA side by side.

A module that draws nothing but gives images back (it has `originals` and `reconstruct`) shows validation images first,
then what came back of them. Where an original is more than an image, the module's `picture` makes one of it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_modules.base import GenerativeModule, to_uint8
from lightning_modules.callbacks.checkpoint import save_if_due
from lightning_modules.callbacks.ema import averages
from lightning_modules.paths import run_folder
from lightning_modules.pictures import enlarge, labels_in_turn, make_grid, save_png
from lightning_modules.sharding import gathered, is_sharded


class SampleGrid(L.Callback):
    """Every `every_n_steps` optimiser steps and at the end: TensorBoard images and `samples/*.png` in the run folder.

    The same labels and noise each time, so that grids compare. `labels`: which classes, in turn (all if None).
    `weights`: which of "raw" and the EMA decays (all if None). Nothing of the training's random state is touched.
    """

    def __init__(
        self,
        every_n_steps: int = 5000,
        num_images: int = 16,
        columns: int = 8,
        labels: Sequence[int] | None = None,
        weights: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        if every_n_steps < 1 or num_images < 1 or columns < 1:
            raise ValueError(
                f"samples: every_n_steps {every_n_steps}, num_images {num_images}, columns {columns} must be positive"
            )
        self.every_n_steps, self.num_images, self.columns = every_n_steps, num_images, columns
        self.labels, self.chosen, self.seed = labels, weights, seed
        self.last_picture: Path | None = None
        self._done_at = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: GenerativeModule) -> None:
        self._done_at = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: GenerativeModule, *args: Any) -> None:
        step = trainer.global_step
        last = step >= trainer.estimated_stepping_batches
        if step != self._done_at and (last or step % self.every_n_steps == 0):
            self._done_at = step
            save_if_due(trainer, pl_module)
            if trainer.is_global_zero or is_sharded(pl_module):
                self._draw(trainer, pl_module)

    def _draw(self, trainer: L.Trainer, pl_module: GenerativeModule) -> None:
        """On the first process; the others have their part in gathering the weights."""
        ema = averages(trainer)
        names = self.chosen or ["raw", *ema.names]
        originals = None
        if hasattr(pl_module, "reconstruct") and trainer.is_global_zero:
            originals = pl_module.originals(trainer.datamodule, self.num_images)
        grids = [] if originals is None else [make_grid(shown_of(pl_module, originals), columns=self.columns)]
        for name in names:
            with ema.weights(pl_module, name), gathered(pl_module), trainer.precision_plugin.forward_context():
                if trainer.is_global_zero:
                    images = self._sample(pl_module) if originals is None else pl_module.reconstruct(originals)
                    grids.append(make_grid(to_uint8(images), columns=self.columns))
        if trainer.is_global_zero:
            self._show(trainer, pl_module, names, grids)

    def _show(self, trainer: L.Trainer, pl_module: GenerativeModule, names: Sequence[str], grids: list[Tensor]) -> None:
        if isinstance(trainer.logger, TensorBoardLogger):
            for name, grid in zip(names, grids[-len(names) :], strict=True):
                trainer.logger.experiment.add_image(f"samples/{name}", grid, trainer.global_step)
        size = pl_module.tokenizer.image_size
        self.last_picture = run_folder(trainer) / "samples" / f"step={trainer.global_step:07d}_{'_'.join(names)}.png"
        save_png(enlarge(side_by_side(grids), size=size), self.last_picture)

    def _sample(self, pl_module: GenerativeModule) -> Tensor:
        generator = torch.Generator(pl_module.device).manual_seed(self.seed)
        labels = labels_in_turn(list(self.labels or range(pl_module.num_classes)), self.num_images)
        return pl_module.sample(labels, generator=generator)


def shown_of(module: GenerativeModule, originals: Tensor) -> Tensor:
    """What is shown of a module's `originals`: uint8 (N, 3, H, W)."""
    return module.picture(originals) if hasattr(module, "picture") else originals


def side_by_side(grids: Sequence[Tensor], *, gap: int = 6) -> Tensor:
    """Grids (3, H, W) of one height -> one picture with white gaps."""
    padded = [torch.nn.functional.pad(grid, (0, gap), value=255) for grid in grids[:-1]]
    return torch.cat([*padded, grids[-1]], dim=-1)

"""What both stages of GIVT's form for image-to-map tasks share: scores, and pictures of images beside their maps.

A module says what it predicts for a batch, `predict_maps`. In: batches of images with maps (datamodules/label_maps.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Generator, Tensor

from layers.random import Generators
from layers.tokenizers.base import Tokenizer
from layers.tokenizers.label_map import LabelMapTokenizer, Maps
from lightning_modules.base import Batch, GenerativeModule, batch_rows, eval_mode, sum_over_ranks, to_uint8
from lightning_modules.label_map_scores import (
    Sums,
    depth_figures,
    depth_sums,
    panoptic_figures,
    panoptic_sums,
    resized,
)
from lightning_modules.optim import OptimConfig
from lightning_modules.pictures import rows_to_show, spread_rows

PICTURE_SEED = 0


class LabelMapModule(GenerativeModule):
    """Base of both stages. `score_images`: validation images that are predicted and scored each time, 0 for none; the
    first ones, against their maps at the source's size. Raises ValueError for any other tokenizer."""

    OFFICIAL_KEYS: ClassVar[tuple[str, ...]] = ("model",)
    tokenizer: LabelMapTokenizer

    def __init__(
        self,
        tokenizer: Tokenizer | Mapping[str, Any],
        optim: OptimConfig | Mapping[str, Any],
        sampling: Any,
        *,
        score_images: int,
        init_from: str | None,
        init_key: str | None,
        compile: bool,
    ) -> None:
        loading = {"init_from": init_from, "init_key": init_key, "init_classes": "keep"}
        super().__init__(tokenizer, 1, optim, sampling, **loading, compile=compile)
        if not isinstance(self.tokenizer, LabelMapTokenizer):
            raise ValueError(
                f"{type(self.tokenizer).__name__} makes no tokens of label maps: set --model.init_args.tokenizer to "
                f"layers.tokenizers.label_map.LabelMapTokenizer"
            )
        if score_images < 0:
            raise ValueError(f"score_images is {score_images}: use 0 for no scores")
        self.score_images = score_images

    def predict_maps(self, images: Tensor, ids: Tensor, generator: Generators) -> Maps:
        """Ids (B, H, W) by name, for uint8 images (B, 3, H, W) whose maps are ids (B, K, H, W)."""
        raise NotImplementedError

    @torch.no_grad()
    def predicted(self, batch: Batch, generator: Generators = None) -> Maps:
        """`predict_maps` of a batch, in eval mode; "depth" in its unit, not in bins."""
        with eval_mode(self):
            maps = self.predict_maps(batch["image"], self.tokenizer.stacked(batch), generator)
        return self.in_units(maps)

    def in_units(self, maps: Maps) -> Maps:
        """Ids as they are, but bins of depth as numbers in the unit of `max_depth`."""
        return maps if self.tokenizer.panoptic else {"depth": self.tokenizer.depth(maps["depth"])}

    def predict_step(self, batch: Batch, batch_idx: int) -> Maps:
        """Maps (B, H, W) by name for the batch's images."""
        return self.predicted(batch, self._step_generator("predict", batch_idx))

    def sample(self, labels: Tensor | Sequence[int], sampling: Any = None, generator: Generators = None) -> NoReturn:
        """Raises ValueError: nothing here draws images of labels."""
        raise ValueError(
            "this model draws no images: make sample shows the maps that it predicts for images of its data, `predict` "
            "gives them, and figures of drawn images (make eval, make sweep, fid.every_n_steps) are of no use for it"
        )

    # Scores

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._scored, self._score_sums = 0, Sums()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self._scored * self.trainer.world_size < self.score_images:
            self._scored += batch_rows(batch)
            generators = self._row_generators("score", batch_idx, batch_rows(batch))
            for name, value in self.scores(batch, generators).items():
                self._score_sums[name] = self._score_sums.get(name, 0.0) + value

    def on_validation_epoch_end(self) -> None:
        """The losses' means, and the figures of all processes' images together: "val/pq", ... or "val/rmse", ..."""
        super().on_validation_epoch_end()
        sums = sum_over_ranks(self._score_sums)
        figures = panoptic_figures(sums) if self.tokenizer.panoptic else depth_figures(sums)
        self.log_dict({f"val/{name}": value for name, value in figures.items()}, prog_bar=True)

    def scores(self, batch: Batch, generator: Generators = None) -> Sums:
        """Sums over the batch's images, of predictions resized to their `truth`."""
        maps, sums = torch.stack(list(self._ordered(self.predicted(batch, generator))), dim=1), Sums()
        for predicted, truth in zip(maps, batch["truth"], strict=True):
            for name, value in self._score(resized(predicted, truth.shape[1:]), truth).items():
                sums[name] = sums.get(name, 0.0) + value
        return sums

    def _ordered(self, maps: Maps) -> list[Tensor]:
        return [maps["semantics"], maps["instances"]] if self.tokenizer.panoptic else [maps["depth"]]

    def _score(self, predicted: Tensor, truth: Tensor) -> Sums:
        if self.tokenizer.panoptic:
            return panoptic_sums(predicted, truth, getattr(self.trainer.datamodule, "stuff_classes", ()))
        return depth_sums(predicted, truth, low=self.tokenizer.min_depth, high=self.tokenizer.max_depth)

    # Pictures

    def originals(self, datamodule: Any, count: int) -> Tensor:
        """`count` images with their maps, or all if there are fewer, spread over the validation set (else the training
        set): the channels of the image, then the ids of each map, int16 (N, 3 + K, H, W). See `picture`."""
        return torch.cat([self.packed(row) for row in spread_rows(rows_to_show(datamodule), count)]).to(self.device)

    def blank_batch(self, size: int, device: torch.device | str, *, cached: bool = False) -> Batch:
        """As GenerativeModule's, with maps of zeros."""
        shape = (size, self.tokenizer.image_size, self.tokenizer.image_size)
        kind = torch.int16 if self.tokenizer.panoptic else torch.float32
        maps = {name: torch.zeros(shape, dtype=kind, device=device) for name in self.tokenizer.classes}
        return super().blank_batch(size, device) | maps

    def packed(self, batch: Batch) -> Tensor:
        """A batch as one tensor (B, 3 + K, H, W), int16."""
        return torch.cat([part.to(torch.int16) for part in (batch["image"], self.tokenizer.stacked(batch))], dim=1)

    def picture(self, originals: Tensor) -> Tensor:
        """Images and, beside them, their maps in colours: uint8 (N, 3, H, 2 W)."""
        maps = dict(zip(self.tokenizer.classes, originals[:, 3:].unbind(1), strict=True))
        return torch.cat([originals[:, :3].to(torch.uint8), to_uint8(self.tokenizer.picture(maps))], dim=-1)

    @torch.no_grad()
    def reconstruct(self, originals: Tensor) -> Tensor:
        """The maps that are predicted for `originals`, in colours: float32 (N, 3, H, W) in [-1, 1]. The same draws each
        time, so that pictures compare."""
        originals = originals.to(self.device)
        on_meta = self.device.type == "meta"  # where costs are counted, and there are no generators
        generator = None if on_meta else Generator(self.device).manual_seed(PICTURE_SEED)
        with eval_mode(self):
            maps = self.predict_maps(originals[:, :3].to(torch.uint8), originals[:, 3:], generator)
        return self.tokenizer.picture(maps)

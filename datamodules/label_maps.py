"""Images with label maps, for models that predict one from the other (GIVT's UViM form, experiments/givt_uvim_*.yaml).

Training rows are mirrored and cropped at random, image and map alike, by (seed, epoch, row); whatever its shape, the
crop becomes a square, as in the paper. Validation rows are the whole image, or `eval_crop` of it, and carry the maps
that they are scored against at the size of the source. Labels are all 0: an image has no class.
Batches: image uint8 (B,3,S,S), label int64 (B,), and semantics and instances int16 (B,S,S) or depth float32 (B,S,S);
validation batches also truth, a list of B tensors (2,h,w) or (1,h,w).
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.base import BatchData, RowDataset
from datamodules.label_ops import Box, canonical_ids, crop_maps, inception_box, resize_image, resize_maps
from datamodules.label_sources import FolderPairs, TablePairs, open_pairs, read_pair
from datamodules.sampler import RowKey, hash64
from datamodules.sources import chosen_splits, is_local, open_splits

MAPS = {"panoptic": ("semantics", "instances"), "depth": ("depth",)}
Task = Literal["panoptic", "depth"]


class LabelMapData(BatchData):
    """Pairs of `source`: a folder of images/ and labels/ or of such folders called train, val, ..., or a hub id.

    `task`: what the labels are (label_sources.py says how they are stored). `columns` = {image: ..., label: ...} names
    the columns of a hub table. `depth_unit`: what a label's number is multiplied by. `eval_crop` = [top, bottom, left,
    right] in pixels of the source, for validation. `stuff_classes`: classes whose pixels are one segment, for scores;
    where null, those of COCO's panoptic.json. `val_split`: "auto" is the validation split if there is one, null none.
    Raises ValueError for settings that do not fit.
    """

    def __init__(
        self,
        source: str,
        image_size: int = 512,
        *,
        task: Task,
        batch_size: int = 512,
        split: str = "train",
        val_split: str | None = "auto",
        columns: dict[str, str] | None = None,
        depth_unit: float = 0.001,
        eval_crop: list[int] | None = None,
        stuff_classes: list[int] | None = None,
        num_workers: int = 8,
        cache_dir: str | None = None,
        limit_n: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(image_size, batch_size, num_workers=num_workers, seed=seed, limit_n=limit_n)
        if task not in MAPS:
            raise ValueError(f"task='{task}' is unknown: use {' or '.join(MAPS)}")
        if eval_crop is not None and not (
            len(eval_crop) == 4 and 0 <= eval_crop[0] < eval_crop[1] and 0 <= eval_crop[2] < eval_crop[3]
        ):
            raise ValueError(f"eval_crop={eval_crop} must be [top, bottom, left, right] in pixels")
        self.source, self.task, self.split, self.val_split = source, task, split, val_split
        self.columns, self.depth_unit, self.eval_crop, self.cache_dir = columns, depth_unit, eval_crop, cache_dir
        self.stuff_classes = stuff_classes

    def prepare_data(self) -> None:
        """Downloads a hub dataset; Lightning calls this in one process per node, before `setup` in all of them."""
        if not is_local(self.source):
            open_splits(self.source, cache_dir=self.cache_dir)

    def make_datasets(self) -> tuple[RowDataset, RowDataset | None]:
        """Opens both splits."""
        splits = open_splits(self.source, cache_dir=self.cache_dir)
        train, *val = chosen_splits(list(splits), self.split, self.val_split, source=self.source)
        return self._rows(splits[train], training=True), self._rows(splits[val[0]], training=False) if val else None

    def _rows(self, split: Any, *, training: bool) -> "LabelMapRows":
        pairs = open_pairs(split, self.source, self.columns or {})
        if self.stuff_classes is None:
            self.stuff_classes = list(pairs.stuff_classes)
        return LabelMapRows(
            pairs,
            self.image_size,
            task=self.task,
            training=training,
            seed=self.seed,
            depth_unit=self.depth_unit,
            eval_crop=self.eval_crop,
        )


class LabelMapRows(RowDataset):
    """Decoded pairs. `training`: mirrored and cropped at random; otherwise cut by `eval_crop`, and with their truth."""

    def __init__(
        self,
        pairs: FolderPairs | TablePairs,
        image_size: int,
        *,
        task: Task,
        training: bool,
        seed: int = 0,
        depth_unit: float = 0.001,
        eval_crop: Sequence[int] | None = None,
    ) -> None:
        self.pairs, self.image_size, self.task, self.training = pairs, image_size, task, training
        self.seed, self.depth_unit, self.eval_crop = seed, depth_unit, eval_crop

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitems__(self, keys: Sequence[RowKey]) -> dict[str, Any]:
        rows = [self._read(key) for key in keys]
        images, maps = (torch.from_numpy(np.stack(part)) for part in list(zip(*rows, strict=True))[:2])
        batch = map_batch(images, maps, self.task)
        if not self.training:
            batch["truth"] = [torch.from_numpy(np.ascontiguousarray(truth)) for _, _, truth in rows]
        return batch

    def _read(self, key: RowKey) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image (3, S, S), maps (K, S, S), and truth (K, h, w) of the same part of the source."""
        pair = self.pairs[key.index]
        segments = self.pairs.segments_of(pair)
        read = read_pair(pair, segments, panoptic=self.task == "panoptic", depth_unit=self.depth_unit)
        height, width = read.maps.shape[1:]
        draw = np.random.Generator(np.random.Philox(key=hash64(self.seed, key.epoch, key.index)))
        flip = self.training and draw.random() > 0.5
        box = inception_box(height, width, draw) if self.training else self._eval_box(height, width, pair.name)
        image = resize_image(read.image, box, self.image_size)
        maps = resize_maps(crop_maps(read.maps, box), (self.image_size, self.image_size))
        if flip:
            image, maps = image[..., ::-1], maps[..., ::-1]
        if self.task == "panoptic":
            maps = np.stack([maps[0], canonical_ids(maps[1])])
        return np.ascontiguousarray(image), np.ascontiguousarray(maps), crop_maps(read.truth, box)

    def _eval_box(self, height: int, width: int, name: str) -> Box:
        if self.eval_crop is None:
            return Box(0, 0, height, width)
        top, bottom, left, right = self.eval_crop
        if bottom > height or right > width:
            raise ValueError(
                f"{name} has {width}x{height} pixels, fewer than eval_crop={list(self.eval_crop)}: unset it"
            )
        return Box(top, left, bottom - top, right - left)


def map_batch(images: Tensor, maps: Tensor, task: Task) -> dict[str, Any]:
    """Images (B, 3, S, S) and maps (B, K, S, S) under their names."""
    named = dict(zip(MAPS[task], maps.unbind(1), strict=True))
    return {"image": images, "label": torch.zeros(len(images), dtype=torch.int64)} | named

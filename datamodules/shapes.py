"""Coloured shapes: a procedural set with labels, captions and exact attributes; needs no file and no network.

Any number of pictures at any size, drawn once (shapes_scene.py) and, where there are many, kept in a cache file that
later runs map into memory. Classes are shape and colour together (64, "red circle" is 0) or the shape alone (8).
Pictures are never mirrored: "left" is part of a caption. Samples are scored by reading their attributes back
(shapes_oracle.py). Batches: the usual ones with "caption", and "attributes" int64 (B,5) in the order of ATTRIBUTES.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from datamodules.base import Batch, BatchData, RowDataset, check_counts
from datamodules.sampler import RowKey
from datamodules.shapes_oracle import read_attributes
from datamodules.shapes_scene import ATTRIBUTES, NAMES, SPLITS, TEMPLATES, caption, render
from datamodules.shards import replacing

CLASSES = {
    "shape_colour": [f"{colour} {shape}" for shape in NAMES["shape"] for colour in NAMES["colour"]],
    "shape": list(NAMES["shape"]),
}
COLOURS = len(NAMES["colour"])
CACHED_FROM = 4096  # pictures; fewer are drawn anew by every process, in about 2 s at 32 px
WRITTEN_AT_ONCE = 1024  # pictures


class ShapesBatch(Batch):
    """A batch with the five attribute ids of each picture."""

    attributes: Tensor  # (B, 5)


class ShapeRows(RowDataset):
    """Rows of `table`, an array (N,) of `row_type` in memory or mapped from a file. `label_by`: a key of CLASSES."""

    def __init__(self, table: np.ndarray, *, label_by: str = "shape_colour") -> None:
        assert label_by in CLASSES
        self.table, self.label_by = table, label_by

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, keys: Sequence[RowKey]) -> ShapesBatch:
        indices = [key.index for key in keys]
        rows = self.table[indices]  # a copy: a mapped file cannot be written to, which torch warns about
        attributes = torch.from_numpy(rows["attributes"].astype(np.int64))  # (B, 5)
        ids = [row.tolist() for row in attributes]
        return {
            "image": torch.from_numpy(np.ascontiguousarray(rows["image"])),
            "label": _labels(attributes, label_by=self.label_by),
            "caption": [caption(row, index % len(TEMPLATES)) for row, index in zip(ids, indices, strict=True)],
            "attributes": attributes,
        }


class ShapesData(BatchData):
    """`length` training and `val_length` validation pictures, a function of `seed`; `rows("test", n)` gives more.

    `label_by`: "shape_colour" (64 classes) or "shape" (8). From 4,096 pictures on, a split is drawn only once and kept
    in `cache_dir`: "auto" is ~/.cache/softtokens/shapes, or the folder shapes in SOFTTOKENS_CACHE where that is set;
    None draws in every run and process, and holds all in memory. Raises ValueError for counts below 1, an unknown
    `label_by` and a negative seed.
    """

    def __init__(
        self,
        image_size: int = 32,
        batch_size: int = 64,
        *,
        label_by: Literal["shape_colour", "shape"] = "shape_colour",
        length: int = 50_000,
        val_length: int = 2_000,
        num_workers: int = 0,
        seed: int = 0,
        limit_n: int | None = None,
        cache_dir: str | None = "auto",
    ) -> None:
        super().__init__(image_size, batch_size, num_workers=num_workers, seed=seed, limit_n=limit_n)
        check_counts(length=length, val_length=val_length)
        if label_by not in CLASSES:
            raise ValueError(f"label_by='{label_by}' is unknown: use {' or '.join(CLASSES)}")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed={seed} must lie in 0..2^64-1: pictures are drawn from it")
        self.label_by, self.length, self.val_length, self.cache_dir = label_by, length, val_length, cache_dir
        self.class_names = list(CLASSES[label_by])
        self.num_classes = len(self.class_names)

    def prepare_data(self) -> None:
        """Fills the cache; Lightning calls this in one process per node, before `setup` in all of them."""
        for split, length in (("train", self.length), ("val", self.val_length)):
            if self.cache_dir is not None and length >= CACHED_FROM:
                self.rows(split, length)

    def make_datasets(self) -> tuple[RowDataset, RowDataset]:
        """Returns training and validation rows."""
        return self.rows("train", self.length), self.rows("val", self.val_length)

    def rows(self, split: Literal["train", "val", "test"], length: int) -> ShapeRows:
        """The first `length` pictures of "train", "val" or "test", which share none. Raises ValueError for others."""
        if split not in SPLITS:
            raise ValueError(f"split='{split}' is unknown: use {', '.join(SPLITS)}")
        if self.cache_dir is None or length < CACHED_FROM:
            table = np.concatenate(list(_drawn(length, self.image_size, seed=self.seed, split=split)))
        else:
            table = cached_table(cache_folder(self.cache_dir), length, self.image_size, seed=self.seed, split=split)
        return ShapeRows(table, label_by=self.label_by)

    def score_samples(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Shares of drawn images, uint8 (N,3,S,S), that show what their labels (N,) ask for: no network is involved.

        {"shape_acc"}, and for 64 classes {"colour_acc"} and {"attr_acc"}, both right.
        """
        read = read_attributes(images)
        labels = labels.cpu()
        if self.label_by == "shape":
            return {"shape_acc": _rate(read[:, 0] == labels)}
        shape, colour = read[:, 0] == labels // COLOURS, read[:, 1] == labels % COLOURS
        return {"shape_acc": _rate(shape), "colour_acc": _rate(colour), "attr_acc": _rate(shape & colour)}


def _labels(attributes: Tensor, *, label_by: str) -> Tensor:
    """int64 (N, 5) -> class indices (N,) into CLASSES[label_by]."""
    shape, colour = attributes[:, 0], attributes[:, 1]
    return shape.clone() if label_by == "shape" else shape * COLOURS + colour


def row_type(size: int) -> np.dtype:
    """One row of a table: the picture and its five attribute ids."""
    return np.dtype([("image", np.uint8, (3, size, size)), ("attributes", np.uint8, (len(ATTRIBUTES),))])


def draw_table(indices: Sequence[int], size: int, *, seed: int, split: str) -> np.ndarray:
    """Draws the pictures `indices`: an array (len(indices),) of `row_type`."""
    return np.array([render(i, size, seed=seed, split=split) for i in indices], dtype=row_type(size))


def cache_folder(cache_dir: str) -> Path:
    """The folder that `cache_dir` means: "auto" is shapes in SOFTTOKENS_CACHE, or else in ~/.cache/softtokens."""
    if cache_dir == "auto":
        cache_dir = os.path.join(os.environ.get("SOFTTOKENS_CACHE") or "~/.cache/softtokens", "shapes")
    return Path(cache_dir).expanduser()


def cached_table(folder: Path, length: int, size: int, *, seed: int, split: str) -> np.ndarray:
    """Rows (length,) of `row_type`, mapped from a file in `folder`, which is drawn if it is missing or damaged.

    Several processes may do so at the same time: each writes a file of its own and then puts it in place. Raises
    ValueError if the folder cannot be written to.
    """
    path = folder / f"{split}-{length}x{size}px-seed{seed}.npy"
    if path.exists():
        table = _mapped(path, length, size, seed=seed, split=split)
        if table is not None:
            return table
        rank_zero_warn(f"'{path}' is damaged or by another version: drawing it again")
    rank_zero_info(f"drawing {length:,} shapes of {size} px into {path}, once")
    try:
        _write(path, length, _drawn(length, size, seed=seed, split=split), row_type(size))
    except OSError as error:
        cure = "set cache_dir to another folder, or to null to draw in every run"
        raise ValueError(f"cache_dir='{folder}' cannot be written to ({error}): {cure}") from error
    return np.lib.format.open_memmap(path, mode="r")


def _mapped(path: Path, length: int, size: int, *, seed: int, split: str) -> np.ndarray | None:
    """The table in a file, or None if it is not the one expected, judged by its form and by three of its rows."""
    try:
        table = np.lib.format.open_memmap(path, mode="r")
    except ValueError:  # no header, or fewer bytes than it announces
        return None
    if table.shape != (length,) or table.dtype != row_type(size):
        return None
    probes = [0, length // 2, length - 1]
    same = table[probes].tobytes() == draw_table(probes, size, seed=seed, split=split).tobytes()
    return table if same else None


def _drawn(length: int, size: int, *, seed: int, split: str) -> Iterator[np.ndarray]:
    for start in range(0, length, WRITTEN_AT_ONCE):
        indices = range(start, min(start + WRITTEN_AT_ONCE, length))
        yield draw_table(indices, size, seed=seed, split=split)


def _write(path: Path, length: int, parts: Iterator[np.ndarray], kind: np.dtype) -> None:
    """An .npy file of the parts, one after another, that is seen only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (length,)}
    with replacing(path) as unfinished, open(unfinished, "wb") as file:
        np.lib.format.write_array_header_2_0(file, header)
        for part in parts:
            file.write(part.tobytes())


def _rate(right: Tensor) -> float:
    return float(right.float().mean())

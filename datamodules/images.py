"""Images of any source, centre-cropped: ImageNet from the hub or a folder, one's own pictures, parquet files.

Map-style: every row can be read at any time, so order and resume are exact (sampler.py). Worker processes decode by the
rules of decode.py, crop after ADM, and mirror training images with probability 1/2; the coin of a row depends on (seed,
epoch, row), so it is the same for any number of ranks and workers. Out: uint8 (B,3,S,S), labels int64 (B,), captions
where the set has them.

A row that cannot be used (a damaged image, a label or caption that is missing) is replaced by the next one that can,
with one warning per row and process that names it. So the rows of a set, their order and a resume do not depend on the
damage, and a run of weeks does not end with one truncated file. A set with many such rows is refused at the start.
"""

import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from datamodules.base import Batch, BatchData, RowDataset
from datamodules.decode import BadRowError, decode
from datamodules.folders import FileStore
from datamodules.rows import RawRow, check_label, choose_caption
from datamodules.sampler import RowKey, coin
from datamodules.sources import (
    ArrowStore,
    count_classes,
    count_hub_classes,
    find_split,
    is_local,
    open_splits,
    open_store,
    pick_split,
)
from datamodules.transforms import center_crop, flip_horizontal, to_uint8_chw

OnBad = Literal["skip", "error"]
MAX_BAD_SHARE = 0.1  # of the rows of a source: beyond it the source is wrong, not a few of its rows
TRIED_ROWS = 64  # read at the start, evenly spaced; half a second of photos
MAX_BAD_RUN = 100  # bad rows one after another: no damage of files, but a disk that is gone


class Item(NamedTuple):
    """One row, ready to be stacked."""

    image: Tensor  # uint8 (3, S, S)
    label: int
    caption: str | None


class ImageRows(RowDataset):
    """Decoded rows of a store.

    flip: mirror half of them.  draw_caption: one of several, anew in each epoch, instead of the first.
    need_caption: whether a row without caption cannot be used.
    on_bad: "error" raises ValueError for a row that cannot be used, naming it; "skip" replaces it by the next one and
    notes it in `bad`. A label that is no class is an error always.
    """

    def __init__(
        self,
        store: FileStore | ArrowStore,
        image_size: int,
        *,
        num_classes: int | None = None,
        flip: bool = False,
        seed: int = 0,
        exif: bool = True,
        on_bad: OnBad = "error",
        draw_caption: bool = False,
        need_caption: bool = False,
    ) -> None:
        self.store, self.image_size, self.num_classes = store, image_size, num_classes
        self.flip, self.seed, self.exif, self.on_bad = flip, seed, exif, on_bad
        self.draw_caption, self.need_caption = draw_caption, need_caption
        self.bad: dict[int, str] = {}  # row -> why it cannot be used, as met in this process

    def __len__(self) -> int:
        return len(self.store)

    def __getitems__(self, keys: Sequence[RowKey]) -> Batch:
        rows = self.store.fetch([key.index for key in keys])
        items = [self._good(row, key) for row, key in zip(rows, keys, strict=True)]
        batch: Batch = {
            "image": torch.stack([item.image for item in items]),  # (B, 3, S, S)
            "label": torch.tensor([item.label for item in items]),  # (B,)
        }
        if items[0].caption is not None:
            batch["caption"] = [item.caption for item in items]
        return batch

    def read(self, row: RawRow, key: RowKey) -> Item:
        """Decodes one row. Raises BadRowError if it cannot be used, ValueError for a label that is no class."""
        if self.need_caption and not row.caption:
            raise BadRowError(f"{row.name} has no caption: add one or remove the row")
        label = check_label(row, self.num_classes)
        image = to_uint8_chw(center_crop(decode(row.data, row.name, exif=self.exif), self.image_size))  # (3, S, S)
        image = flip_horizontal(image, self.flip and coin(self.seed, key))
        drawn = key if self.draw_caption else None
        return Item(image, label, None if row.caption is None else choose_caption(row.caption, self.seed, drawn))

    def _good(self, row: RawRow, key: RowKey) -> Item:
        """The row of `key`, or the next one that can be used: a pure function of the key."""
        for step in range(min(MAX_BAD_RUN, len(self))):
            index = (key.index + step) % len(self)
            if index in self.bad:
                continue
            try:
                return self.read(row if step == 0 else self.store.fetch([index])[0], key)
            except BadRowError as error:
                self._note(index, error)
        raise ValueError(f"{step + 1} rows one after another cannot be used; the first: {self.bad[key.index]}")

    def _note(self, index: int, error: BadRowError) -> None:
        if self.on_bad == "error":
            raise ValueError(str(error)) from error  # ValueError itself: a worker hands errors over by their name
        self.bad[index] = str(error)
        warnings.warn(f"{error}. The next row takes its place (on_bad=skip; number {len(self.bad)} here)", stacklevel=2)


class ImageData(BatchData):
    """Rows of `source`: a hub id, a folder of images, a parquet or arrow file (or folder), or a `save_to_disk` folder.

    A folder holds one sub-folder per class, or images only (label 0), or images that its metadata.jsonl or metadata.csv
    lists, or such folders called train, val, ... `columns` maps image, label and caption to the names of the source;
    what it leaves out is guessed (rows.py), and {label: null} gives every row label 0. `num_classes` is found where it
    is left out. `val_split`: "auto" is the validation split if there is one; null is none; "val" and "validation" are
    the same. `exif=False` leaves photos as they are stored, as the papers do with ImageNet; `on_bad="error"` stops at
    the first row that cannot be used.
    """

    need_caption = False  # whether a row without caption cannot be used

    def __init__(
        self,
        source: str,
        image_size: int = 256,
        *,
        batch_size: int = 1024,
        split: str = "train",
        val_split: str | None = "auto",
        columns: dict[str, str | list[str] | None] | None = None,
        num_classes: int | None = None,
        flip: bool = True,
        exif: bool = True,
        on_bad: OnBad = "skip",
        num_workers: int = 8,
        cache_dir: str | None = None,
        limit_n: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(image_size, batch_size, num_workers=num_workers, seed=seed, limit_n=limit_n)
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 1")
        if on_bad not in ("skip", "error"):
            raise ValueError(f"on_bad={on_bad!r} is unknown: use 'skip' or 'error'")
        self.source, self.split, self.val_split = source, split, val_split
        self.columns, self.flip, self.cache_dir = columns, flip, cache_dir
        self.exif, self.on_bad, self.num_classes = exif, on_bad, num_classes

    def prepare_data(self) -> None:
        """Downloads a hub dataset; Lightning calls this in one process per node, before `setup` in all of them."""
        if not is_local(self.source):
            open_splits(self.source, cache_dir=self.cache_dir)

    def discover_classes(self) -> int | None:
        """The number of classes before `setup`, without listing or downloading images; None if only rows tell."""
        if self.num_classes is not None:
            return self.num_classes
        if not is_local(self.source):
            return count_hub_classes(self.source, self.columns, cache_dir=self.cache_dir)
        splits = open_splits(self.source, cache_dir=self.cache_dir)
        return count_classes(
            splits[pick_split(list(splits), self.split, source=self.source)], self.source, self.columns
        )

    def make_datasets(self) -> tuple[RowDataset, RowDataset | None]:
        """Opens both splits. Raises ValueError if their classes differ or exceed `num_classes`, or if many are bad."""
        splits = open_splits(self.source, cache_dir=self.cache_dir)
        stores: list[FileStore | ArrowStore] = []
        for name in self._split_names(list(splits)):
            classes = stores[0].class_names if stores else None
            stores.append(
                open_store(
                    splits[name], self.source, columns=self.columns, num_classes=self.num_classes, class_names=classes
                )
            )
        self._set_classes(stores)
        rows = [self._rows(store, training=store is stores[0]) for store in stores]
        for part in rows:
            self._check(part)
        return rows[0], rows[1] if len(rows) > 1 else None

    def _split_names(self, names: list[str]) -> list[str]:
        """The training split and, unless there is none, the validation split."""
        train = pick_split(names, self.split, source=self.source)
        if self.val_split is None:
            return [train]
        if self.val_split != "auto":
            return [train, pick_split(names, self.val_split, source=self.source)]
        found = find_split([name for name in names if name != train], "validation")
        if found is None:
            rank_zero_info(f"'{self.source}' has no validation split: training goes without (data.init_args.val_split)")
        return [train] if found is None else [train, found]

    def _set_classes(self, stores: list[FileStore | ArrowStore]) -> None:
        train, val = stores[0], stores[-1]
        if val.class_names != train.class_names:
            differing = sorted(set(train.class_names or []) ^ set(val.class_names or []))[:3]
            raise ValueError(
                f"'{self.source}': classes of '{self.split}' and '{self.val_split}' differ (such as {differing}), so"
                " labels would not mean the same: make them equal, choose another val_split, or null for none"
            )
        found = train.num_classes
        if self.num_classes is not None and found > self.num_classes:
            raise ValueError(f"'{self.source}' has {found} classes, more than num_classes={self.num_classes}: raise it")
        if not train.labelled and "label" not in (self.columns or {}):
            there = f"among {list(train.column_names)}: every row gets label 0 (data.init_args.columns={{label: ...}})"
            rank_zero_info(f"'{self.source}' has no label column {there}")
        self.class_names = train.class_names
        self.num_classes = found if self.num_classes is None else self.num_classes

    def _rows(self, store: FileStore | ArrowStore, *, training: bool) -> ImageRows:
        return ImageRows(
            store,
            self.image_size,
            num_classes=self.num_classes,
            flip=self.flip and training,
            seed=self.seed,
            exif=self.exif,
            on_bad=self.on_bad,
            draw_caption=training,
            need_caption=self.need_caption,
        )

    def _check(self, rows: ImageRows) -> None:
        if not len(rows):
            raise ValueError(f"'{self.source}' has a split without rows: choose another split or val_split")
        if isinstance(rows.store, FileStore):
            report_scan(rows.store, on_bad=self.on_bad)
        try_rows(rows)


def report_scan(store: FileStore, *, on_bad: OnBad) -> None:
    """Says in one line what the scan of a folder found, and warns if it left image files out.

    Raises ValueError if it left out many, or any with on_bad="error".
    """
    others, unusable = store.scan.passed_over, store.scan.unusable
    line = f"'{store.root}': {_count(len(store), 'image')}, {_count(store.num_classes, 'class', plural='es')}"
    if others:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in others.most_common(4))
        line += f"; {_count(others.total(), 'file')} passed over ({kinds})"
    if not unusable:
        rank_zero_info(line)
        return
    first = ", ".join(f"{path!r} ({why})" for path, why in list(unusable.items())[:3])
    line += f"; {_count(len(unusable), 'image file')} left out, such as {first}"
    if on_bad == "error" or len(unusable) > MAX_BAD_SHARE * (len(store) + len(unusable)):
        raise ValueError(f"{line}: replace or remove them, or set on_bad=skip if they are few")
    rank_zero_warn(line)


def try_rows(rows: ImageRows) -> None:
    """Reads up to `TRIED_ROWS` rows, so that a wrong source fails before training and alike in every process.

    Raises ValueError if many cannot be used, or one with on_bad="error".
    """
    indices = np.unique(np.linspace(0, len(rows) - 1, TRIED_ROWS).astype(int)).tolist()
    bad = []
    for index in indices:
        try:
            rows.read(rows.store.fetch([index])[0], RowKey(0, index))
        except BadRowError as error:
            bad.append(str(error))
    if bad and (rows.on_bad == "error" or len(bad) > MAX_BAD_SHARE * len(indices)):
        raise ValueError(f"{len(bad)} of {len(indices)} rows that were tried cannot be used, such as {bad[0]}")


def _count(number: int, noun: str, *, plural: str = "s") -> str:
    return f"{number:,} {noun}{plural if number != 1 else ''}"

"""Decoded rows of a store, and what happens to those that cannot be used.

A row that cannot be used (a damaged image, a label or caption that is missing) is replaced by the next one that can,
with one warning per row and process that names it. So the rows of a set, their order and a resume do not depend on the
damage, and a run of weeks does not end with one truncated file. A set with many such rows is refused: at the start,
where rows evenly spaced can be tried, and a stream as soon as that many were met.
"""

import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from datamodules.base import Batch, RowDataset
from datamodules.decode import MAX_PIXELS, BadRowError, decode
from datamodules.folders import FileStore
from datamodules.rows import RawRow, check_label, choose_caption
from datamodules.sampler import RowKey, coin
from datamodules.sources import ArrowStore
from datamodules.transforms import center_crop, flip_horizontal, size_before_crop, to_uint8_chw

OnBad = Literal["skip", "error"]
MAX_BAD_SHARE = 0.1  # of the rows of a source: beyond it the source is wrong, not a few of its rows
TRIED_ROWS = 64  # read at the start, evenly spaced; half a second of photos. From so many on a share means something
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
    limit_bad: raise ValueError as soon as more than MAX_BAD_SHARE of the rows met in this process, at least TRIED_ROWS,
    cannot be used; for rows of which `try_rows` cannot read a fair sample.
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
        limit_bad: bool = False,
        draw_caption: bool = False,
        need_caption: bool = False,
    ) -> None:
        self.store, self.image_size, self.num_classes = store, image_size, num_classes
        self.flip, self.seed, self.exif, self.on_bad = flip, seed, exif, on_bad
        self.limit_bad, self.draw_caption, self.need_caption = limit_bad, draw_caption, need_caption
        self.bad: dict[int, str] = {}  # row -> why it cannot be used, as met in this process
        self.met = 0  # rows that were tried in this process, whether they can be used or not

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
        picture = decode(row.data, row.name, exif=self.exif)
        _check_shape(row, picture.size, self.image_size)
        image = to_uint8_chw(center_crop(picture, self.image_size))  # (3, S, S)
        image = flip_horizontal(image, self.flip and coin(self.seed, key))
        drawn = key if self.draw_caption else None
        return Item(image, label, None if row.caption is None else choose_caption(row.caption, self.seed, drawn))

    def _good(self, row: RawRow, key: RowKey) -> Item:
        """The row of `key`, or the next one that can be used: a pure function of the key."""
        for step in range(min(MAX_BAD_RUN, len(self))):
            index = (key.index + step) % len(self)
            if index in self.bad:
                continue
            self.met += 1
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
        if self.limit_bad and self.met >= TRIED_ROWS and len(self.bad) > MAX_BAD_SHARE * self.met:
            raise ValueError(f"{len(self.bad)} of {self.met} rows that were read cannot be used, such as {error}")


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


def try_rows(rows: ImageRows, indices: Sequence[int] | None = None, *, share: float = MAX_BAD_SHARE) -> None:
    """Reads rows `indices`, else up to `TRIED_ROWS`: a wrong source fails before training and alike in every process.

    Raises ValueError if more than `share` of them cannot be used, or one with on_bad="error".
    """
    if indices is None:
        indices = np.unique(np.linspace(0, len(rows) - 1, TRIED_ROWS).astype(int)).tolist()
    bad = []
    for index in indices:
        try:
            rows.read(rows.store.fetch([index])[0], RowKey(0, index))
        except BadRowError as error:
            bad.append(str(error))
    if bad and (rows.on_bad == "error" or len(bad) > share * len(indices)):
        raise ValueError(f"{len(bad)} of {len(indices)} rows that were tried cannot be used, such as {bad[0]}")


def _check_shape(row: RawRow, size: tuple[int, int], image_size: int) -> None:
    """Raises BadRowError for a picture so long and narrow that the crop would enlarge it beyond `MAX_PIXELS`."""
    (width, height), (wide, high) = size, size_before_crop(*size, image_size)
    if wide * high > MAX_PIXELS:
        raise BadRowError(
            f"{row.name} is {width} x {height}, which a crop of {image_size} enlarges to {wide} x {high}, more than the"
            f" limit of {MAX_PIXELS:,} pixels: cut or remove it"
        )


def _count(number: int, noun: str, *, plural: str = "s") -> str:
    return f"{number:,} {noun}{plural if number != 1 else ''}"

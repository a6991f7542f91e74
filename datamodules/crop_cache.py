"""The crop cache: every image of a split decoded and cropped once, kept as uint8 shards (shards.py).

Decoding a photo and resampling it costs about ten milliseconds of a core, reading its cropped pixels a tenth of a
millisecond: a set that is read for hundreds of epochs is worth cropping once, at 3 S^2 bytes per image. Rows keep their
order, labels and captions, and the pixels are byte for byte those of the direct path; flips stay random, because they
are drawn when rows are read.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from datamodules.base import Batch, RowDataset
from datamodules.shards import ShardRows, ShardWriter, shard_batches

SHARD_BYTES = 1 << 28  # what an interrupt loses at most, and what writing holds in memory
READ_ROWS = 32  # rows that a worker hands over at a time
REPORT_SECONDS = 15.0


def crop_key(
    source: str, split: str, image_size: int, *, columns: Mapping[str, Any] | None = None, exif: bool = True
) -> dict[str, Any]:
    """What a crop cache was made from: entries of its `meta.json` that must agree when it is opened.

    A path counts as it is written, but for "~" and a slash at its end; where it leads is not asked.
    """
    columns, source = dict(columns or {}), str(Path(source).expanduser())
    return {"source": source, "split": split, "crop": "adm", "size": image_size, "columns": columns, "exif": exif}


def open_crop_cache(folder: Path | str, key: Mapping[str, Any], *, flip: bool = False, seed: int = 0) -> ShardRows:
    """Rows of a finished cache. Raises ValueError if it was made from something other than `key`."""
    return ShardRows(folder, expect=key, flip=flip, seed=seed)


def write_crop_cache(
    rows: RowDataset,
    folder: Path | str,
    key: Mapping[str, Any],
    *,
    info: Mapping[str, Any] | None = None,
    num_workers: int = 0,
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], None] = print,
) -> None:
    """Writes all of `rows` to `folder`; after an interrupt it goes on behind the last shard.

    Nothing about `rows` may be random: a row with several captions keeps its first. `info`: further entries for
    `meta.json`, such as class names. `num_workers` processes decode; call it from one process. `say` gets a line of
    progress now and then. Raises ValueError when the disk is too full, when `rows` draws flips or captions, or when the
    folder holds something else.
    """
    for option in ("flip", "draw_caption"):
        if getattr(rows, option, False):
            raise ValueError(f"rows with {option}=True would be cached as one draw: make them with {option}=False")
    first = rows[0]
    row_bytes = first["image"].nbytes + 2 * 8 + sum(len(text.encode()) + 8 for text in first.get("caption", []))
    shard_rows = max(1, shard_bytes // first["image"].nbytes)
    writer = ShardWriter(folder, meta={**key, **(info or {})}, rows=len(rows), shard_rows=shard_rows)
    todo = [number for number in writer.numbers() if not writer.is_written(number)]
    _check_space(Path(folder), row_bytes * sum(len(writer.rows_of(number)) for number in todo))
    report = _Report(len(rows), sum(len(writer.rows_of(number)) for number in todo), say)
    ranges = {number: writer.rows_of(number) for number in todo}
    batches = shard_batches(rows, ranges, batch_rows=READ_ROWS, num_workers=num_workers)
    for number, covered in ranges.items():
        parts = [report.count(batch) for _, batch in islice(batches, -(-len(covered) // READ_ROWS))]
        captions = [text for part in parts for text in part["caption"]] if "caption" in parts[0] else None
        writer.write(number, _joined(parts, covered), captions=captions)
    writer.finish()


def _joined(parts: Sequence[Batch], covered: range) -> dict[str, torch.Tensor]:
    """Tensors of one shard: image uint8 (n,3,S,S), label and index int64 (n,)."""
    return {
        "image": torch.cat([part["image"] for part in parts]),
        "label": torch.cat([part["label"] for part in parts]),
        "index": torch.arange(covered.start, covered.stop),
    }


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"the crop cache needs {needed / 1e9:.2f} GB in '{folder}', where {free / 1e9:.2f} GB are free: choose"
            " another folder or a smaller image_size"
        )


class _Report:
    """Counts rows and says every `REPORT_SECONDS` how far it is."""

    def __init__(self, total: int, todo: int, say: Callable[[str], None]) -> None:
        self.total, self.todo, self.say = total, todo, say
        self.done, self.start = 0, time.monotonic()
        self.last = self.start
        if todo < total:
            say(f"crop cache: {total - todo:,} of {total:,} images are there, going on")

    def count(self, batch: Batch) -> Batch:
        self.done += len(batch["label"])
        now = time.monotonic()
        if now - self.last >= REPORT_SECONDS or self.done == self.todo:
            self.last, rate = now, self.done / (now - self.start)
            self.say(
                f"crop cache: {self.total - self.todo + self.done:,} of {self.total:,} images, {rate:.0f} images/s,"
                f" {(self.todo - self.done) / rate / 60:.0f} min left"
            )
        return batch

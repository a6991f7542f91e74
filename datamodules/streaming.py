"""Streams: sets too large to download or unpack, read shard by shard through HF `datasets` with streaming.

A source is a hub id, a folder of .parquet, .arrow or .tar (webdataset) shards, or one such file or pattern such as
"/data/*.tar". `open_streams(source)` gives its splits, `open_stream_store` the rows of one, `StreamRows` serves them to
a loader whose `StreamSampler` (stream_plan.py) decides who reads what. Encoded bytes are held and shuffled, never
decoded images. The number of rows of each shard is known beforehand (stream_counts.py) and checked when a shard ends.
"""

import glob
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.base import Batch, RowDataset
from datamodules.decode import SUFFIXES
from datamodules.rows import Columns, RawRow
from datamodules.sampler import RowKey
from datamodules.sources import ArrowStore, check_class_names, count_described_classes, is_local, load_failure
from datamodules.stream_counts import count_rows, countable, known_rows, unreadable
from datamodules.stream_plan import Span, StreamKey, StreamSampler

IterableTable = Any  # datasets.IterableDataset: the library is imported inside functions only
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
READ_ROWS = 32  # read from a shard at a time


class StreamSplit(NamedTuple):
    """One split: `files[i]` is shard i of `table`."""

    table: IterableTable
    files: list[str]


class StreamStore(ArrowStore):
    """Rows of one split, read forwards. `hold` reads a chunk of consecutive rows, `fetch` gives rows of it.

    `columns` as in `ArrowStore`; besides, "json.caption" names a field of a column that holds a structure. Labels are
    integers below `num_classes`, or a ClassLabel. Raises ValueError for labels whose classes are not known, and, when a
    shard is read, if it has other than `shard_rows` rows.
    """

    def __init__(
        self,
        split: StreamSplit,
        source: str,
        shard_rows: Sequence[int],
        *,
        columns: Columns | None = None,
        num_classes: int | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        assert len(shard_rows) == len(split.files)
        table = _undecoded(split.table, columns or {})
        super().__init__(table, source, columns=columns, num_classes=num_classes, class_names=class_names)
        self.shard_rows, self.files = list(shard_rows), split.files
        self._first = [0, *accumulate(shard_rows)]  # index of each shard's first row
        self.forget()

    def __len__(self) -> int:
        return self._first[-1]

    def __getstate__(self) -> dict[str, Any]:
        copy = object.__new__(type(self))
        copy.__dict__ |= self.__dict__
        copy.forget()  # an open file does not travel
        return copy.__dict__

    def hold(self, chunk: tuple[Span, ...]) -> None:
        """Reads the rows of `chunk` unless they are held already, and lets go of those held before."""
        if chunk == self._chunk:
            return
        self._chunk, self._held = (), {}  # first: memory is to hold one chunk, not two
        for span in chunk:
            first = self._first[span.shard] + span.start
            self._held |= {first + place: row for place, row in enumerate(self._read(span))}
        self._chunk = chunk

    def hold_first(self, count: int) -> range:
        """Reads up to `count` rows of the first shard that has any, and returns their indices."""
        shard = next((shard for shard, rows in enumerate(self.shard_rows) if rows), None)
        if shard is None:
            return range(0)
        stop = min(count, self.shard_rows[shard])
        self.hold((Span(shard, 0, stop),))
        return range(stop)  # the shards before it are empty

    def fetch(self, indices: Sequence[int]) -> list[RawRow]:
        """Undecoded rows of `indices`, in that order. One that is not held is read apart, at the cost of a seek."""
        return [self._held.get(index) or self._fetch_apart(index) for index in indices]

    def _fetch_apart(self, index: int) -> RawRow:
        shard = bisect_right(self._first, index) - 1
        row = index - self._first[shard]
        values = next(self._open(shard, row), None)
        if values is None:
            raise ValueError(self._miscounted(shard))
        return self._raw_row(values, f"row {row} of shard '{self.files[shard]}'")

    def _read(self, span: Span) -> Iterator[RawRow]:
        """Rows of `span`; goes on where the last span stopped, if that is where this one starts."""
        shard, start, stop = span
        # the process belongs to the place: an open file that a fork inherits moves under both
        rows = self._rows if self._place == (os.getpid(), shard, start) else self._open(shard, start)
        self._place = None
        for row in range(start, stop):
            values = next(rows, None)
            if values is None:
                raise ValueError(self._miscounted(shard))
            yield self._raw_row(values, f"row {row} of shard '{self.files[shard]}'")
        if stop < self.shard_rows[shard]:
            self._place, self._rows = (os.getpid(), shard, stop), rows
        elif next(rows, None) is not None:
            raise ValueError(self._miscounted(shard))

    def _open(self, shard: int, start: int) -> Iterator[dict[str, Any]]:
        """Values by column of the rows of one shard, from row `start` on."""
        table = self.table.shard(num_shards=len(self.shard_rows), index=shard).skip(start)
        try:
            for columns in table.iter(batch_size=READ_ROWS):  # iter(table) would deal shards to the workers by itself
                for values in zip(*columns.values(), strict=True):
                    yield dict(zip(columns, values, strict=True))
        except Exception as error:  # whatever the reader of the format raises
            raise ValueError(unreadable(self.files[shard], error)) from error

    def _miscounted(self, shard: int) -> str:
        found = sum(1 for _ in self._open(shard, 0))
        return (
            f"shard '{self.files[shard]}' holds {found} rows, but {self.shard_rows[shard]} were stated: correct"
            " shard_rows, or replace the file if it is damaged"
        )

    def forget(self) -> None:
        """Lets go of the rows that are held, and of the open file."""
        self._chunk: tuple[Span, ...] = ()
        self._held: dict[int, RawRow] = {}  # rows of the chunk by index
        self._place: tuple[int, int, int] | None = None  # process, shard and row where `_rows` stands
        self._rows: Iterator[dict[str, Any]] = iter(())

    def _classes(self, num_classes: int | None, names: list[str] | None) -> tuple[list[str] | None, int]:
        if self.labelled:
            column = self.names["label"][0]
            feature = self.table.features[column]
            is_text = getattr(feature, "dtype", None) in ("string", "large_string")
            if not hasattr(feature, "names") and (num_classes is None or is_text):
                cure = "its labels are names: use integers" if is_text else "set num_classes"
                raise ValueError(
                    f"'{self.source}' is a stream, whose column '{column}' does not tell its classes: {cure}"
                )
        return super()._classes(num_classes, names)


class StreamRows(RowDataset):
    """What a loader reads a stream through: `rows` (such as ImageRows) of a `store`, by the keys of a StreamSampler.

    Only the first `limit_n` rows of the source, if given: `shard_rows` is what the sampler is to be made with.
    """

    def __init__(
        self, rows: RowDataset, store: StreamStore, *, limit_n: int | None = None, shuffle_buffer: int = 1
    ) -> None:
        """`shuffle_buffer`: rows that are shuffled at a time in training."""
        self.rows, self.store, self.shuffle_buffer = rows, store, shuffle_buffer
        limit = len(store) if limit_n is None else limit_n
        firsts = accumulate(store.shard_rows, initial=0)
        self.shard_rows = [max(0, min(n, limit - first)) for n, first in zip(store.shard_rows, firsts, strict=False)]

    def __len__(self) -> int:
        return sum(self.shard_rows)

    def sampler(self, *, num_workers: int, **options: Any) -> StreamSampler:
        """Reads shards front to back, and shuffles what it holds."""
        return StreamSampler(self.shard_rows, num_workers=num_workers, shuffle_buffer=self.shuffle_buffer, **options)

    def limited(self, limit_n: int, *, seed: int) -> "StreamRows":
        """The first `limit_n` rows: drawn ones would cost a seek each."""
        return StreamRows(self.rows, self.store, limit_n=limit_n, shuffle_buffer=self.shuffle_buffer)

    def __getitems__(self, keys: Sequence[StreamKey | RowKey]) -> Batch:
        """The batch of `keys`; those of a sampler are all of one chunk. Bare row keys cost a seek for each."""
        if isinstance(keys[0], StreamKey):
            self.store.hold(keys[0].chunk)
        return self.rows.__getitems__(keys)


def open_streams(source: str, *, cache_dir: str | None = None) -> dict[str, StreamSplit]:
    """Splits of `source` by name. Files that name no split are "train".

    Raises FileNotFoundError for a path that is not there, ValueError for what cannot be streamed, also for splits whose
    classes differ (`check_class_names`).
    """
    from datasets import load_dataset_builder

    path = Path(source).expanduser()
    kind = BUILDERS.get(path.suffix)
    if is_local(source) and not path.exists() and not ("*" in source and kind):
        raise FileNotFoundError(
            f"source='{source}' does not exist: give an existing folder, shards, or a hub id owner/name"
        )
    if "*" in source and kind and "://" not in source and not glob.glob(str(path), recursive=True):
        raise FileNotFoundError(
            f"source='{source}' matches no file: correct the pattern, whose * does not cross folders"
        )
    name, files = (kind, {"train": str(path)}) if kind else (str(path) if path.exists() else source, None)
    try:
        builder = load_dataset_builder(name, data_files=files, cache_dir=cache_dir)
    except Exception as error:
        raise ValueError(load_failure(source, error)) from error
    shards = builder.config.data_files
    try:
        tables = builder.as_streaming_dataset()
    except Exception as error:
        for first in [str(those[0]) for those in (shards or {}).values()]:  # one of them was looked into
            if countable(first):
                count_rows(first)  # names it if it is damaged
        raise ValueError(load_failure(source, error)) from error
    check_class_names(shards, source)
    return {
        str(split): StreamSplit(table, _shard_files(table, shards[split], source)) for split, table in tables.items()
    }


def count_stream_classes(split: StreamSplit, source: str, columns: Columns | None) -> int | None:
    """Classes of one value of `open_streams`; None if only its rows tell."""
    return count_described_classes(_undecoded(split.table, columns or {}).features, source, columns)


def open_stream_store(
    split: StreamSplit,
    source: str,
    *,
    shard_rows: int | Sequence[int] | None = None,
    columns: Columns | None = None,
    num_classes: int | None = None,
    class_names: list[str] | None = None,
    cache_dir: str | None = None,
) -> StreamStore:
    """Rows of one value of `open_streams`. `shard_rows`: of each shard or of all alike, where files do not tell.

    Raises ValueError as `known_rows` and `StreamStore` do.
    """
    counts = known_rows(split.files, shard_rows, source=source, cache_dir=cache_dir)
    return StreamStore(split, source, counts, columns=columns, num_classes=num_classes, class_names=class_names)


def _shard_files(table: IterableTable, files: Sequence[str], source: str) -> list[str]:
    files = [str(file) for file in files]
    if Path(files[0]).suffix.lower() in SUFFIXES:
        raise ValueError(f"'{source}' holds single images ('{files[0]}'), no shards: read it without streaming")
    if table.num_shards != len(files):
        return [f"{source}, shard {number}" for number in range(table.num_shards)]
    return files


def _undecoded(table: IterableTable, columns: Columns) -> IterableTable:
    """`table` with images as bytes, and with a column for every field that `columns` names as "column.field"."""
    table = table.decode(False)
    named = [name for value in columns.values() if value for name in ([value] if isinstance(value, str) else value)]
    features = table.features.copy()
    fields = {}
    for name in named:
        column, _, field = name.partition(".")
        if name not in features and isinstance(features.get(column), dict) and field in features[column]:
            fields[name], features[name] = (column, field), features[column][field]
    return table.map(partial(_add_fields, fields=fields), features=features) if fields else table


def _add_fields(row: dict[str, Any], fields: dict[str, tuple[str, str]]) -> dict[str, Any]:
    return {name: (row[column] or {}).get(field) for name, (column, field) in fields.items()}

"""Images of any source, centre-cropped: ImageNet from the hub or a folder, one's own pictures, parquet, tar shards.

Map-style by default: every row can be read at any time, so order and resume are exact (sampler.py). `streaming` reads
shards front to back instead, exactly too (streaming.py); `crop_cache` decodes and crops once (crop_cache.py). Worker
processes decode by the rules of decode.py, crop after ADM, and mirror training images with probability 1/2; the coin of
a row depends on (seed, epoch, row), so it is the same for any number of ranks and workers. Damaged rows: image_rows.py.
Out: uint8 (B,3,S,S), labels int64 (B,), captions where the set has them.
"""

from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from datamodules.base import BatchData, RowDataset
from datamodules.crop_cache import crop_key, open_crop_cache, write_crop_cache
from datamodules.folders import FileStore
from datamodules.image_rows import ImageRows, OnBad, report_scan, try_rows
from datamodules.shards import META, read_meta
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
from datamodules.streaming import StreamRows, open_stream_store, open_streams


class Classes(NamedTuple):
    """The classes of a split: their names, if they have any, and their number."""

    names: list[str] | None
    number: int


class ImageData(BatchData):
    """Rows of `source`: a hub id, a folder of images, a parquet or arrow file (or folder), or a `save_to_disk` folder.

    A folder holds one sub-folder per class, or images only (label 0), or images that its metadata.jsonl or metadata.csv
    lists, or such folders called train, val, ... `columns` maps image, label and caption to the names of the source;
    what it leaves out is guessed (rows.py), and {label: null} gives every row label 0. `num_classes` is found where it
    is left out. `val_split`: "auto" is the validation split if there is one; null is none; "val" and "validation" are
    the same. `exif=False` leaves photos as they are stored, as the papers do with ImageNet; `on_bad="error"` stops at
    the first row that cannot be used.

    `streaming` reads shards (parquet, arrow, tar) front to back, also from the hub: `shard_rows` states their rows
    where the files do not tell, and `shuffle_buffer` rows are shuffled at a time. `crop_cache` is a folder that keeps
    the cropped images, 3 S^2 bytes each: made by the first run, read by all others without the source. It keeps
    one caption per image.
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
        streaming: bool = False,
        shard_rows: int | list[int] | None = None,
        shuffle_buffer: int = 1000,
        crop_cache: str | None = None,
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
        if shard_rows is not None and not streaming:
            raise ValueError(f"shard_rows={shard_rows} is for streams: set streaming=true, or leave it out")
        if streaming and crop_cache is not None:
            raise ValueError("streaming and crop_cache exclude each other: a cache is made of rows that are at hand")
        self.source, self.split, self.val_split = source, split, val_split
        self.columns, self.flip, self.cache_dir = columns, flip, cache_dir
        self.exif, self.on_bad, self.num_classes = exif, on_bad, num_classes
        self.streaming, self.shard_rows, self.shuffle_buffer = streaming, shard_rows, shuffle_buffer
        self.crop_cache = None if crop_cache is None else Path(crop_cache).expanduser()

    def prepare_data(self) -> None:
        """Downloads a hub dataset or fills the crop cache; Lightning calls this in one process per node, before `setup`
        in all of them."""
        if self.crop_cache is not None:
            self._fill_cache()
        elif not self.streaming and not is_local(self.source):
            open_splits(self.source, cache_dir=self.cache_dir)

    def discover_classes(self) -> int | None:
        """The number of classes before `setup`, without listing or downloading images; None if only rows tell."""
        if self.num_classes is not None or self.streaming:  # a stream tells its classes by its rows
            return self.num_classes
        if cached := self._cached_splits():
            return read_meta(self.crop_cache / pick_split(cached, self.split, source=self.source))["num_classes"]
        if not is_local(self.source):
            return count_hub_classes(self.source, self.columns, cache_dir=self.cache_dir)
        splits = open_splits(self.source, cache_dir=self.cache_dir)
        return count_classes(
            splits[pick_split(list(splits), self.split, source=self.source)], self.source, self.columns
        )

    def make_datasets(self) -> tuple[RowDataset, RowDataset | None]:
        """Opens both splits. Raises ValueError if their classes differ or exceed `num_classes`, or if many are bad."""
        if self.crop_cache is not None:
            self._fill_cache()
            rows = self._open_cache()
        else:
            rows = self._open_streams() if self.streaming else [part for _, part in self._open_source()]
        return rows[0], rows[1] if len(rows) > 1 else None

    def _open_source(self) -> list[tuple[str, ImageRows]]:
        """Names and rows of the splits, readable in any order; the training split first."""
        splits = open_splits(self.source, cache_dir=self.cache_dir)
        names = self._split_names(list(splits))
        stores: list[FileStore | ArrowStore] = []
        for name in names:
            classes = stores[0].class_names if stores else None
            options = {"columns": self.columns, "num_classes": self.num_classes, "class_names": classes}
            stores.append(open_store(splits[name], self.source, **options))
        self._read_classes(stores)
        rows = [self._rows(store, training=i == 0) for i, store in enumerate(stores)]
        for part in rows:
            self._check(part)
        return list(zip(names, rows, strict=True))

    def _open_streams(self) -> list[StreamRows]:
        """Rows of each split that are read front to back; the training split first."""
        splits = open_streams(self.source, cache_dir=self.cache_dir)
        stores = []
        for i, name in enumerate(self._split_names(list(splits))):
            options = {"columns": self.columns, "num_classes": self.num_classes, "cache_dir": self.cache_dir}
            stated = self.shard_rows if i == 0 else None  # it speaks of the training shards
            stores.append(open_stream_store(splits[name], self.source, shard_rows=stated, **options))
        self._read_classes(stores)
        return [
            StreamRows(self._rows(store, training=i == 0), store, shuffle_buffer=self.shuffle_buffer)
            for i, store in enumerate(stores)
        ]

    def _cached_splits(self) -> list[str]:
        """Splits whose crop cache is complete. The training split is written last: where it is, all are."""
        folders = self.crop_cache.glob(f"*/{META}") if self.crop_cache else []
        return sorted(path.parent.name for path in folders)

    def _fill_cache(self) -> None:
        """Crops every image once, unless that is done; goes on where an interrupted run stopped."""
        if find_split(self._cached_splits(), self.split) is not None:
            return
        splits = self._open_source()
        info = {"class_names": self.class_names, "num_classes": self.num_classes}
        for name, rows in reversed(splits):
            rows.flip = rows.draw_caption = False  # what is random stays so: it is drawn when rows are read
            folder = self.crop_cache / name
            write_crop_cache(rows, folder, self._key(name), info=info, num_workers=self.num_workers)

    def _open_cache(self) -> list[RowDataset]:
        names = self._split_names(self._cached_splits())
        metas = [read_meta(self.crop_cache / name) for name in names]
        self._set_classes([Classes(meta["class_names"], meta["num_classes"]) for meta in metas])
        return [
            open_crop_cache(self.crop_cache / name, self._key(name), flip=self.flip and i == 0, seed=self.seed)
            for i, name in enumerate(names)
        ]

    def _key(self, split: str) -> dict[str, object]:
        return crop_key(self.source, split, self.image_size, columns=self.columns, exif=self.exif)

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

    def _read_classes(self, stores: list[FileStore | ArrowStore]) -> None:
        train = stores[0]
        if not train.labelled and "label" not in (self.columns or {}):
            there = f"among {list(train.column_names)}: every row gets label 0 (data.init_args.columns={{label: ...}})"
            rank_zero_info(f"'{self.source}' has no label column {there}")
        self._set_classes([Classes(store.class_names, store.num_classes) for store in stores])

    def _set_classes(self, classes: list[Classes]) -> None:
        train, val = classes[0], classes[-1]
        if val.names != train.names:
            differing = sorted(set(train.names or []) ^ set(val.names or []))[:3]
            raise ValueError(
                f"'{self.source}': classes of '{self.split}' and '{self.val_split}' differ (such as {differing}), so"
                " labels would not mean the same: make them equal, choose another val_split, or null for none"
            )
        found = train.number
        if self.num_classes is not None and found > self.num_classes:
            raise ValueError(f"'{self.source}' has {found} classes, more than num_classes={self.num_classes}: raise it")
        self.class_names = train.names
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

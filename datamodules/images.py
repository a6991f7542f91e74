"""Images of any source, centre-cropped: ImageNet from the hub or a folder, one's own pictures, parquet, tar shards.

Map-style by default: every row can be read at any time, so order and resume are exact (sampler.py). `streaming` reads
shards front to back instead, exactly too (streaming.py); `crop_cache` decodes and crops once (crop_cache.py). Worker
processes decode by the rules of decode.py, crop after ADM, and mirror training images with probability 1/2; the coin of
a row depends on (seed, epoch, row), so it is the same for any number of ranks and workers. Damaged rows: image_rows.py.
Out: uint8 (B,3,S,S), labels int64 (B,), captions where the set has them.
"""

from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from datamodules.base import BatchData, RowDataset, check_counts
from datamodules.crop_cache import crop_key, open_crop_cache, write_crop_cache
from datamodules.folders import FileStore
from datamodules.image_rows import ImageRows, OnBad, report_scan, try_rows
from datamodules.shard_files import META, check_kinds, read_meta
from datamodules.shards import ShardRows
from datamodules.sources import (
    ArrowStore,
    ArrowTable,
    chosen_splits,
    count_classes,
    count_hub_classes,
    find_split,
    is_local,
    open_splits,
    open_store,
    pick_split,
)
from datamodules.stream_counts import StatedRows, countable
from datamodules.streaming import (
    StreamRows,
    StreamSplit,
    StreamStore,
    count_stream_classes,
    open_stream_store,
    open_streams,
)

FIRST_ROWS = 8  # of a stream, read at the start
FIRST_BAD_SHARE = 0.5  # of them: so few say only whether columns and labels are right


class Classes(NamedTuple):
    """The classes of a split: their names, if they have any, and their number."""

    names: list[str] | None
    number: int


class ImageData(BatchData):
    """Rows of `source`: a hub id, a folder of images, a parquet or arrow file (or folder), or a `save_to_disk` folder.

    A folder holds one sub-folder per class, or images only (label 0), or images that its metadata.jsonl or metadata.csv
    lists, or such folders called train, val, ..., beside which nothing is read. `columns` maps image, label and caption
    to the names of the source; what it leaves out is guessed (rows.py), and {label: null} gives every row label 0.
    `num_classes` is found where it is left out. `val_split`: "auto" is the validation split if there is one; null is
    none; "val" and "validation" are the same. `exif=False` leaves photos as they are stored, as the papers do with
    ImageNet; `on_bad="error"` stops at the first row that cannot be used.

    `streaming` reads shards (parquet, arrow, tar) front to back, also from the hub: `shard_rows` states their rows
    where the files do not tell, one number if all have as many or a list, of the training split or {train: ...,
    validation: ...}; `shuffle_buffer` rows are shuffled at a time. `crop_cache` is a folder that keeps the cropped
    images, 3 S^2 bytes each: made by the first run, read by all others without the source, whatever has become of it.
    It keeps one caption per image.
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
        shard_rows: StatedRows | None = None,
        shuffle_buffer: int = 1000,
        crop_cache: str | None = None,
        num_workers: int = 8,
        cache_dir: str | None = None,
        limit_n: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(image_size, batch_size, num_workers=num_workers, seed=seed, limit_n=limit_n)
        check_counts(num_classes=num_classes)
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
        if self.crop_cache and self.crop_cache.exists() and not self.crop_cache.is_dir():
            raise ValueError(f"crop_cache='{crop_cache}' is a file: name a folder, which is made if there is none")

    def prepare_data(self) -> None:
        """Downloads a hub dataset or fills the crop cache; Lightning calls this in one process per node, before `setup`
        in all of them."""
        if self.crop_cache is not None:
            self._fill_cache()
        elif not self.streaming and not is_local(self.source):
            open_splits(self.source, cache_dir=self.cache_dir)

    def discover_classes(self) -> int | None:
        """The number of classes before `setup`, without listing or downloading images; None if only rows tell."""
        if self.num_classes is not None:
            return self.num_classes
        if (cached := find_split(self._cached_splits(), self.split)) is not None:
            return self._cached_meta(cached)["num_classes"]
        if not self.streaming and not is_local(self.source):
            return count_hub_classes(self.source, self.columns, cache_dir=self.cache_dir)
        splits = (open_streams if self.streaming else open_splits)(self.source, cache_dir=self.cache_dir)
        split = splits[pick_split(list(splits), self.split, source=self.source)]
        return (count_stream_classes if self.streaming else count_classes)(split, self.source, self.columns)

    def make_datasets(self) -> tuple[RowDataset, RowDataset | None]:
        """Opens both splits. Raises ValueError if their classes differ or exceed `num_classes`, or if many are bad."""
        if self.streaming:
            rows = self._open_streams()
        elif self.crop_cache is None:
            splits = open_splits(self.source, cache_dir=self.cache_dir)
            self._say_if_unvalidated(self._split_names(list(splits)))
            rows = [part for _, part in self._open_source(splits)]
        else:
            self._fill_cache()
            rows = self._open_cache()
        return rows[0], rows[1] if len(rows) > 1 else None

    def _open_source(self, splits: dict[str, Path | ArrowTable]) -> list[tuple[str, ImageRows]]:
        """Names and rows of those `splits` that are asked for, readable in any order; the training split first."""
        names = self._split_names(list(splits))
        stores: list[FileStore | ArrowStore] = []
        for name in names:
            classes = stores[0].class_names if stores else None
            options = {"columns": self.columns, "num_classes": self.num_classes, "class_names": classes}
            stores.append(open_store(splits[name], self.source, **options))
        self._read_classes(stores, names)
        rows = [self._rows(store, training=i == 0) for i, store in enumerate(stores)]
        for part in rows:
            self._check(part)
        return list(zip(names, rows, strict=True))

    def _open_streams(self) -> list[StreamRows]:
        """Rows of each split that are read front to back; the training split first."""
        splits = open_streams(self.source, cache_dir=self.cache_dir)
        stated = self._stated_rows(list(splits))
        names = self._split_names(list(splits))
        self._say_if_unvalidated(names)
        names = self._countable(splits, names, stated)
        stores = []
        for name in names:
            options = {"columns": self.columns, "num_classes": self.num_classes, "cache_dir": self.cache_dir}
            stores.append(open_stream_store(splits[name], self.source, shard_rows=stated.get(name), **options))
        self._read_classes(stores, names)
        rows = [self._rows(store, training=i == 0) for i, store in enumerate(stores)]
        for part in rows:
            self._check(part)
        return [
            StreamRows(part, store, shuffle_buffer=self.shuffle_buffer)
            for part, store in zip(rows, stores, strict=True)
        ]

    def _stated_rows(self, names: list[str]) -> dict[str, int | list[int]]:
        """What `shard_rows` states, by split."""
        if self.shard_rows is None:
            return {}
        if not isinstance(self.shard_rows, dict):
            return {pick_split(names, self.split, source=self.source): self.shard_rows}
        for name in self.shard_rows:
            if find_split(names, name) is None:
                raise ValueError(f"shard_rows names the split '{name}', but '{self.source}' has {names}: correct it")
        return {find_split(names, name): rows for name, rows in self.shard_rows.items()}

    def _countable(
        self, splits: dict[str, StreamSplit], names: list[str], stated: dict[str, int | list[int]]
    ) -> list[str]:
        """`names`, without the validation split if nobody asked for it and the rows of its shards are not known."""
        unknown = [name for name in names[1:] if name not in stated and not all(map(countable, splits[name].files))]
        if not unknown:
            return names
        cure = f"the rows of its shards are not known: state shard_rows={{{names[0]}: ..., {unknown[0]}: ...}}"
        if self.val_split != "auto":
            raise ValueError(f"'{self.source}' cannot be validated on '{unknown[0]}', {cure}, or set val_split=null")
        rank_zero_info(f"'{self.source}': training goes without its split '{unknown[0]}', {cure} to validate on it")
        return names[:1]

    def _cached_splits(self) -> list[str]:
        """Splits whose crop cache is complete."""
        folders = self.crop_cache.glob(f"*/{META}") if self.crop_cache else []
        return sorted(path.parent.name for path in folders)

    def _wanted_of_cache(self) -> list[str]:
        """The splits that are asked for, out of those that the source had when it was cached."""
        metas = [self._cached_meta(name) for name in self._cached_splits()]
        return self._split_names(sorted({str(name) for meta in metas for name in meta.get("splits", [meta["split"]])}))

    def _cached_meta(self, name: str) -> dict[str, Any]:
        """The description of a split's cache. Raises ValueError for one that lacks what every crop cache has."""
        meta = read_meta(self.crop_cache / name)
        kinds = {"split": str, "source": str, "num_classes": (int, type(None)), "class_names": (list, type(None))}
        check_kinds({"splits": []} | meta, kinds | {"splits": list}, self.crop_cache / name / META)
        return meta

    def _fill_cache(self) -> None:
        """Crops every image of the splits asked for once, the training split last, but for splits that are there; goes
        on where an interrupted run stopped."""
        cached = self._cached_splits()
        if cached and set(self._wanted_of_cache()) <= set(cached):
            return
        for name in cached:
            self._open_cached(name)  # before hours of work: it may be of another source or size
        splits = open_splits(self.source, cache_dir=self.cache_dir)
        for name, rows in reversed(self._open_source(splits)):
            if name not in cached:
                rows.flip = rows.draw_caption = False  # what is random stays so: it is drawn when rows are read
                info = self._info(rows.store) | {"splits": sorted(splits)}
                folder = self.crop_cache / name
                write_crop_cache(rows, folder, self._key(name), info=info, num_workers=self.num_workers)

    def _info(self, store: FileStore | ArrowStore) -> dict[str, object]:
        """Classes for the cache's meta.json, as the rows have them: `num_classes` may be another in the next run."""
        found = store.found_classes() if isinstance(store, ArrowStore) else store.num_classes
        return {"class_names": store.class_names, "num_classes": found}

    def _open_cached(self, name: str, *, flip: bool = False) -> ShardRows:
        return open_crop_cache(self.crop_cache / name, self._key(name), flip=flip, seed=self.seed)

    def _open_cache(self) -> list[RowDataset]:
        names = self._wanted_of_cache()
        self._say_if_unvalidated(names)
        rows = [self._open_cached(name, flip=self.flip and i == 0) for i, name in enumerate(names)]
        metas = [part.shards.meta for part in rows]
        self._set_classes([Classes(meta["class_names"], meta["num_classes"]) for meta in metas], names)
        held = " and ".join(f"{len(part):,} images of '{name}'" for name, part in zip(names, rows, strict=True))
        made = f"{metas[0]['num_classes']} classes, made from '{metas[0]['source']}'"
        rank_zero_info(f"crop cache '{self.crop_cache}': {held}, {made}")
        return rows

    def _key(self, split: str) -> dict[str, object]:
        return crop_key(self.source, split, self.image_size, columns=self.columns, exif=self.exif)

    def _split_names(self, names: list[str]) -> list[str]:
        return chosen_splits(names, self.split, self.val_split, source=self.source)

    def _say_if_unvalidated(self, names: list[str]) -> None:
        if len(names) == 1 and self.val_split == "auto":
            rank_zero_info(f"'{self.source}' has no validation split: training goes without (data.init_args.val_split)")

    def _read_classes(self, stores: list[FileStore | ArrowStore], names: list[str]) -> None:
        train = stores[0]
        if not train.labelled and "label" not in (self.columns or {}):
            there = f"among {list(train.column_names)}: every row gets label 0 (data.init_args.columns={{label: ...}})"
            rank_zero_info(f"'{self.source}' has no label column {there}")
        self._set_classes([Classes(store.class_names, store.num_classes) for store in stores], names)

    def _set_classes(self, classes: list[Classes], names: list[str]) -> None:
        train, val = classes[0], classes[-1]
        if val.names != train.names:
            differing = sorted(set(train.names or []) ^ set(val.names or []))[:3]
            raise ValueError(
                f"'{self.source}': classes of '{names[0]}' and '{names[-1]}' differ (such as {differing}), so"
                " labels would not mean the same: make them equal, choose another val_split, or null for none"
            )
        found = train.number
        if self.num_classes is not None and found > self.num_classes:
            raise ValueError(f"'{self.source}' has {found} classes, more than num_classes={self.num_classes}: raise it")
        self.class_names = train.names
        self.num_classes = found if self.num_classes is None else self.num_classes
        if val.number > self.num_classes:
            raise ValueError(
                f"'{self.source}': '{names[-1]}' has {val.number} classes, more than the {self.num_classes} of"
                f" '{names[0]}': set num_classes={val.number}, another val_split, or null for none"
            )

    def _rows(self, store: FileStore | ArrowStore, *, training: bool) -> ImageRows:
        return ImageRows(
            store,
            self.image_size,
            num_classes=self.num_classes,
            flip=self.flip and training,
            seed=self.seed,
            exif=self.exif,
            on_bad=self.on_bad,
            limit_bad=self.streaming,
            draw_caption=training,
            need_caption=self.need_caption,
        )

    def _check(self, rows: ImageRows) -> None:
        if not len(rows):
            raise ValueError(f"'{self.source}' has a split without rows: choose another split or val_split")
        if isinstance(rows.store, StreamStore):
            try_rows(rows, rows.store.hold_first(FIRST_ROWS), share=FIRST_BAD_SHARE)
            rows.store.forget()
            return
        if isinstance(rows.store, FileStore):
            report_scan(rows.store, on_bad=self.on_bad)
        try_rows(rows)

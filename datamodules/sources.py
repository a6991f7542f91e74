"""Where images come from: a folder, parquet, arrow or `save_to_disk` files, or a dataset of the Hugging Face hub.

`open_splits(source)` gives the splits of a source by name and `open_store` the rows of one split. A store returns
undecoded rows, so that only worker processes pay for decoding and an error can name the row. Folders (folders.py,
metadata.py) need no `datasets`. Every error is one line: the offending value, what there is instead, the cure.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from datamodules.folders import FileStore, FolderStore, Scan, count_class_folders, list_images, subfolders
from datamodules.metadata import MetadataStore, count_listed_classes, find_metadata
from datamodules.rows import Columns, RawRow, as_caption, class_names_of, find_columns, label_id, missing_column

ArrowTable = Any  # datasets.Dataset: the library is imported inside functions only
Features = Any  # datasets.Features
TABLE_SUFFIXES = (".parquet", ".arrow")
SPLIT_NAMES = {  # a split and the other names that folders and hub sets give it
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}


class ArrowStore:
    """Rows of one split of an HF `datasets` table. `columns` maps our names (image, label, caption) to the table's.

    A name that it does not mention is guessed (rows.py). Labels are integers, names, or a ClassLabel; without such a
    column all are 0, unless `num_classes` says that there are several. `class_names` fixes the labels of names (for a
    validation split). Raises ValueError for a column that is not there.
    """

    def __init__(
        self,
        table: ArrowTable,
        source: str,
        *,
        columns: Columns | None = None,
        num_classes: int | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        import datasets

        self.source, self.column_names = source, table.column_names
        self.names = table_columns(table.features, columns or {}, source=source)
        self.labelled, self.captioned = "label" in self.names, "caption" in self.names
        if not self.labelled and "label" not in (columns or {}) and num_classes not in (None, 1):
            raise ValueError(missing_column("label", "label", table.column_names, source=source))
        image = self.names["image"][0]
        if isinstance(table.features[image], datasets.Image):
            table = table.cast_column(image, datasets.Image(decode=False))
        theirs = [name for names in self.names.values() for name in names]
        self.table = table.select_columns(list(dict.fromkeys(theirs))).with_format(None)
        self.class_names, self.num_classes = self._classes(num_classes, class_names)
        self._ids = {name: label for label, name in enumerate(self.class_names or [])}

    def _classes(self, num_classes: int | None, names: list[str] | None) -> tuple[list[str] | None, int]:
        if not self.labelled:
            return None, 1
        from datasets import ClassLabel

        column = self.names["label"][0]
        feature = self.table.features[column]
        if isinstance(feature, ClassLabel):  # values are integers, names go with the table
            return list(feature.names), len(feature.names)
        is_text = getattr(feature, "dtype", None) in ("string", "large_string")
        if names is not None and is_text:
            return names, len(names)
        if num_classes is not None and not is_text:
            return None, num_classes
        return class_names_of(self.table.unique(column), column=f"column '{column}' of '{self.source}'")

    def found_classes(self) -> int:
        """Classes that the rows have, whatever number was stated."""
        return self._classes(None, self.class_names)[1]

    def __len__(self) -> int:
        return len(self.table)

    def fetch(self, indices: Sequence[int]) -> list[RawRow]:
        """Undecoded rows of `indices`, in that order. Raises ValueError for a value of the wrong type."""
        columns = self.table[list(indices)]
        rows = []
        for position, index in enumerate(indices):
            values = {name: column[position] for name, column in columns.items()}
            rows.append(self._raw_row(values, f"row {index} of '{self.source}'"))
        return rows

    def _raw_row(self, values: dict[str, Any], name: str) -> RawRow:
        image = values[self.names["image"][0]]
        if isinstance(image, dict):  # an undecoded Image feature
            image = image.get("bytes") or image.get("path")
        image = b"" if image is None else image  # not decodable, like a damaged one
        label = values[self.names["label"][0]] if self.labelled else 0
        for value, kinds, ours in ((image, bytes | str, "image"), (label, int | str | None, "label")):
            if not isinstance(value, kinds):
                column = self.names[ours][0]
                raise ValueError(f"{name}: column '{column}' holds {value!r:.60}, which is no {ours}")
        caption = None
        if self.captioned:
            captions = self.names["caption"]
            caption = as_caption([values[column] for column in captions], name=f"{name}: column '{captions[0]}'")
        return RawRow(image, label_id(label, self._ids, column=f"'{self.source}'"), caption, name)


def open_splits(source: str, *, cache_dir: str | None = None) -> dict[str, Path | ArrowTable]:
    """Splits of `source` by name: folders of images or tables. Files and folders that name no split are "train".

    Raises FileNotFoundError for a path that is not there, ValueError for a hub id that cannot be read.
    """
    path = Path(source).expanduser()
    if path.suffix == ".tar" and not path.is_dir():
        raise ValueError(f"source='{source}' names tars: set streaming=true (--data.init_args.streaming=true)")
    if path.is_file() and path.suffix not in TABLE_SUFFIXES:
        raise ValueError(f"source='{source}' is no folder and no {' or '.join(TABLE_SUFFIXES)} file")
    if path.is_file():
        return _load_hub_or_files(path.suffix[1:], cache_dir=cache_dir, file=str(path))
    if path.is_dir():
        return _open_folder(path, cache_dir=cache_dir)
    if is_local(source):
        raise FileNotFoundError(
            f"source='{source}' does not exist: give an existing folder, a file, or a hub id owner/name"
        )
    return _load_hub_or_files(source, cache_dir=cache_dir)


def open_store(
    split: Path | ArrowTable,
    source: str,
    *,
    columns: Columns | None = None,
    num_classes: int | None = None,
    class_names: list[str] | None = None,
) -> FileStore | ArrowStore:
    """Rows of one value of `open_splits`. `class_names`: of the training split, which fixes the labels of names."""
    if not isinstance(split, Path):
        return ArrowStore(split, source, columns=columns, num_classes=num_classes, class_names=class_names)
    if metadata := find_metadata(split):
        return MetadataStore(metadata, class_names=class_names, columns=columns)
    return FolderStore(split, class_names=class_names, columns=columns)


def count_classes(split: Path | ArrowTable, source: str, columns: Columns | None) -> int:
    """Classes of one value of `open_splits`, without listing its images."""
    if not isinstance(split, Path):
        return ArrowStore(split, source, columns=columns).num_classes
    if metadata := find_metadata(split):
        return count_listed_classes(metadata, columns)
    return 1 if "label" in (columns or {}) else count_class_folders(split)


def count_hub_classes(source: str, columns: Columns | None, *, cache_dir: str | None = None) -> int | None:
    """Classes of a hub dataset by its description, without downloading it; None if only its rows tell."""
    from datasets import load_dataset_builder

    try:
        features = load_dataset_builder(source, cache_dir=cache_dir).info.features
    except Exception as error:
        raise ValueError(load_failure(source, error)) from error
    return count_described_classes(features, source, columns) if features else None


def count_described_classes(features: Features, source: str, columns: Columns | None) -> int | None:
    """Classes by the description of the columns: 1 without a label column, None if only the rows tell."""
    label = table_columns(features, columns or {}, source=source).get("label")
    return len(getattr(features[label[0]], "names", [])) or None if label else 1


def table_columns(features: Features, columns: Columns, *, source: str) -> dict[str, list[str]]:
    """Our column names -> those of a table with these features. Raises ValueError as `find_columns` does."""
    import datasets

    kinds = {
        "image": [name for name, feature in features.items() if isinstance(feature, datasets.Image)],
        "label": [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)],
    }
    return find_columns(list(features), columns, source=source, kinds=kinds)


def find_split(names: Sequence[str], wanted: str) -> str | None:
    """The name in `names` that means `wanted` (val is validation, Val is val, ...), if one does."""
    same = next((group for group in SPLIT_NAMES.values() if wanted.lower() in group), ())
    there = {name.lower(): name for name in names} | {name: name for name in names}
    return next((there[name] for name in (wanted, wanted.lower(), *same) if name in there), None)


def pick_split(names: Sequence[str], wanted: str, *, source: str) -> str:
    """As `find_split`. Raises ValueError if there is none."""
    if (found := find_split(names, wanted)) is not None:
        return found
    cure = "set split or val_split to one of them, or val_split to null to train without validation"
    raise ValueError(f"'{source}' has no split '{wanted}': it has {sorted(names)}; {cure}")


def chosen_splits(names: Sequence[str], split: str, val_split: str | None, *, source: str) -> list[str]:
    """The training split and, unless there is none, the validation split; "auto": that of the source, if it has one."""
    train = pick_split(names, split, source=source)
    if val_split is None:
        return [train]
    if val_split != "auto":
        return [train, pick_split(names, val_split, source=source)]
    found = find_split([name for name in names if name != train], "validation")
    return [train] if found is None else [train, found]


def is_local(source: str) -> bool:
    """Whether `source` can only be a path, or is one that exists: a hub id is "name" or "owner/name"."""
    path = Path(source).expanduser()
    looks_local = path.is_absolute() or source.startswith(".") or source.endswith("/") or source.count("/") > 1
    return looks_local or path.suffix in TABLE_SUFFIXES or path.exists()


def _open_folder(path: Path, *, cache_dir: str | None) -> dict[str, Path | ArrowTable]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        from datasets import DatasetDict, load_from_disk

        try:
            saved = load_from_disk(str(path))
        except Exception as error:
            raise ValueError(load_failure(str(path), error)) from error
        return dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}
    folders = subfolders(path)
    known = {name for group in SPLIT_NAMES.values() for name in group}
    splits = [name for name in folders if name.lower() in known]
    # A class may be called "test": folders are splits only if all are named so, or if "train" is among them.
    if splits and (splits == folders or "train" in [name.lower() for name in splits]):
        if metadata := find_metadata(path):
            raise ValueError(f"'{metadata}' lies beside folders of splits {folders}: put one into each of them")
        _warn_of_others(path, folders, splits)
        if any(_holds_only_tables(path / name) for name in splits):
            return _load_hub_or_files(str(path), cache_dir=cache_dir)
        return {name: path / name for name in splits}
    if any(next(path.glob(f"{depth}*{suffix}"), None) for depth in ("", "*/") for suffix in TABLE_SUFFIXES):
        return _load_hub_or_files(str(path), cache_dir=cache_dir)
    return {"train": path}


def _warn_of_others(path: Path, folders: list[str], splits: list[str]) -> None:
    images = [Path(image).name for image in list_images(path, Scan(), deep=False)]
    if others := [name for name in folders if name not in splits] + images:
        rank_zero_warn(
            f"'{path}' is read as folders of splits {splits}. {len(others)} other folders and images beside them are"
            f" not read, such as {others[:3]}: if one of the splits is a class, rename it"
        )


def _holds_only_tables(path: Path) -> bool:
    return not subfolders(path) and any(next(path.glob(f"*{suffix}"), None) for suffix in TABLE_SUFFIXES)


def _load_hub_or_files(name: str, *, cache_dir: str | None, file: str | None = None) -> dict[str, ArrowTable]:
    from datasets import load_dataset, load_dataset_builder

    files = None if file is None else {"train": file}
    try:
        splits = dict(load_dataset(name, data_files=files, cache_dir=cache_dir))
        local = load_dataset_builder(name, cache_dir=cache_dir).config.data_files if Path(name).is_dir() else None
    except Exception as error:
        raise ValueError(load_failure(file or name, error)) from error
    check_class_names(local or {}, name)
    return splits


def check_class_names(files: Mapping[str, Sequence[str]], source: str) -> None:
    """Raises ValueError if local parquet or arrow files of two splits name the classes differently.

    `datasets` would read all of them by the names of one, so that labels change their meaning. Only the first file of
    each split is looked at, and only its schema; files of the same split are taken to agree.
    """
    firsts = {str(split): str(those[0]) for split, those in files.items()}
    local = {split: file for split, file in firsts.items() if "://" not in file and file.endswith(TABLE_SUFFIXES)}
    for (one, names), (other, others) in pairwise((split, _names_in(file)) for split, file in local.items()):
        for column in [column for column in names if others.get(column, names[column]) != names[column]]:
            differing = [pair for pair in zip(names[column], others[column], strict=False) if len(set(pair)) > 1]
            raise ValueError(
                f"'{source}': the classes of column '{column}' differ between '{one}' and '{other}'"
                f" ({len(names[column])} and {len(others[column])} names, such as {differing[:1]}): make them equal, or"
                " give the file of one split as source"
            )


def _names_in(file: str) -> dict[str, list[str]]:
    """Names of the classes by column, as the schema of a parquet or arrow file has them."""
    import pyarrow as pa
    from datasets import ClassLabel, Features
    from pyarrow.parquet import read_schema

    try:
        if file.endswith(".parquet"):
            schema = read_schema(file)
        else:
            with pa.memory_map(file) as opened:
                schema = _arrow_schema(opened)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"'{file}' cannot be read ({error}): replace it if it is damaged") from error
    features = Features.from_arrow_schema(schema)
    return {name: list(feature.names) for name, feature in features.items() if isinstance(feature, ClassLabel)}


def _arrow_schema(opened: Any) -> Any:
    import pyarrow as pa

    try:
        return pa.ipc.open_stream(opened).schema
    except pa.ArrowInvalid:  # the other of the two layouts
        return pa.ipc.open_file(opened).schema


def load_failure(source: str, error: Exception) -> str:
    """One line for what `load_dataset` raised, judged by its text: the classes differ between library versions."""
    text = str(error).strip().split("\n")[0]
    if "gated" in text:
        cure = "accept its terms on its hub page, then log in with `hf auth login` or set HF_TOKEN"
        return f"source='{source}' is a gated dataset: {cure}"
    if isinstance(error, ConnectionError) or "OfflineMode" in text:
        cure = "check the path, or the network, HF_HUB_OFFLINE and HF_ENDPOINT"
        return f"source='{source}' is no local path, and the hub cannot be reached: {cure} ({text})"
    if "exist on the Hub" in text:
        return f"source='{source}' is no local path and no dataset that the hub shows you: check the name and HF_TOKEN"
    return f"source='{source}' cannot be loaded: {type(error).__name__}: {text}"

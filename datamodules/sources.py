"""Where images come from: a folder, parquet, arrow or `save_to_disk` files, or a dataset of the Hugging Face hub.

`open_splits(source)` gives the splits of a source by name and `open_store` the rows of one split. A store returns
undecoded rows, so that only worker processes pay for decoding and an error can name the row. Folders are scanned here
and need no `datasets`. Every error is one line: the offending value, what there is instead, the cure.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ArrowTable = Any  # datasets.Dataset: the library is imported inside functions only
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TABLE_SUFFIXES = (".parquet", ".arrow")
SPLIT_NAMES = {  # a split and the other names that folders and hub sets give it
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}


class RawRow(NamedTuple):
    """An undecoded row. `data`: encoded image bytes or the path of an image file. `name` is for error messages."""

    data: bytes | str
    label: int
    caption: str | None
    name: str


class FolderStore:
    """Images below `root`: a sub-folder per class, labels in sorted order of names; or a flat folder, all of label 0.

    Files without an image suffix and hidden names are left out. `class_names` fixes the labels (for a validation
    folder); None for a flat folder. Raises FileNotFoundError without images, ValueError for mixed, empty or unknown
    class folders.
    """

    def __init__(self, root: Path, *, class_names: list[str] | None = None) -> None:
        self.root = root
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
        flat = sorted(entry.name for entry in os.scandir(root) if entry.is_file() and _is_image(entry.name))
        files = {name: _images_below(root, name) for name in folders}
        if not flat and not any(files.values()):
            raise FileNotFoundError(f"folder '{root}' holds no images: expected files {' '.join(IMAGE_SUFFIXES)}")
        if flat and folders:
            raise ValueError(
                f"folder '{root}' holds both images ('{flat[0]}') and folders ('{folders[0]}'): keep one of the two"
            )
        self.class_names = None if flat else class_names or folders
        for name in folders:
            if not files[name]:
                raise ValueError(f"class folder '{root / name}' holds no images: fill it or remove it")
            if name not in self.class_names:
                raise ValueError(
                    f"class folder '{root / name}' is none of the {len(self.class_names)} training classes: rename it"
                )
        paths = flat or [path for name in folders for path in files[name]]
        # One array of bytes instead of a million str objects: forked workers then share it, since no reference counts
        # are written into its pages.
        self.paths = np.array([os.fsencode(path) for path in paths])
        labels = [self.class_names.index(name) for name in folders]
        self.labels = np.repeat(labels, [len(files[name]) for name in folders]) if folders else np.zeros(len(flat), int)
        self.num_classes = len(self.class_names) if self.class_names else 1

    def __len__(self) -> int:
        return len(self.paths)

    def fetch(self, indices: Sequence[int]) -> list[RawRow]:
        """Undecoded rows of `indices`, in that order."""
        files = [str(self.root / os.fsdecode(self.paths[i])) for i in indices]
        return [
            RawRow(file, int(self.labels[i]), None, f"file '{file}'") for file, i in zip(files, indices, strict=True)
        ]


class ArrowStore:
    """Rows of one split of an HF `datasets` table. `columns` maps our names (image, label, caption) to the table's.

    Label and caption columns are optional: with `num_classes=1` a table without labels gives label 0; captions are
    there if `columns` names them or the table has a column "caption". Raises ValueError for a column that is not
    there.
    """

    def __init__(
        self,
        table: ArrowTable,
        source: str,
        *,
        columns: Mapping[str, str] | None = None,
        num_classes: int | None = None,
    ) -> None:
        import datasets

        self.source = source
        names = _column_names(table.column_names, columns or {}, source=source, unlabelled=num_classes == 1)
        if isinstance(table.features[names["image"]], datasets.Image):
            table = table.cast_column(names["image"], datasets.Image(decode=False))
        self.names = names
        self.table = table.select_columns(list(dict.fromkeys(names.values()))).with_format(None)
        feature = table.features[names["label"]] if "label" in names else None
        self.class_names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
        self.num_classes = len(self.class_names) if self.class_names else num_classes

    def __len__(self) -> int:
        return len(self.table)

    def fetch(self, indices: Sequence[int]) -> list[RawRow]:
        """Undecoded rows of `indices`, in that order. Raises ValueError for a value of the wrong type."""
        columns = self.table[list(indices)]
        rows = []
        for position, index in enumerate(indices):
            values = {ours: columns[theirs][position] for ours, theirs in self.names.items()}
            rows.append(self._raw_row(values, f"row {index} of '{self.source}'"))
        return rows

    def _raw_row(self, values: dict[str, Any], name: str) -> RawRow:
        image, label, caption = values["image"], values.get("label", 0), values.get("caption", "")
        if isinstance(image, dict):  # an undecoded Image feature
            image = image.get("bytes") or image.get("path")
        kinds = {"image": (image, (bytes, str)), "label": (label, int), "caption": (caption, str)}
        for column in [column for column in self.names if not isinstance(*kinds[column])]:
            value = f"{kinds[column][0]!r:.60}"
            raise ValueError(f"{name}: column '{self.names[column]}' holds {value}, which is no {column}")
        return RawRow(image, label, caption if "caption" in self.names else None, name)


def open_splits(source: str, *, cache_dir: str | None = None) -> dict[str, Path | ArrowTable]:
    """Splits of `source` by name: folders of images or tables. Files and folders that name no split are "train".

    Raises FileNotFoundError for a path that is not there, ValueError for a hub id that cannot be read.
    """
    path = Path(source).expanduser()
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
    columns: Mapping[str, str] | None = None,
    num_classes: int | None = None,
    class_names: list[str] | None = None,
) -> FolderStore | ArrowStore:
    """Rows of one value of `open_splits`. `class_names`: of the training split, which fixes a folder's labels."""
    if isinstance(split, Path):
        if columns:
            raise ValueError(f"columns={columns} is for tables: '{source}' is a folder of images, which has none")
        return FolderStore(split, class_names=class_names)
    return ArrowStore(split, source, columns=columns, num_classes=num_classes)


def pick_split(names: Sequence[str], wanted: str, *, source: str) -> str:
    """The name in `names` that means `wanted` (val is validation, ...). Raises ValueError if none does."""
    same = next((group for group in SPLIT_NAMES.values() if wanted in group), (wanted,))
    for name in (wanted, *same):
        if name in names:
            return name
    cure = "set split or val_split to one of them, or val_split to null to train without validation"
    raise ValueError(f"'{source}' has no split '{wanted}': it has {sorted(names)}; {cure}")


def is_local(source: str) -> bool:
    """Whether `source` can only be a path, or is one that exists: a hub id is "name" or "owner/name"."""
    path = Path(source).expanduser()
    looks_local = path.is_absolute() or source.startswith(".") or source.endswith("/") or source.count("/") > 1
    return looks_local or path.suffix in TABLE_SUFFIXES or path.exists()


def _open_folder(path: Path, *, cache_dir: str | None) -> dict[str, Path | ArrowTable]:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        from datasets import DatasetDict, load_from_disk

        saved = load_from_disk(str(path))
        return dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}
    folders = {entry.name: entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    known = {name for group in SPLIT_NAMES.values() for name in group}
    # A class may be called "test": folders are splits only if all are named so, or if "train" is among them.
    if folders and ("train" in folders or set(folders) <= known):
        return {name: folder for name, folder in folders.items() if name in known}
    if any(next(path.glob(f"{depth}*{suffix}"), None) for depth in ("", "*/") for suffix in TABLE_SUFFIXES):
        return _load_hub_or_files(str(path), cache_dir=cache_dir)
    return {"train": path}


def _load_hub_or_files(name: str, *, cache_dir: str | None, file: str | None = None) -> dict[str, ArrowTable]:
    from datasets import load_dataset

    try:
        return dict(load_dataset(name, data_files=None if file is None else {"train": file}, cache_dir=cache_dir))
    except Exception as error:
        raise ValueError(_load_failure(file or name, error)) from error


def _load_failure(source: str, error: Exception) -> str:
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


def _column_names(there: list[str], columns: Mapping[str, str], *, source: str, unlabelled: bool) -> dict[str, str]:
    """Our column names -> the table's, for the columns that rows are to have."""
    ours = ("image", "label", "caption")
    if unknown := set(columns) - set(ours):
        raise ValueError(f"columns names {sorted(unknown)}, but rows have only {list(ours)}: columns={{ours: theirs}}")
    names = {}
    for name in ours:
        theirs = columns.get(name, name)
        if theirs in there:
            names[name] = theirs
        elif name in columns or not (name == "caption" or (name == "label" and unlabelled)):
            cure = f"map it with columns={{{name}: ...}}"
            cure += " or, without labels, set num_classes=1" if name == "label" else ""
            raise ValueError(f"'{source}' has no column '{theirs}' for {name}: it has {there}; {cure}")
    return names


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def _images_below(root: Path, folder: str) -> list[str]:
    """Image files at any depth below `root/folder`, relative to `root`, sorted."""
    found = []
    head = len(os.path.join(root, ""))
    for where, _, names in os.walk(root / folder, followlinks=True):
        found += [os.path.join(where, name)[head:] for name in names if _is_image(name)]
    return sorted(found)

"""Images in folders: a sub-folder per class, or images only. A folder with a metadata file: metadata.py.

A scan lists every file once, in sorted order. What is no image by its name is passed over and counted; image files that
are empty, broken links or no regular files are left out and named. Folders and files whose name starts with "." or
"__MACOSX" are not looked at, and links back to a folder above are not followed. Whether a file's content is an image
shows when it is read (images.py): opening a million files here would take minutes.
"""

import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datamodules.decode import SUFFIXES
from datamodules.rows import Columns, RawRow, as_caption


@dataclass
class Scan:
    """What the scan of a folder met apart from images."""

    passed_over: Counter[str] = field(default_factory=Counter)  # suffix, or name without one -> files
    unusable: dict[str, str] = field(default_factory=dict)  # path of an image file -> why it is left out


class Strings:
    """Strings in one buffer: forked workers share it, since no reference counts are written into its pages."""

    def __init__(self, values: Sequence[str]) -> None:
        encoded = [value.encode("utf-8", "surrogatepass") for value in values]  # a file name may be any bytes
        self.buffer = b"".join(encoded)
        self.ends = np.cumsum([len(value) for value in encoded], dtype=np.int64)  # (N,)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return self.buffer[start : self.ends[index]].decode("utf-8", "surrogatepass")


class FileStore:
    """Rows whose images are files below `root`. `scan` tells what the folder holds besides."""

    root: Path
    scan: Scan
    paths: Strings  # relative to root
    labels: np.ndarray  # (N,)
    class_names: list[str] | None
    num_classes: int
    labelled: bool  # False: nothing in the source gives labels, so that all are 0
    captioned: bool  # whether rows have captions
    column_names: Sequence[str] = ()  # where the source has columns

    def __len__(self) -> int:
        return len(self.paths)

    def fetch(self, indices: Sequence[int]) -> list[RawRow]:
        """Undecoded rows of `indices`, in that order."""
        files = [os.path.join(self.root, self.paths[i]) for i in indices]
        return [
            RawRow(file, int(self.labels[i]), self.caption(i), f"file {file!r}")
            for file, i in zip(files, indices, strict=True)
        ]

    def caption(self, index: int) -> str | list[str] | None:
        """As in `RawRow`."""
        return None


class FolderStore(FileStore):
    """Images below `root`: a sub-folder per class, labels in sorted order of names; or a flat folder, all of label 0.

    `class_names` fixes the labels (for a validation folder). `columns={"label": None}` ignores the folders,
    `columns={"caption": ".txt"}` reads captions from the file a.txt beside a.png, one in a line.
    Raises FileNotFoundError without images, ValueError for mixed, empty or unknown class folders.
    """

    def __init__(self, root: Path, *, class_names: list[str] | None = None, columns: Columns | None = None) -> None:
        self.root, self.scan, self.labelled = root, Scan(), True
        self.caption_suffix = _caption_suffix(columns or {}, root)
        self.captioned = self.caption_suffix is not None
        if columns and "label" in columns:
            by_class, flat = {}, list_images(root, self.scan)
        else:
            by_class = {name: list_images(root / name, self.scan) for name in subfolders(root)}
            flat = list_images(root, self.scan, deep=False)
        self._check(flat, by_class)
        self.scan.passed_over.pop(self.caption_suffix, None)  # these are used
        by_class = {} if flat else by_class
        self.class_names = (class_names or list(by_class)) if by_class else None
        self.num_classes = len(self.class_names) if by_class else 1
        self.labels = self._labels(by_class) if by_class else np.zeros(len(flat), np.int64)
        self.paths = _relative(flat or [path for paths in by_class.values() for path in paths], root)

    def _check(self, flat: list[str], by_class: dict[str, list[str]]) -> None:
        filled = [name for name, paths in by_class.items() if paths]
        if not flat and not filled:
            raise no_images(self.root, self.scan)
        if flat and filled:
            first = os.path.basename(flat[0])
            raise ValueError(
                f"folder '{self.root}' holds both images ('{first}') and folders ('{filled[0]}'): keep one of the two"
            )
        for name in by_class:
            if not flat and not by_class[name]:
                raise ValueError(f"class folder '{self.root / name}' holds no images: fill it or remove it")

    def _labels(self, by_class: dict[str, list[str]]) -> np.ndarray:
        for name in by_class:
            if name not in self.class_names:
                raise ValueError(
                    f"class folder '{self.root / name}' is none of the {len(self.class_names)} training classes: "
                    "rename it"
                )
        ids = {name: label for label, name in enumerate(self.class_names)}
        return np.repeat([ids[name] for name in by_class], [len(paths) for paths in by_class.values()])

    def caption(self, index: int) -> str | list[str] | None:
        """The lines of the text file beside the image; "" where there is none."""
        if self.caption_suffix is None:
            return None
        path = (self.root / self.paths[index]).with_suffix(self.caption_suffix)
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines() if path.is_file() else []
        return as_caption(lines, name=f"file {str(path)!r}")


def count_class_folders(root: Path) -> int:
    """Classes of a folder, from its own entries alone: 1 for a flat one. Raises FileNotFoundError for an empty one."""
    scan = Scan()
    if list_images(root, scan, deep=False):
        return 1
    if not (folders := subfolders(root)):
        raise no_images(root, scan)
    return len(folders)


def no_images(root: Path, scan: Scan) -> FileNotFoundError:
    """The error for a folder without images. What it holds instead tells the cure."""
    text = f"folder '{root}' holds no images: expected files {' '.join(SUFFIXES)}"
    for path, why in list(scan.unusable.items())[:1]:
        text += f", and {path!r} is not usable: {why}"
    below = (os.path.join(folder, name) for folder, _, names in os.walk(root) for name in sorted(names))
    shard = next((path for path in below if path.endswith((".tar", ".parquet", ".arrow"))), "")
    if shard.endswith(".tar"):
        text += f"; it holds '{shard}', so set streaming=true (--data.init_args.streaming=true)"
    elif shard:
        text += f"; tables are looked for one folder deep only, so set source to a folder nearer to '{shard}'"
    return FileNotFoundError(text)


def subfolders(root: Path) -> list[str]:
    """Names of the folders in `root` that may be classes, sorted."""
    above = _identities_above(root)
    entries = [entry for entry in _entries(root) if _is_folder(entry)]
    return sorted(entry.name for entry in entries if _identity(entry.path) not in above)


def list_images(top: Path, scan: Scan, *, deep: bool = True) -> list[str]:
    """Paths of the image files in `top`, and at any depth below it if `deep`, sorted; `scan` gets everything else.

    Raises ValueError for a folder that cannot be listed.
    """
    found = []
    todo = [(str(top), _identities_above(top))]
    while todo:
        where, above = todo.pop()
        for entry in _entries(where):
            if _is_folder(entry):
                inside = _identity(entry.path)
                if deep and inside not in above:  # else a link that leads back up: following it would never end
                    todo.append((entry.path, above | {inside}))
            elif not entry.name.lower().endswith(SUFFIXES):
                scan.passed_over[os.path.splitext(entry.name)[1].lower() or entry.name] += 1
            elif why := unusable(entry.path):
                scan.unusable[entry.path] = why
            else:
                found.append(entry.path)
    return sorted(found)


def unusable(path: str) -> str:
    """Why a file cannot hold an image, seen without opening it; "" if it may."""
    try:
        status = os.stat(path)
    except OSError as error:
        return "broken link" if os.path.islink(path) else error.strerror
    except ValueError as error:  # a zero byte, half a character
        return f"no name of a file ({error})"
    if not stat.S_ISREG(status.st_mode):
        return "no regular file"
    return "" if status.st_size else "empty"


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith((".", "__MACOSX"))]
    except OSError as error:
        raise ValueError(
            f"folder {str(folder)!r} cannot be listed ({error.strerror}): allow reading or remove it"
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # A link that leads to itself makes entry.is_dir() raise; os.path.isdir says no.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _identities_above(folder: Path) -> frozenset[tuple[int, int]]:
    """Of `folder` and all folders that hold it."""
    real = folder.resolve()
    return frozenset(_identity(path) for path in (real, *real.parents))


def _relative(paths: Sequence[str], root: Path) -> Strings:
    head = len(os.path.join(root, ""))
    return Strings([path[head:] for path in paths])


def _caption_suffix(columns: Columns, root: Path) -> str | None:
    """The suffix of caption files, if `columns` names one. Raises ValueError for what only a table can have."""
    suffix = columns.get("caption")
    known = set(columns) <= {"label", "caption"} and columns.get("label") is None
    if not known or not (suffix is None or (isinstance(suffix, str) and suffix.startswith("."))):
        raise ValueError(
            f"columns={dict(columns)} is for tables: '{root}' is a folder of images without metadata.jsonl or"
            " metadata.csv, which takes {label: null} and {caption: .txt} only"
        )
    return suffix

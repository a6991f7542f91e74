"""A folder whose metadata.jsonl or metadata.csv lists its images, with captions and labels (the hub's "imagefolder").

A line has `file_name`, relative to the file's folder, and columns of any name: {"file_name": "a/0.png", "text": "a
cat"}. Rows are the lines in their order. Lines whose image is missing or empty are left out and named by the scan;
images that no line names are counted.
"""

import csv
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.folders import FileStore, Scan, Strings, list_images, unusable
from datamodules.rows import Columns, as_caption, class_names_of, find_columns, label_id

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
IMAGE_COLUMN = "file_name"

SEPARATOR = "\0"
Line = dict[str, Any]


class MetadataStore(FileStore):
    """Rows of the metadata file `file`. `columns` maps label and caption to its columns, as in a table.

    Labels are integers or names; without a label column all are 0. `class_names` fixes the labels of names (for a
    validation folder). Raises FileNotFoundError if no image that is listed is there, ValueError for a line that is no
    row.
    """

    def __init__(self, file: Path, *, class_names: list[str] | None = None, columns: Columns | None = None) -> None:
        self.root, self.scan = file.parent, Scan()
        lines = read_lines(file)
        self.column_names = _column_names(lines)
        names = _columns_of(file, lines, columns)
        self.labelled, self.captioned = "label" in names, "caption" in names
        self.class_names, self.num_classes = class_names, len(class_names or [])
        if not class_names:
            self.class_names, self.num_classes = _classes(file, lines, names)
        lines = self._usable(file, lines)
        self.paths = Strings([line[IMAGE_COLUMN] for line in lines])
        self.labels = self._read_labels(file, lines, names) if self.labelled else np.zeros(len(lines), np.int64)
        # several captions of a row are one string here, since NUL is in no text
        captions = [SEPARATOR.join(_captions(line, names["caption"], file)) for line in lines if self.captioned]
        self.captions = Strings(captions)

    def _read_labels(self, file: Path, lines: list[Line], names: dict[str, list[str]]) -> np.ndarray:
        ids = {name: label for label, name in enumerate(self.class_names or [])}
        values = _labels(lines, names, as_names=bool(ids))
        return np.array([label_id(value, ids, column=f"'{file}'") for value in values], np.int64)

    def caption(self, index: int) -> str | list[str] | None:
        """The captions of the line."""
        return as_caption(self.captions[index].split(SEPARATOR), name="") if self.captioned else None

    def _usable(self, file: Path, lines: list[Line]) -> list[Line]:
        """The lines whose image is there."""
        paths = [os.path.normpath(os.path.join(self.root, line[IMAGE_COLUMN])) for line in lines]
        self.scan.unusable = {path: why for path in paths if (why := unusable(path))}
        if unlisted := set(list_images(self.root, Scan())) - set(paths):
            self.scan.passed_over[f"images not in {file.name}"] = len(unlisted)
        usable = [line for line, path in zip(lines, paths, strict=True) if path not in self.scan.unusable]
        if not usable:
            raise FileNotFoundError(f"'{file}' lists no image that is there: {IMAGE_COLUMN} is relative to its folder")
        return usable


def find_metadata(root: Path) -> Path | None:
    """The metadata file of a folder, if it has one."""
    return next((root / name for name in METADATA_FILES if (root / name).is_file()), None)


def count_listed_classes(file: Path, columns: Columns | None) -> int:
    """Classes that a metadata file names, without looking at its images."""
    lines = read_lines(file)
    return _classes(file, lines, _columns_of(file, lines, columns))[1]


def read_lines(file: Path) -> list[Line]:
    """The lines of a metadata file. Raises ValueError, naming the line, for one without a file name."""
    with file.open(encoding="utf-8-sig", newline="") as text:
        try:
            lines = list(csv.DictReader(text)) if file.suffix == ".csv" else _json_lines(text)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"'{file}' cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or not isinstance(line.get(IMAGE_COLUMN), str) or not line[IMAGE_COLUMN]:
            raise ValueError(
                f"row {number} of '{file}' is {line!r:.80}: each needs a {IMAGE_COLUMN}, or call the file otherwise"
            )
    return lines


def _json_lines(text: Iterable[str]) -> list[Line]:
    return [json.loads(line) for line in text if line.strip()]


def _columns_of(file: Path, lines: list[Line], columns: Columns | None) -> dict[str, list[str]]:
    return find_columns(_column_names(lines), {"image": IMAGE_COLUMN} | dict(columns or {}), source=str(file))


def _column_names(lines: list[Line]) -> list[str]:
    names = dict.fromkeys(name for line in lines for name in line)
    return [name for name in names if name is not None]  # None: what a CSV line has beyond the last column


def _classes(file: Path, lines: list[Line], names: dict[str, list[str]]) -> tuple[list[str] | None, int]:
    """Names and number of the classes; one class if no column gives labels."""
    if "label" not in names:
        return None, 1
    return class_names_of(_labels(lines, names, as_names=False), column=f"column '{names['label'][0]}' of '{file}'")


def _labels(lines: list[Line], names: dict[str, list[str]], *, as_names: bool) -> list[Any]:
    """Values of the label column, None where it is empty. Where all are digits they are integers: CSV has only text."""
    values = [line.get(names["label"][0]) for line in lines]
    values = [None if value == "" else value for value in values]
    if as_names or not all(value is None or (isinstance(value, str) and value.isdecimal()) for value in values):
        return values
    return [None if value is None else int(value) for value in values]


def _captions(line: Line, columns: list[str], file: Path) -> list[str]:
    caption = as_caption([line.get(name) for name in columns], name=f"'{file}', {line[IMAGE_COLUMN]!r}: its caption")
    return [caption] if isinstance(caption, str) else caption

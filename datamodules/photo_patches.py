"""Patches of 15 photos that ship inside scikit-image and scikit-learn: natural statistics without a download.

A row is a crop of S x S pixels at a random place of one photo, not scaled; its class is the photo. The left 80 % of
each photo train and the right 20 % validate (the right S columns where 20 % are fewer). Batches: uint8 (B,3,S,S), grey
repeated to RGB; labels int64 (B,). Sky, wall and margins make a twelfth of the patches of 32 pixels nearly flat
(deviation below 2 in each channel), and an eighth of those that validate.

Licences, from the docstrings of `skimage.data` and scikit-learn's README. CC0: camera (Lav Varshney), brick and gravel
(CC0Textures), grass (linolafett, DeviantArt), chelsea (Stefan van der Walt), coffee (Rachel Michetti), retina (Mikael
Häggström) and cell (Müller et al. 2018). Public domain: astronaut and hubble (NASA), rocket (SpaceX), clock (Stefan van
der Walt). No known restrictions: coins (Brooklyn Museum). CC BY 2.0: china ("Some rights reserved by danielbuechele",
Flickr) and flower (the same by "vultilion"), to be named where they are shown. Images without a licence there (moon,
page, motorcycle) and those that are no photos (logo, text) are left out.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from datamodules.base import Batch, BatchData, RowDataset, check_counts
from datamodules.sampler import RowKey, coin, hash64
from datamodules.transforms import flip_horizontal, to_uint8_chw

PHOTOS = {  # class -> folder of the package, file; read as files, because skimage.data may download
    "astronaut": ("skimage/data", "astronaut.png"),
    "brick": ("skimage/data", "brick.png"),
    "camera": ("skimage/data", "camera.png"),
    "cell": ("skimage/data", "cell.png"),
    "chelsea": ("skimage/data", "chelsea.png"),
    "china": ("sklearn/datasets/images", "china.jpg"),
    "clock": ("skimage/data", "clock_motion.png"),
    "coffee": ("skimage/data", "coffee.png"),
    "coins": ("skimage/data", "coins.png"),
    "flower": ("sklearn/datasets/images", "flower.jpg"),
    "grass": ("skimage/data", "grass.png"),
    "gravel": ("skimage/data", "gravel.png"),
    "hubble": ("skimage/data", "hubble_deep_field.jpg"),
    "retina": ("skimage/data", "retina.jpg"),
    "rocket": ("skimage/data", "rocket.jpg"),
}
MAX_SIZE = 128  # the smallest photo is 384 pixels wide: two thirds remain for training
PLACE = 1  # salt that parts the draw of a place from the coin of a flip


class PatchRows(RowDataset):
    """`length` crops of side `size`: row i shows photo i mod the number of photos, each uint8 (3, H, W).

    Where is a pure function of (seed, row) and, if `redraw`, of the epoch; so is the coin of a flip.
    """

    def __init__(
        self,
        photos: Sequence[Tensor],
        size: int,
        length: int,
        *,
        seed: int,
        by_photo: bool = True,
        redraw: bool = False,
        flip: bool = False,
    ) -> None:
        self.photos, self.size, self.length, self.seed = photos, size, length, seed
        self.by_photo, self.redraw, self.flip = by_photo, redraw, flip

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, keys: Sequence[RowKey]) -> Batch:
        photos = [key.index % len(self.photos) for key in keys]
        return {
            "image": torch.stack([self._patch(key) for key in keys]),  # (B, 3, S, S)
            "label": torch.tensor(photos if self.by_photo else [0] * len(keys)),  # (B,)
        }

    def _patch(self, key: RowKey) -> Tensor:
        photo = self.photos[key.index % len(self.photos)]
        key = key if self.redraw else RowKey(0, key.index)
        top, left = (
            hash64(self.seed, key.epoch, key.index, PLACE, axis) % (side - self.size + 1)
            for axis, side in enumerate(photo.shape[1:])
        )
        patch = photo[:, top : top + self.size, left : left + self.size]  # (3, S, S)
        return flip_horizontal(patch, self.flip and coin(self.seed, key))


class PhotoPatchesData(BatchData):
    """Crops of side `image_size` (at most 128): `length` in an epoch, new ones in each, and `val_length` fixed ones.

    `label_by` "image" makes 15 classes, one per photo; "none" makes one class, for unconditional models. `flip` mirrors
    half of the training patches. Raises ValueError for other values, and if a photo is not installed.
    """

    def __init__(
        self,
        image_size: int = 32,
        batch_size: int = 64,
        *,
        length: int = 20_000,
        val_length: int = 1_500,
        flip: bool = True,
        label_by: Literal["image", "none"] = "image",
        num_workers: int = 0,
        seed: int = 0,
        limit_n: int | None = None,
    ) -> None:
        super().__init__(image_size, batch_size, num_workers=num_workers, seed=seed, limit_n=limit_n)
        if image_size > MAX_SIZE:
            raise ValueError(f"image_size={image_size} leaves too little of the small photos: use at most {MAX_SIZE}")
        check_counts(length=length, val_length=val_length)
        if label_by not in ("image", "none"):
            raise ValueError(f"label_by={label_by!r} is unknown: use 'image' (15 classes) or 'none' (one)")
        self.length, self.val_length, self.flip, self.label_by = length, val_length, flip, label_by
        self.class_names = list(PHOTOS) if label_by == "image" else ["photo"]
        self.num_classes = len(self.class_names)

    def make_datasets(self) -> tuple[RowDataset, RowDataset]:
        """Returns the training rows and the validation rows."""
        parts = [split_columns(load_photo(name), self.image_size) for name in PHOTOS]
        train, val = zip(*parts, strict=True)
        by_photo = self.label_by == "image"
        return (
            PatchRows(
                train, self.image_size, self.length, seed=self.seed, by_photo=by_photo, redraw=True, flip=self.flip
            ),
            PatchRows(val, self.image_size, self.val_length, seed=self.seed, by_photo=by_photo),
        )


def load_photo(name: str) -> Tensor:
    """The photo of class `name`, uint8 (3, H, W). Raises ValueError if its package does not hold it."""
    folder, file = PHOTOS[name]
    package, _, inside = folder.partition("/")
    spec = find_spec(package)  # finds the folder without importing the package
    path = None if spec is None else Path(spec.submodule_search_locations[0], inside, file)
    if path is None or not path.exists():
        raise ValueError(f"photo_patches needs {folder}/{file}, which is not installed: pip install '.[data]'")
    with Image.open(path) as image:
        return to_uint8_chw(image.convert("RGB"))


def split_columns(photo: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Left and right part of a photo (3, H, W): the right one has W // 5 columns, and at least `size`."""
    width = photo.shape[2]
    cut = width - max(width // 5, size)
    return photo[:, :, :cut], photo[:, :, cut:]

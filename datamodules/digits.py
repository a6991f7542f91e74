"""Handwritten digits that ship inside scikit-learn: the real, class-conditional set of the first runs; works offline.

1,797 grey 8 x 8 images with values 0..16 of 10 classes (UCI, Alpaydin and Kaynak 1998). As uint8 round(v 255 / 16),
grey repeated to RGB, enlarged by whole factors without interpolation. Rows with index mod 5 == 4 validate (359), the
other 1,438 train. Digits are never flipped: a mirrored 2 is no digit. Batches carry captions such as "the digit
seven".
"""

import numpy as np
import torch
from torch import Tensor

from datamodules.base import BatchData, RowDataset, TensorRows

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SIDE = 8  # pixels of the stored images


class DigitsData(BatchData):
    """Digits at `image_size` 8, 16, 32, ... Raises ValueError when it is no multiple of 8."""

    def __init__(
        self,
        image_size: int = 16,
        batch_size: int = 128,
        *,
        num_workers: int = 0,
        seed: int = 0,
        limit_n: int | None = None,
    ) -> None:
        super().__init__(image_size, batch_size, num_workers=num_workers, seed=seed, limit_n=limit_n)
        if image_size % SIDE:
            raise ValueError(f"image_size={image_size} is no multiple of {SIDE}: use 8, 16, 32 or 64")
        self.num_classes = len(NAMES)
        self.class_names = list(NAMES)

    def make_datasets(self) -> tuple[RowDataset, RowDataset]:
        """Returns 1,438 training and 359 validation rows."""
        images, labels = load_digits_uint8(self.image_size)
        val = torch.arange(len(images)) % 5 == 4
        captions = [f"the digit {name}" for name in NAMES]
        return (
            TensorRows(images[~val], labels[~val], captions=captions),
            TensorRows(images[val], labels[val], captions=captions),
        )


def load_digits_uint8(image_size: int) -> tuple[Tensor, Tensor]:
    """Returns all digits as uint8 (1797, 3, image_size, image_size) and labels int64 (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * 255 / 16).astype(np.uint8)  # (N, 8, 8)
    factor = image_size // SIDE
    images = torch.from_numpy(grey).repeat_interleave(factor, 1).repeat_interleave(factor, 2)  # (N, H, W)
    return images[:, None].repeat(1, 3, 1, 1), torch.from_numpy(digits.target.astype(np.int64))  # (N, 3, H, W)

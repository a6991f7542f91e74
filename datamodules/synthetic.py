"""Seeded fake rows, for tests, smoke runs and benchmarks.

Row i depends only on (seed, i): label i mod `num_classes`, image = a colour of its class plus uniform noise. A model
can so learn something in a few steps, and no file, network or decoder is involved. Validation rows continue the
numbering, so they differ from the training rows. Images uint8 (N,3,H,W) are held in memory; captions are "class 3".
"""

import torch
from torch import Tensor

from datamodules.base import BatchData, RowDataset, TensorRows
from datamodules.sampler import hash64

NOISE = 32  # largest distance of a pixel from the colour of its class, in grey levels


class SyntheticData(BatchData):
    """`length` training and `val_length` validation rows. Raises ValueError for counts below 1."""

    def __init__(
        self,
        image_size: int = 32,
        batch_size: int = 16,
        *,
        num_classes: int = 10,
        length: int = 64,
        val_length: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        limit_n: int | None = None,
    ) -> None:
        super().__init__(image_size, batch_size, num_workers=num_workers, seed=seed, limit_n=limit_n)
        for name, value in (("num_classes", num_classes), ("length", length), ("val_length", val_length)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.num_classes = num_classes
        self.class_names = [f"class {c}" for c in range(num_classes)]
        self.length, self.val_length = length, val_length

    def make_datasets(self) -> tuple[RowDataset, RowDataset]:
        """Returns the training rows 0..length-1 and the validation rows that follow them."""
        train, val = range(self.length), range(self.length, self.length + self.val_length)
        return self._rows(train), self._rows(val)

    def _rows(self, indices: range) -> TensorRows:
        labels = torch.tensor([i % self.num_classes for i in indices])
        images = torch.empty(len(indices), 3, self.image_size, self.image_size, dtype=torch.uint8)
        for row, (i, label) in enumerate(zip(indices, labels.tolist(), strict=True)):
            images[row] = fake_image(self.image_size, label, seed=hash64(self.seed, i) >> 1)
        return TensorRows(images, labels, captions=self.class_names)


def fake_image(size: int, label: int, *, seed: int) -> Tensor:
    """uint8 (3, size, size): the colour of class `label`, the same for every seed, plus noise drawn from `seed`."""
    colour = torch.tensor([NOISE + hash64(label, channel) % (256 - 2 * NOISE) for channel in range(3)])
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(-NOISE, NOISE + 1, (3, size, size), generator=generator)
    return (colour[:, None, None] + noise).to(torch.uint8)

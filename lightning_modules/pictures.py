"""Pictures for people: grids of uint8 images, as arrays and PNG files, and which rows of a set are shown."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor


def make_grid(images: Tensor, *, columns: int, pad: int = 2) -> Tensor:
    """uint8 (B, 3, H, W) -> one uint8 (3, H', W'), row by row on white; a last row that is not full stays white."""
    missing = -len(images) % columns
    images = torch.cat([images, images.new_full((missing, *images.shape[1:]), 255)])
    framed = torch.nn.functional.pad(images, (0, pad, 0, pad), value=255)
    grid = rearrange(framed, "(r k) c h w -> c (r h) (k w)", k=columns)
    return torch.nn.functional.pad(grid, (pad, 0, pad, 0), value=255)


def enlarge(image: Tensor, *, smallest: int = 48, size: int = 0) -> Tensor:
    """Repeat pixels so that an image (or cells of side `size` in a grid) is at least `smallest` pixels wide."""
    factor = max(1, -(-smallest // (size or image.shape[-1])))
    return image.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def save_png(image: Tensor, path: str | Path) -> None:
    """uint8 (3, H, W) -> PNG file; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rearrange(image.cpu(), "c h w -> h w c").contiguous().numpy()).save(path)


def labels_in_turn(labels: list[int], count: int) -> Tensor:
    """`count` labels, going round `labels`: int64 (count,)."""
    return torch.tensor(labels, dtype=torch.int64).repeat(-(-count // len(labels)))[:count]


def rows_to_show(datamodule: Any) -> Any:
    """The validation rows of a data module, the training rows where it has none."""
    return datamodule.train_set if datamodule.val_set is None else datamodule.val_set


def spread_rows(rows: Any, count: int) -> Iterator[dict[str, Any]]:
    """`count` rows of a dataset at even distances, all if it has fewer, each a batch of one."""
    size = len(rows)
    for i in range(min(count, size)):
        yield rows[i * size // min(count, size)]

"""Editing: some tokens of an image are drawn anew, the others stay as they are and are seen by what is drawn.

Inpainting (a hole), outpainting (all but a part) and regeneration under another class are this one thing with different
masks. Methods that can start from known tokens inherit `Editable` and write `redraw`. In: uint8 images, a mask of
pixels. Out: float images, outside the mask the given ones.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.random import Generators
from layers.tokenizers.base import Tokenizer, from_uint8
from lightning_modules.base import eval_mode


class Editable(nn.Module):
    """What `edit` needs of a module: `tokenizer`, `sampling`, `device`, `checked_labels`, `redraw`."""

    tokenizer: Tokenizer

    def redraw(self, x: Tensor, unknown: Tensor, labels: Tensor, sampling: Any, generator: Generators) -> Tensor:
        """Tokens x (B, L, ...) with those drawn anew where `unknown` (B, L) is True, as many in each image.

        Raises ValueError where the model cannot start from known tokens.
        """
        raise NotImplementedError

    @torch.no_grad()
    def edit(
        self,
        images: Tensor,
        mask: Tensor,
        labels: Tensor | Sequence[int],
        sampling: Any = None,
        generator: Generators = None,
    ) -> Tensor:
        """uint8 images (B, 3, H, W), mask bool (H, W) or (B, H, W), True: draw anew -> float images (B, 3, H, W).

        A token is drawn anew if any of its pixels is masked; pixels outside the mask come back as they were.
        `sampling` and `generator` as in `sample`. Raises ValueError for sizes that are not the model's, a mask that
        marks nothing, a label that is no class, and models that cannot start from known tokens.
        """
        labels = self.checked_labels(labels).to(self.device)
        images, mask = images.to(self.device), mask.to(self.device)
        check_sizes(images, mask, len(labels), self.tokenizer.image_size)
        mask = mask.expand(len(images), *mask.shape[-2:])
        unknown = unknown_tokens(mask, self.tokenizer.grid)
        with eval_mode(self):
            x = self.tokenizer({"image": images}, generator).x
            for rows in groups(unknown.sum(1)):
                own = [generator[i] for i in rows.tolist()] if isinstance(generator, Sequence) else generator
                x[rows] = self.redraw(x[rows], unknown[rows], labels[rows], sampling or self.sampling, own).to(x.dtype)
            drawn = self.tokenizer.decode(x).float()
        return torch.where(mask[:, None], drawn, from_uint8(images))


def check_sizes(images: Tensor, mask: Tensor, count: int, side: int) -> None:
    """Raise ValueError unless images are uint8 (count, 3, side, side), and each mask bool, of that size, not empty."""
    if images.dtype != torch.uint8 or images.shape != (count, 3, side, side):
        raise ValueError(
            f"images are {images.dtype} {tuple(images.shape)}: this model edits uint8 {(count, 3, side, side)}, one "
            f"image per label; resize them to {side}x{side}"
        )
    if mask.dtype != torch.bool or mask.shape not in {(side, side), (count, side, side)}:
        raise ValueError(
            f"the mask is {mask.dtype} {tuple(mask.shape)}: give bool {(side, side)}, or one per image "
            f"{(count, side, side)}, True where pixels are to be drawn anew"
        )
    if not mask.flatten(-2).any(-1).all():
        raise ValueError("the mask marks nothing: make white (True) what is to be drawn anew")


def unknown_tokens(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Masked pixels (B, H, W) -> tokens that hold one, bool (B, h*w) in raster order."""
    cells = mask.shape[-2] // grid[0], mask.shape[-1] // grid[1]
    return F.max_pool2d(mask[:, None].float(), cells).flatten(1) > 0


def groups(counts: Tensor) -> list[Tensor]:
    """Rows of equal counts (B,), which can be drawn together: int64 indices."""
    return [(counts == count).nonzero()[:, 0] for count in counts.unique()]


def partition(orders: Tensor, last: Tensor) -> Tensor:
    """Orders (B, L) of positions with those where `last` (B, L) is True at the end; both parts keep their order."""
    return orders.gather(1, last.gather(1, orders).to(torch.uint8).argsort(dim=1, stable=True))

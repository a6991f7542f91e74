"""Sequences of text and image tokens in either order: places, positions and masks (JetFormer, Tschannen et al., arXiv
2411.19722; official `models/proj/jetformer/jetformer.py`, embed_image_and_text).

`BOS, text, BOI, image` or `BOI, image, BOS, text`, each row of a batch in its own. Unusual: a masked id stays in its
place, but nothing sees it and it takes no position. In: lengths, bool (B,) of the order, bool (B, L) of what is there.
Out: indices and masks; pure functions.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from layers.gather import take


class Inputs(NamedTuple):
    """What the blocks read. valid: where a token is (None: everywhere). prefix: as many places at the beginning, which
    all see each other (None: nothing sees what comes later)."""

    x: Tensor  # (B, L, E)
    valid: Tensor | None  # (B, L), bool
    prefix: Tensor | None  # (B,)

    def without_last(self) -> Self:
        """The last token is no input: nothing is predicted from it."""
        valid = None if self.valid is None else self.valid[:, :-1]
        return self._replace(x=self.x[:, :-1], valid=valid)

    def positions(self) -> Tensor:
        """Number of each token among the valid ones (B or 1, L)."""
        if self.valid is None:
            return torch.arange(self.x.shape[1], device=self.x.device)[None]
        return self.valid.cumsum(1) - 1

    def mask(self) -> Tensor | None:
        """See `attention_mask`; None where a place simply sees itself and those before it."""
        if self.valid is None and self.prefix is None:
            return None
        valid = self.x.new_ones(self.x.shape[:2], dtype=torch.bool) if self.valid is None else self.valid
        return attention_mask(valid, self.prefix)


def input_order(text_first: Tensor, *, text_len: int, image_len: int) -> Tensor:
    """Which of [BOS, BOI, text, image] stands at each place: (B, 2 + text_len + image_len), int64; text_first (B,)."""
    places = torch.arange(2 + text_len + image_len, device=text_first.device)
    bos, boi, text, image = places.split([1, 1, text_len, image_len])
    return torch.where(text_first[:, None], torch.cat([bos, text, boi, image]), torch.cat([boi, image, bos, text]))


def output_places(text_first: Tensor, *, text_len: int, text_tables: int, image_len: int) -> tuple[Tensor, Tensor]:
    """Places from which image tokens (B, N) and ids (B, T) are predicted: the one before each. `text_len` is T.

    An id is predicted before the first table's copy of it, the only one that does not know it yet.
    """
    image_start = torch.where(text_first, text_tables * text_len + 1, 0)
    text_start = torch.where(text_first, 0, image_len + 1)
    lengths = (image_len, text_len)
    image, text = (torch.arange(length, device=text_first.device) for length in lengths)
    return image_start[:, None] + image, text_start[:, None] + text


def attention_mask(valid: Tensor, prefix: Tensor | None = None) -> Tensor:
    """Who sees whom (B, L, L), [query, key]: valid keys (B, L) that are not later, or that lie in the prefix (B,)."""
    places = torch.arange(valid.shape[1], device=valid.device)
    seen = (places[:, None] >= places)[None]
    if prefix is not None:
        seen = seen | (places < prefix[:, None])[:, None]
    return seen & valid[:, None]


def right_aligned(x: Tensor, valid: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Valid tokens moved to the end, in their order: x (B, L, E), valid (B, L) and mask (B, L, L) after it.

    All rows then end at one place, so that what is decoded next is at one place too. What is not valid becomes zero and
    sees nothing. Official `right_align`.
    """
    order = valid.to(torch.uint8).argsort(dim=1, stable=True)
    x, valid, mask = take(x, order), valid.gather(1, order), take(take(mask, order).mT, order).mT
    return x * valid[..., None], valid, mask & valid[..., None]

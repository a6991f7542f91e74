"""Texts of one length: ids with what may be attended to and what is learnt, as JetFormer has them; special ids.

Source: big_vision, configs/proj/jetformer/jetformer_image_text.py (`tokenize`, special tokens) and
jetformer_imagenet2012.py. A text is its ids and one EOS, cut at `max_len`: of a longer one only the beginning stays,
and no EOS, so that the model can tell a text that goes on from one that ended. An empty text is the EOS alone.

| ignore_pad | filled up with | text_mask: attended to | text_loss: learnt | BOI |
|---|---|---|---|---|
| False (released) | EOS | everything | everything | an id of its own |
| True | PAD | the words | the words and EOS | the EOS id, whose place it takes |
"""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from layers.text.base import TextTokenizer


class TextBatch(TypedDict):
    """Texts of one length T."""

    text: Tensor  # int64 (B, T)
    text_mask: Tensor  # bool (B, T)
    text_loss: Tensor  # bool (B, T)


class SpecialIds(NamedTuple):
    """Ids that no text has, and the size of an embedding table that holds all."""

    bos: int  # before a text
    boi: int  # before an image
    nolabel: int  # instead of a text that is dropped
    size: int


def special_ids(vocab_size: int, *, eos_id: int | None = None) -> SpecialIds:
    """Special ids after a vocabulary, or after as many classes. `eos_id` is given where it serves as BOI (ignore_pad).

    32,000 ids: (32000, 32001, 32002, 32003), with eos_id=1 (32000, 1, 32001, 32002).
    """
    if eos_id is None:
        return SpecialIds(vocab_size, vocab_size + 1, vocab_size + 2, vocab_size + 3)
    return SpecialIds(vocab_size, eos_id, vocab_size + 1, vocab_size + 2)


def encode_batch(
    captions: Sequence[str], tokenizer: TextTokenizer, *, max_len: int, ignore_pad: bool = False
) -> TextBatch:
    """B captions -> ids and masks (B, max_len) by the table above. Raises ValueError for a `max_len` below 1."""
    if max_len < 1:
        raise ValueError(f"text max_len={max_len} must be at least 1")
    words = [tokenizer.encode(caption)[:max_len] for caption in captions]
    pad = tokenizer.pad_id if ignore_pad else tokenizer.eos_id
    filled = [(ids + [tokenizer.eos_id] + [pad] * (max_len - len(ids)))[:max_len] for ids in words]
    # by way of numpy: torch.tensor takes 25 times as long for nested lists
    text = torch.from_numpy(np.array(filled, dtype=np.int64).reshape(len(words), max_len))
    if not ignore_pad:
        return {"text": text, "text_mask": _all(text), "text_loss": _all(text)}
    place = torch.arange(max_len)
    lengths = torch.tensor([len(ids) for ids in words], dtype=torch.int64)[:, None]  # (B, 1)
    return {"text": text, "text_mask": place < lengths, "text_loss": place <= lengths}


def label_batch(labels: Tensor) -> TextBatch:
    """Class labels (B,) as texts of one token (B, 1), all of it attended to and learnt."""
    text = labels[:, None].long()
    return {"text": text, "text_mask": _all(text), "text_loss": _all(text)}


def decode_batch(text: Tensor, tokenizer: TextTokenizer) -> list[str]:
    """Ids (B, T) -> B texts, each up to its EOS."""
    return [tokenizer.decode(ids) for ids in text.tolist()]


def _all(text: Tensor) -> Tensor:
    return torch.ones_like(text, dtype=torch.bool)

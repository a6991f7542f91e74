"""Texts of one length: both forms of JetFormer, long and empty captions, labels as texts, special ids."""

import pytest
import torch

from layers.text.base import TextTokenizer
from layers.text.batches import SpecialIds, decode_batch, encode_batch, label_batch, special_ids
from layers.text.byte import ByteTokenizer
from tests.golden_cases import Golden, case_id, golden_paths

A, B, C = (2 + ord(letter) for letter in "abc")


class Numbers(TextTokenizer):
    """Texts such as "5 17 8", which are their ids."""

    def init_args(self):
        return {}

    def _encode(self, text):
        return [int(word) for word in text.split()]

    def _decode(self, ids):
        return " ".join(map(str, ids))


def test_the_released_form_learns_and_attends_to_everything():
    batch = encode_batch(["AbC", "a", "", "abca", "abcab"], ByteTokenizer(), max_len=4)
    assert batch["text"].tolist() == [[A, B, C, 1], [A, 1, 1, 1], [1, 1, 1, 1], [A, B, C, A], [A, B, C, A]]
    assert batch["text"].dtype == torch.int64
    for name in ("text_mask", "text_loss"):
        assert batch[name].dtype == torch.bool and batch[name].shape == (5, 4) and batch[name].all()


def test_ignoring_padding_attends_to_words_and_learns_the_end():
    batch = encode_batch(["abc", "a", "", "abca", "abcab"], ByteTokenizer(), max_len=4, ignore_pad=True)
    assert batch["text"].tolist() == [[A, B, C, 1], [A, 1, 0, 0], [1, 0, 0, 0], [A, B, C, A], [A, B, C, A]]
    assert batch["text_mask"].int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1] * 4, [1] * 4]
    assert batch["text_loss"].int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1] * 4, [1] * 4]
    assert batch["text_mask"].dtype == batch["text_loss"].dtype == torch.bool


@pytest.mark.parametrize("path", golden_paths("jetformer", "**/loss_text_*.safetensors"), ids=case_id)
def test_masks_are_those_of_the_official_batches(path):
    golden = Golden(path, partial=True)
    text, mask, loss = (golden[f"in/{name}"] for name in ("text", "text_mask", "text_loss"))
    captions = [" ".join(map(str, row[on.bool()].tolist())) for row, on in zip(text, mask, strict=True)]
    batch = encode_batch(captions, Numbers(100, lower=True), max_len=text.shape[1], ignore_pad=True)
    assert torch.equal(batch["text"], text.long())
    assert torch.equal(batch["text_mask"], mask.bool()) and torch.equal(batch["text_loss"], loss.bool())


@pytest.mark.parametrize("ignore_pad", [False, True])
def test_batches_decode_to_the_beginning_of_each_caption(ignore_pad):
    captions = ["a red ring", "", "x" * 40, "ring"]
    text = encode_batch(captions, ByteTokenizer(), max_len=12, ignore_pad=ignore_pad)["text"]
    assert decode_batch(text, ByteTokenizer()) == ["a red ring", "", "x" * 12, "ring"]


@pytest.mark.parametrize("ignore_pad", [False, True])
def test_no_captions_and_no_length(ignore_pad):
    empty = encode_batch([], ByteTokenizer(), max_len=3, ignore_pad=ignore_pad)
    assert all(tensor.shape == (0, 3) for tensor in empty.values())
    with pytest.raises(ValueError, match="max_len=0 must be at least 1"):
        encode_batch(["a"], ByteTokenizer(), max_len=0, ignore_pad=ignore_pad)


def test_labels_are_texts_of_one_token():
    batch = label_batch(torch.tensor([3, 0], dtype=torch.int32))
    assert batch["text"].tolist() == [[3], [0]] and batch["text"].dtype == torch.int64
    assert batch["text_mask"].tolist() == batch["text_loss"].tolist() == [[True], [True]]


def test_special_ids_follow_the_vocabulary():
    assert special_ids(32_000) == SpecialIds(bos=32_000, boi=32_001, nolabel=32_002, size=32_003)
    assert special_ids(32_000, eos_id=1) == SpecialIds(bos=32_000, boi=1, nolabel=32_001, size=32_002)
    assert special_ids(1000) == SpecialIds(bos=1000, boi=1001, nolabel=1002, size=1003)  # ImageNet's classes

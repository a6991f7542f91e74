"""Captions in a module: which tokenizer reads them, and batches that hold their ids.

A module whose images have texts inherits `WithText`. The tokenizer is the module's, not the data's: prompts have to be
encoded and captions decoded where there is no data, so checkpoints rebuild it. Batches of any data with captions gain
text, text_mask and text_loss (layers/text/batches.py) on the host, before they go to the device; the data knows nothing
of it. Without a tokenizer the class label is a text of one token.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from layers.text.base import TextTokenizer
from layers.text.batches import SpecialIds, TextBatch, decode_batch, encode_batch, label_batch, special_ids
from layers.text.bpe import BPETokenizer
from lightning_modules.config import class_of, made_in, tokenizer_config
from lightning_modules.pretrained import is_npz
from lightning_modules.weights import read_own, read_torch

CAPTIONS = 100_000  # that a vocabulary is learnt from: more would change little, and reading them decodes the images


class WithText(L.LightningModule):
    """Put before GenerativeModule. The module sets `text`, `text_len`, `ignore_pad` (as `max_len` and `ignore_pad` of
    `encode_batch`) and stores `text_config(text)` among its hyper-parameters as "text".
    """

    text: TextTokenizer | None  # None: class labels
    text_len: int
    ignore_pad: bool
    num_classes: int

    @property
    def special_ids(self) -> SpecialIds:
        """BOS, BOI, NOLABEL and the size of the embedding table."""
        if self.text is None:
            return special_ids(self.num_classes)
        return special_ids(self.text.vocab_size, eos_id=self.text.eos_id if self.ignore_pad else None)

    def with_text(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with text, text_mask and text_loss, on the device of its labels; one that has them is left alone.

        Raises ValueError where it has neither those nor what they are made of.
        """
        if "text" in batch:
            return batch
        if self.text is None:
            return batch | label_batch(batch["label"])
        if "caption" not in batch:
            raise ValueError(
                "the data has no captions, which this model learns: use data with captions, such as"
                " datamodules.image_text.ImageTextData, or set --model.init_args.text=null for class labels"
            )
        return batch | self._encoded(batch["caption"], batch["label"].device)

    def encode_text(self, captions: Sequence[str]) -> TextBatch:
        """Prompts as the model reads them, on its device. Raises ValueError for a model of class labels."""
        return self._encoded(captions, self.device)

    def prompts_of(self, labels: Tensor, prompts: Sequence[str]) -> TextBatch:
        """The texts that labels (B,) stand for, their numbers among the prompts, round and round; none: the empty text.

        Raises ValueError for a model of class labels.
        """
        encoded = self.encode_text(prompts or [""])
        return {name: tensor[labels % len(tensor)] for name, tensor in encoded.items()}

    def checked_labels(self, labels: Tensor | Sequence[int]) -> Tensor:
        """As GenerativeModule's; of a model of captions they are numbers of prompts, and any will do."""
        return super().checked_labels(labels) if self.text is None else torch.as_tensor(labels, dtype=torch.int64)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for prompts of a model that learns class labels."""
        if prompts and self.text is None:
            raise ValueError(
                f"sampling.prompts is {prompts}, but this model learns class labels: give LABELS=, not TEXT=, or set "
                f"--model.init_args.text to learn captions"
            )

    def decode_text(self, text: Tensor) -> list[str]:
        """Ids (B, T) -> B texts, each up to its end. Raises ValueError for a model of class labels."""
        return decode_batch(text, self._tokenizer_of_texts())

    def prepare_data(self) -> None:
        """Learns a BPE vocabulary that is not there yet; Lightning calls this in one process per node."""
        train_missing(self.text, self.trainer.datamodule)

    def setup(self, stage: str) -> None:
        if self.text is not None:
            self.text.load()
            self.hparams["text"] = text_config(self.text)  # again: the file may have been made just now
        super().setup(stage)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_text(checkpoint["hyper_parameters"].get("text"), self.text)
        super().on_load_checkpoint(checkpoint)

    def load_official(self, path: str | Path, *, key: str | None = None) -> None:
        """As Pretrained's. One of our checkpoints must be of the same text tokenizer: ids of another mean other words,
        and no shape shows it."""
        self.check_text_of(path)
        super().load_official(path, key=key)

    def check_text_of(self, path: str | Path) -> None:
        """Raises ValueError if a file is a checkpoint of ours that was trained with another text tokenizer."""
        if is_npz(path) or read_own(path, "raw") is None:
            return
        arguments = read_torch(path).get("hyper_parameters")
        if isinstance(arguments, Mapping) and "text" in arguments:
            check_text(arguments["text"], self.text, origin=f"the checkpoint {path}")

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return self.with_text(super().on_before_batch_transfer(batch, dataloader_idx))

    def _encoded(self, captions: Sequence[str], device: Any) -> TextBatch:
        tokenizer = self._tokenizer_of_texts()
        encoded = encode_batch(captions, tokenizer, max_len=self.text_len, ignore_pad=self.ignore_pad)
        return {name: tensor.to(device) for name, tensor in encoded.items()}

    def _tokenizer_of_texts(self) -> TextTokenizer:
        if self.text is None:
            raise ValueError("this model was trained on class labels and knows no text: give LABELS=, not TEXT=")
        return self.text


def text_config(tokenizer: TextTokenizer | None) -> dict[str, Any] | None:
    """{"class_path", "init_args"} of a text tokenizer, as in a recipe."""
    return None if tokenizer is None else tokenizer_config(tokenizer)


def as_text_tokenizer(value: TextTokenizer | Mapping[str, Any] | None) -> TextTokenizer | None:
    """A text tokenizer from itself or its config. Only TextTokenizer classes below `layers.text` are made.

    Raises ValueError for any other class, or for arguments that the class does not take.
    """
    if value is None or isinstance(value, TextTokenizer):
        return value
    return made_in("layers.text", TextTokenizer, *class_of(value, "text"), kind="text tokenizer")


def check_text(
    saved: Mapping[str, Any] | None, tokenizer: TextTokenizer | None, *, origin: str = "the checkpoint"
) -> None:
    """Raises ValueError if a checkpoint's tokenizer (its config) is another than ours. Where its file lies is free."""
    theirs, ours = _described(saved), _described(text_config(tokenizer))
    for name in {**theirs, **ours}:
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"{origin} was trained with a text tokenizer of {name}={theirs.get(name)}, this run has"
                f" {ours.get(name)}: set --model.init_args.text back (a vocabulary's file too)"
            )


def train_missing(tokenizer: TextTokenizer | None, datamodule: Any) -> None:
    """Learns the vocabulary of a BPE tokenizer from the training captions, if its file is not there.

    From the first `CAPTIONS` rows; of several captions of an image, that of epoch 0. Raises ValueError for data without
    captions.
    """
    if not isinstance(tokenizer, BPETokenizer) or tokenizer.path.exists():
        return
    datamodule.setup("fit")
    tokenizer.train(islice(_captions(datamodule), CAPTIONS))
    rank_zero_info(f"text: {tokenizer.vocab_size} ids learnt from the training captions, in '{tokenizer.path}'")


def _captions(datamodule: Any) -> Iterator[str]:
    for batch in datamodule.ordered_loader("train"):
        if "caption" not in batch:
            raise ValueError("the data has no captions to learn a text vocabulary from: use data that has")
        yield from batch["caption"]


def _described(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """What has to agree of two configs."""
    if config is None:
        return {"class_path": None}
    class_path, arguments = class_of(config, "text")
    return {"class_path": class_path} | {k: v for k, v in arguments.items() if k != "path"}

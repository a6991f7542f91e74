"""Text encoders: ids become feature vectors, which a model reads as a prefix of its own tokens.

DART reads features of a frozen T5-XL (Gu et al., arXiv 2410.08159); a table that is trained along needs no file and no
download. Both keep the contract of `TextEncoder`, and so may any other. In: ids (B, P) and which of them are words
(B, P), as `encode_batch` makes them with ignore_pad. Out: features (B, P, dim).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layers.checks import check_positive
from layers.text.base import PAD_ID, missing_package


@dataclass
class EncoderConfig:
    """What makes features of a text's ids."""

    kind: Literal["table", "t5"] = "table"
    dim: int = 256  # of a feature; T5-XL: 2048
    path: str | None = None  # t5: folder or hub name of the model, such as google/t5-v1_1-xl

    def __post_init__(self) -> None:
        check_positive("encoder", self, "dim")
        if self.kind not in ("table", "t5"):
            raise ValueError(f"encoder.kind is '{self.kind}': use table or t5")
        if (self.kind == "t5") != (self.path is not None):
            raise ValueError(
                f"encoder.path is {self.path} and encoder.kind {self.kind}: t5 needs a path, table has none"
            )


class TextEncoder(nn.Module):
    """Contract of every encoder; `dim` is the width of its features."""

    dim: int

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """ids (B, P), mask (B, P), True where a word is -> (B, P, dim). Features elsewhere are not looked at."""
        raise NotImplementedError


class TextTable(TextEncoder):
    """One learned vector per id and one per place, added: the order of words is in the features alone."""

    def __init__(self, vocab_size: int, max_len: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.ids = nn.Embedding(vocab_size, dim)
        self.places = nn.Parameter(torch.empty(max_len, dim))
        for table in (self.ids.weight, self.places):
            nn.init.normal_(table)

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        return self.ids(text) + self.places[: text.shape[1]]


class T5Encoder(TextEncoder):
    """The encoder of a T5, frozen. Its ids are those of its own SentencePiece file, with case (lower: false).

    Read at the first use, with the package transformers. It is no submodule: checkpoints, averages and DDP do not hold
    it, and it follows the ids to their device; bfloat16 on CUDA.
    """

    def __init__(self, path: str, dim: int) -> None:
        super().__init__()
        self.path, self.dim = path, dim
        self._model: list[Any] = []  # in a list, so that it is not registered

    @torch.no_grad()
    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """Raises ValueError without the package, for a path that has no T5, or one of another width."""
        model = self._loaded().to(text.device, torch.bfloat16 if text.is_cuda else torch.float32)
        # its end symbol counts, too, as T5 was trained
        return model(input_ids=text, attention_mask=text != PAD_ID).last_hidden_state.float()

    def _loaded(self) -> Any:
        if not self._model:
            try:
                from transformers import T5EncoderModel
            except ImportError as error:
                raise missing_package("transformers", error) from error
            try:
                model = T5EncoderModel.from_pretrained(self.path)
            except (OSError, ValueError) as error:
                raise ValueError(f"encoder.path is '{self.path}', where no T5 can be read ({error})") from error
            if model.config.d_model != self.dim:
                raise ValueError(f"encoder.dim is {self.dim}, but the T5 of '{self.path}' has {model.config.d_model}")
            self._model.append(model.eval().requires_grad_(False))
        return self._model[0]


def make_encoder(config: EncoderConfig, *, vocab_size: int, max_len: int) -> TextEncoder:
    """The encoder of a recipe."""
    if config.kind == "t5":
        return T5Encoder(config.path, config.dim)
    return TextTable(vocab_size, max_len, config.dim)

"""SentencePiece models as text tokenizers: JetFormer's own is `c4_en` with 32,000 pieces, a file that the user brings.

Paper: JetFormer (arXiv 2411.19722); code: big_vision, pp/ops_text.py. Ids are those of the file; text such as "</s>" in
a caption is no control symbol. In: str. Out: list of ids. Needs the package sentencepiece.
"""

from typing import Any

from layers.text.base import EOS_ID, FileTokenizer, missing_package


class SentencePieceTokenizer(FileTokenizer):
    """The SentencePiece model at `path`, of `vocab_size` pieces.

    `eos_id`: id of its end symbol, 1 in models of T5's family such as c4_en. Id 0 is taken for padding whatever the
    file says: padded positions are masked.
    """

    def __init__(
        self,
        path: str,
        vocab_size: int = 32_000,
        *,
        eos_id: int = EOS_ID,
        lower: bool = True,
        sha256: str | None = None,
    ) -> None:
        super().__init__(path, vocab_size, lower=lower, eos_id=eos_id, sha256=sha256)

    def init_args(self) -> dict[str, Any]:
        return super().init_args() | {"eos_id": self.eos_id}

    def _open(self, content: bytes) -> Any:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise missing_package("sentencepiece", error) from error
        try:
            model = SentencePieceProcessor(model_proto=content) if content else None
        except RuntimeError:
            model = None
        if model is None:
            raise ValueError(f"'{self.path}' is no readable SentencePiece model (damaged, or of another kind?)")
        self._check_size(model.get_piece_size())
        if model.eos_id() != self.eos_id:
            raise ValueError(
                f"the SentencePiece model '{self.path}' ends texts with id {model.eos_id()}, but eos_id={self.eos_id}:"
                " set eos_id to it (-1 means that the file has no end symbol: use another)"
            )
        return model

    def _where_from(self) -> str:
        return "put the SentencePiece model there that is to be used, such as c4_en, or name it"

    def _encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def _decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)

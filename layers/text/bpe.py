"""Byte-pair encoding learnt from a run's own captions: shorter texts than bytes, without a file from elsewhere.

Sennrich et al., arXiv 1508.07909, over bytes as in GPT-2, so that every text has ids. Ids: padding 0, end 1, then the
256 bytes, then merges, the most frequent first. The file is a JSON of the package `tokenizers`, which is needed; the
same captions in any order give the same file. In: str. Out: list of ids.
"""

import os
import uuid
from collections.abc import Iterable
from typing import Any

from layers.text.base import FileTokenizer, missing_package
from layers.text.byte import RESERVED

MIN_COUNT = 2  # a pair seen only once is not worth an id


class BPETokenizer(FileTokenizer):
    """The byte-pair vocabulary at `path`, of `vocab_size` ids; `train` writes it.

    Raises ValueError for a `vocab_size` that has no room for the bytes.
    """

    def __init__(self, path: str, vocab_size: int = 1024, *, lower: bool = True, sha256: str | None = None) -> None:
        if vocab_size < RESERVED + 256:
            raise ValueError(
                f"text vocab_size={vocab_size} has no room for the 256 bytes: use {RESERVED + 256} or more"
            )
        super().__init__(path, vocab_size, lower=lower, sha256=sha256)

    def train(self, captions: Iterable[str]) -> None:
        """Learns merges from `captions` and writes the file, whole or not at all.

        Raises ValueError if so many ids are not to be had from them.
        """
        tokenizers = _package()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        options = {"min_frequency": MIN_COUNT, "initial_alphabet": alphabet, "show_progress": False}
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=self.vocab_size - RESERVED, **options)
        model.train_from_iterator(map(self.prepared, captions), trainer)
        found = model.get_vocab_size() + RESERVED
        if found < self.vocab_size:
            raise ValueError(
                f"the captions give only {found} ids, not vocab_size={self.vocab_size}: lower it to {found}"
            )
        self._write(model.to_str(pretty=True))

    def _write(self, content: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}")  # several nodes may write at a time
        try:
            part.write_text(content, encoding="utf-8")
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)

    def _open(self, content: bytes) -> Any:
        tokenizers = _package()
        try:
            model = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the package raises nothing more specific
            raise ValueError(f"'{self.path}' is no readable vocabulary of tokenizers ({error})") from error
        self._check_size(model.get_vocab_size() + RESERVED)
        return model

    def _where_from(self) -> str:
        return "training makes it from its captions; to sample, put the file of that run back, or name it"

    def _encode(self, text: str) -> list[int]:
        # one text at a time: encode_batch starts threads, of which a forked data worker complains
        return [token + RESERVED for token in self.model.encode(text, add_special_tokens=False).ids]

    def _decode(self, ids: list[int]) -> str:
        return self.model.decode([token - RESERVED for token in ids], skip_special_tokens=False)


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise missing_package("tokenizers", error) from error
    return tokenizers

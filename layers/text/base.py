"""Text tokenizers: a caption becomes ids, ids become text. One contract for bytes, SentencePiece and BPE.

As JetFormer does (big_vision, configs/proj/jetformer/jetformer_image_text.py): captions are lower-cased, id 1 ends a
text, id 0 fills it up; special ids of a model come after the vocabulary (batches.py). A vocabulary that is a file stays
one: arguments name it, and a checkpoint holds its checksum, so that no other file takes its place unnoticed.
In: str. Out: list of ids in 0..vocab_size-1, without an end.
"""

import hashlib
import string
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAD_ID = 0
EOS_ID = 1
PATH_OPTION = "--model.init_args.text.init_args.path"  # as recipes and command lines name a vocabulary's file

_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


class TextTokenizer(ABC):
    """Contract of every text tokenizer. `vocab_size` counts `pad_id` and `eos_id`, which no text encodes to.

    `lower`: A-Z become a-z first. Only those, as TensorFlow's `strings.lower` has it, which the official code uses.
    """

    pad_id = PAD_ID

    def __init__(self, vocab_size: int, *, lower: bool, eos_id: int = EOS_ID) -> None:
        self.vocab_size, self.lower, self.eos_id = vocab_size, lower, eos_id

    def encode(self, text: str) -> list[int]:
        """Ids of a text, of any length; none for an empty one."""
        return self._encode(self.prepared(text))

    def prepared(self, text: str) -> str:
        """The text as the vocabulary sees it."""
        return text.translate(_LOWER) if self.lower else text

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids up to the first `eos_id`. Padding and ids that are no part of the vocabulary are left out."""
        kept = []
        for token in ids:
            if token == self.eos_id:
                break
            if token != self.pad_id and 0 <= token < self.vocab_size:
                kept.append(token)
        return self._decode(kept)

    def load(self) -> None:  # noqa: B027 (most have nothing to read)
        """Reads the file that the arguments name, if any. Encoding does so by itself; this finds errors early."""

    @abstractmethod
    def init_args(self) -> dict[str, Any]:
        """Constructor arguments as plain values, so that a checkpoint can rebuild the tokenizer."""

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


class FileTokenizer(TextTokenizer):
    """A text tokenizer whose vocabulary is the file at `path`, read at its first use.

    `sha256` is the checksum of the file that a model was trained with. A recipe leaves it out; a checkpoint has it.
    """

    def __init__(
        self, path: str, vocab_size: int, *, lower: bool, eos_id: int = EOS_ID, sha256: str | None = None
    ) -> None:
        super().__init__(vocab_size, lower=lower, eos_id=eos_id)
        self.path, self.sha256 = Path(path).expanduser(), sha256
        self._model: Any = None

    def init_args(self) -> dict[str, Any]:
        """`sha256` is that of the file, where there is one by now."""
        found = _sha256(self.path.read_bytes()) if self.sha256 is None and self.path.is_file() else self.sha256
        return {"path": str(self.path), "vocab_size": self.vocab_size, "lower": self.lower, "sha256": found}

    def load(self) -> None:
        """Raises FileNotFoundError, or ValueError for a package that is missing, a damaged file, another vocabulary
        than `sha256` says, and one of another size than `vocab_size`."""
        if self._model is None:
            self._model = self._open(self._read())

    @property
    def model(self) -> Any:
        """The package's own object for the vocabulary."""
        self.load()
        return self._model

    @abstractmethod
    def _open(self, content: bytes) -> Any:
        """The package's object for the content of the file. Raises ValueError as `load` does."""

    @abstractmethod
    def _where_from(self) -> str:
        """Where a user finds a file that is missing."""

    def _read(self) -> bytes:
        if not self.path.is_file():
            raise FileNotFoundError(f"no text vocabulary at '{self.path}' ({PATH_OPTION}): {self._where_from()}")
        content = self.path.read_bytes()
        found = _sha256(content)
        if self.sha256 not in (None, found):
            raise ValueError(
                f"the text vocabulary '{self.path}' has sha256 {found[:12]}..., but the model was trained with"
                f" {self.sha256[:12]}...: put that file back, or name it with {PATH_OPTION}"
            )
        return content

    def _check_size(self, found: int) -> None:
        if found != self.vocab_size:
            raise ValueError(
                f"the text vocabulary '{self.path}' has {found} ids, but vocab_size={self.vocab_size}: set"
                f" {PATH_OPTION.replace('path', 'vocab_size')}={found}, or name another file"
            )


def missing_package(name: str, error: ImportError) -> ValueError:
    """The error for a text tokenizer whose package is not installed."""
    return ValueError(
        f"the text tokenizer needs the package {name}, which is missing ({error}): pip install {name}, or use"
        " layers.text.byte.ByteTokenizer, which needs none"
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

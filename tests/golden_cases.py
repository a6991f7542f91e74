"""Golden arrays: where they lie, which cases there are, and a reader that fails if a test leaves one unread."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "golden")


def golden_files(method: str) -> list[Path]:
    """All files of a method, without its README."""
    return sorted(p for p in (GOLDEN / method).rglob("*") if p.is_file() and p.suffix != ".md")


def golden_paths(method: str, pattern: str) -> list[Path]:
    """Files of a method that match a glob such as "*/forward.safetensors"."""
    return sorted((GOLDEN / method).glob(pattern))


def case_id(path: Path) -> str:
    """Readable parameter of a test."""
    return str(path.relative_to(GOLDEN)) if path.is_relative_to(GOLDEN) else str(path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


class Golden:
    """Tensors of one file. Leaving the context fails if a tensor was never taken.

    `partial`: this reader needs only some of them; another test consumes the whole file.
    """

    def __init__(self, path: Path, *, partial: bool = False) -> None:
        self.path = path
        self._tensors = load_file(path)
        self._unread = set() if partial else set(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        self._unread.discard(name)
        return self._tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            assert not self._unread, f"{self.path} holds tensors that no test consumed: {sorted(self._unread)}"

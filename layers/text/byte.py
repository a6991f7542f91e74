"""Bytes as text tokens: every text in any language has ids, and no file is needed. What the offline recipes use.

Ids are the bytes of UTF-8 plus 2, after padding (0) and end (1): 258 in all. In: str. Out: list of ids.
"""

from typing import Any

from layers.text.base import TextTokenizer

RESERVED = 2  # padding and end


class ByteTokenizer(TextTokenizer):
    """UTF-8 bytes. What is no UTF-8 in generated ids is shown as the replacement character."""

    def __init__(self, lower: bool = True) -> None:
        super().__init__(RESERVED + 256, lower=lower)

    def init_args(self) -> dict[str, Any]:
        return {"lower": self.lower}

    def _encode(self, text: str) -> list[int]:
        return [byte + RESERVED for byte in text.encode()]

    def _decode(self, ids: list[int]) -> str:
        return bytes(token - RESERVED for token in ids).decode(errors="replace")

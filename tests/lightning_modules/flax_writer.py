"""Flax's msgpack files for tests: what `flax.serialization.msgpack_serialize` writes, without flax, and lies."""

import struct
from typing import Any

import torch
from torch import Tensor


class Raw(bytes):
    """Bytes that stand in a tree as they are."""


def packed(value: Any) -> bytes:
    """A tree of dicts, lists, tensors, numbers, text, bytes, None and `Raw`, in msgpack."""
    match value:
        case Raw():
            return bytes(value)
        case None | False | True:
            return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
        case int():
            return b"\xcf" + struct.pack(">Q", value) if value >= 0 else b"\xd3" + struct.pack(">q", value)
        case float():
            return b"\xcb" + struct.pack(">d", value)
        case str():
            data = value.encode()
            return (bytes([0xA0 | len(data)]) if len(data) < 32 else b"\xd9" + bytes([len(data)])) + data
        case bytes():
            return b"\xc6" + struct.pack(">I", len(value)) + value
        case Tensor():
            return extension(1, array(value))
        case list():
            return b"\xdd" + struct.pack(">I", len(value)) + b"".join(map(packed, value))
    head = bytes([0x80 | len(value)]) if len(value) < 16 else b"\xde" + struct.pack(">H", len(value))
    return head + b"".join(packed(key) + packed(item) for key, item in value.items())


def array(tensor: Tensor, *, shape: Any = None, dtype: Any = None) -> bytes:
    """Payload of an array: (shape, dtype, bytes); shape and dtype can be said to be others."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    name = dtype or str(tensor.dtype).removeprefix("torch.")
    return packed([list(tensor.shape) if shape is None else shape, name, data])


def extension(kind: int, payload: bytes) -> Raw:
    return Raw(b"\xc9" + struct.pack(">Ib", len(payload), kind) + payload)


def chunked(tensor: Tensor, size: int) -> dict[str, Any]:
    """A large array as flax writes it: parts of `size` values."""
    shape = {str(i): n for i, n in enumerate(tensor.shape)}
    parts = {str(i): part for i, part in enumerate(tensor.reshape(-1).split(size))}
    return {"__msgpack_chunked_array__": True, "shape": shape, "chunks": parts}


def nested(state: dict[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for name, value in state.items():
        *above, last = name.split("/")
        level = tree
        for key in above:
            level = level.setdefault(key, {})
        level[last] = value
    return tree

"""Checkpoints of flax without flax: big_vision's npz files and flax's own msgpack files, as tensors by flat names.

Both are read by the few lines here and not by a library: numbers, text and maps are all that they may hold, nothing is
executed, and nothing is allocated that the file does not hold the bytes for. Formats: numpy `lib/format.py`; flax
`serialization.py` (msgpack extension 1 = array, 3 = numpy scalar, "__msgpack_chunked_array__" = large array in parts).
Out: {"decoder/LayerNorm/scale": Tensor}, in the file's layout (kernels are [in, out]), on the CPU.
"""

import math
import mmap
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_modules.npz_files import checked_entries, reading
from lightning_modules.weights import existing

# name in flax -> layout of the bytes. bfloat16, which numpy lacks, is read as int16 and viewed
LAYOUTS = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<i2", "bool": "|b1", "uint32": "<u4"}
LAYOUTS |= {"int64": "<i8", "int32": "<i4", "int16": "<i2", "int8": "|i1", "uint8": "|u1"}
NPY_TYPES = {layout[1:]: name for name, layout in LAYOUTS.items() if name != "bfloat16"} | {"V2": "bfloat16"}
NPY_MAGIC = b"\x93NUMPY"
NPY_HEADER = re.compile(
    r"\{ *'descr': *'[<|=](\w+)', *'fortran_order': *(True|False), *'shape': *\(([\d, ]*)\),? *\}\s*"
)

# msgpack: first byte -> format of a number, or of the size that follows
NUMBERS = dict(zip(range(0xCA, 0xD4), "fdBHIQbhiq", strict=True))
BINARY, TEXT, ARRAY = {0xC4: "B", 0xC5: "H", 0xC6: "I"}, {0xD9: "B", 0xDA: "H", 0xDB: "I"}, {0xDC: "H", 0xDD: "I"}
MAP, EXTENSION = {0xDE: "H", 0xDF: "I"}, {0xC7: "B", 0xC8: "H", 0xC9: "I"}
FIXED_EXTENSION = {0xD4 + i: 2**i for i in range(5)}
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
MAP_OF_WORDS = re.compile(rb"([\x81-\x8f]|\xde..|\xdf....)([\xa2-\xbf]|\xd9.)[ -~]{2}", re.DOTALL)
ARRAY_EXTENSIONS = (1, 3)
CHUNKED = "__msgpack_chunked_array__"
MAX_DEPTH = 64
MAX_DIMS = 32
MAX_VALUES = 2**20  # maps, names, numbers and arrays of a file: what a hostile one can make Python hold


def read_npz(path: str | Path) -> dict[str, Tensor]:
    """Arrays of an npz file of big_vision by name, "/" between levels; bfloat16 is kept.

    Of a whole training state only the parameters: below "params/", which is left out of the names, if there is such a
    name, else all but "opt/". Raises FileNotFoundError, or ValueError for a file that is damaged or holds anything but
    plain arrays.
    """
    path = existing(path)
    with reading(path, "npz"), zipfile.ZipFile(path) as archive:
        chosen = _parameters(checked_entries(archive, path.stat().st_size))
        return {name: _read_npy(archive.read(info)) for name, info in chosen.items()}


def read_msgpack(path: str | Path, *, sets: Sequence[str] = ()) -> dict[str, Tensor]:
    """Arrays and numbers of a flax msgpack file by name, "/" between levels; None, flax's empty place, is left out.

    `sets`: only what lies below the first of these names that the file has, and without it (("ema_params",
    "g_params")). Raises FileNotFoundError, or ValueError for a file that is damaged, holds anything else there, or has
    none of the sets.
    """
    path = existing(path)
    with reading(path, "flax msgpack"), path.open("rb") as file:
        unpacker = _Unpacker(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
        tree = unpacker.only_value()
        if not isinstance(tree, dict):
            raise ValueError("it holds no map of names")
        if sets:
            tree = _first_set(tree, sets)
        return {name: _tensor(value, name) for name, value in _flat(tree) if value is not None}


def is_msgpack(path: str | Path) -> bool:
    """Whether a file begins as flax's msgpack files do, which have no suffix: with a map whose first key is a word."""
    with existing(path).open("rb") as file:
        return MAP_OF_WORDS.match(file.read(16)) is not None


class _Array(NamedTuple):
    """An array that still lies in the file: its bytes in one part or several."""

    shape: tuple[int, ...]
    dtype: str
    parts: list[memoryview]


def _tensor(value: Any, name: str) -> Tensor:
    """The tensor of an array or a number; `name` is for errors."""
    if isinstance(value, bool | float) or (isinstance(value, int) and value < 2**63):
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    if not isinstance(value, _Array):
        raise ValueError(f"'{name}' is neither an array nor a number")
    if value.dtype not in LAYOUTS:
        raise ValueError(f"'{name}' is of type '{value.dtype}', only {', '.join(LAYOUTS)} are read")
    layout = np.dtype(LAYOUTS[value.dtype])
    declared, found = math.prod(value.shape) * layout.itemsize, sum(len(part) for part in value.parts)
    if declared != found:
        raise ValueError(f"'{name}' is {value.dtype} {value.shape}, {declared} bytes, but has {found}")
    if not declared:
        return torch.empty(value.shape, dtype=getattr(torch, value.dtype))
    flat = np.concatenate([np.frombuffer(part, layout) for part in value.parts])  # a copy: the file stays as it is
    tensor = torch.from_numpy(flat.reshape(value.shape))
    return tensor.view(torch.bfloat16) if value.dtype == "bfloat16" else tensor


# npz


def _parameters(entries: Mapping[str, zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    prefix = "params/" if any(name.startswith("params/") for name in entries) else ""
    kept = {name: info for name, info in entries.items() if name.startswith(prefix) and not name.startswith("opt/")}
    return {name.removeprefix(prefix): info for name, info in kept.items()}


def _read_npy(data: bytes) -> Tensor:
    """An npy file in memory -> its array."""
    size_format, start = ("<H", 10) if data[6:7] == b"\1" else ("<I", 12)
    if not data.startswith(NPY_MAGIC) or len(data) < start:
        raise ValueError("one of its entries is no npy file")
    end = start + struct.unpack(size_format, data[8:start])[0]
    match = NPY_HEADER.fullmatch(data[start:end].decode("latin1"))
    if match is None:
        raise ValueError(f"one of its arrays is not plain: {data[start : min(end, start + 80)]!r}")
    shape = tuple(int(text) for text in match[3].replace(" ", "").split(",") if text)
    fortran = match[2] == "True"
    array = _Array(shape[::-1] if fortran else shape, NPY_TYPES.get(match[1], match[1]), [memoryview(data)[end:]])
    tensor = _tensor(array, str(match[0]).strip())
    return tensor.permute(*reversed(range(tensor.ndim))).contiguous() if fortran else tensor


# msgpack


class _Unpacker:
    """Values of a msgpack buffer: text, numbers, lists, maps with text keys, and arrays, which are left where they lie.

    Whatever sizes are declared, only bytes that are there are taken, and the number of values is bounded.
    """

    def __init__(self, data: memoryview) -> None:
        self.data, self.at, self.values = data, 0, 0

    def only_value(self) -> Any:
        """The value that the buffer consists of."""
        value = self.value(0)
        if self.at != len(self.data):
            raise ValueError(f"{len(self.data) - self.at} bytes follow after its end")
        return value

    def value(self, depth: int) -> Any:
        """The next value, at this depth of nesting."""
        self.values += 1
        if depth > MAX_DEPTH or self.values > MAX_VALUES:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels, or has more than {MAX_VALUES} values")
        code = self.number("B")
        if code < 0x80 or code >= 0xE0:
            return code if code < 0x80 else code - 0x100
        if code in CONSTANTS or code in NUMBERS:
            return self.number(NUMBERS[code]) if code in NUMBERS else CONSTANTS[code]
        if code < 0x90 or code in MAP:
            return self.mapping(self.size(code, MAP, 0x0F), depth)
        if code < 0xA0 or code in ARRAY:
            return [self.value(depth + 1) for _ in range(self.size(code, ARRAY, 0x0F))]
        if code < 0xC0 or code in TEXT:
            return str(self.take(self.size(code, TEXT, 0x1F)), "utf-8")
        if code in BINARY:
            return self.take(self.number(BINARY[code]))
        if code in EXTENSION or code in FIXED_EXTENSION:
            return self.extension(self.number(EXTENSION[code]) if code in EXTENSION else FIXED_EXTENSION[code])
        raise ValueError(f"byte {self.at - 1} is {code:#x}, which begins no value")

    def take(self, size: int) -> memoryview:
        """The next `size` bytes."""
        if size > len(self.data) - self.at:
            raise ValueError(f"it ends {size - len(self.data) + self.at} bytes too early")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> int | float:
        return struct.unpack(f">{form}", self.take(struct.calcsize(form)))[0]

    def size(self, code: int, formats: Mapping[int, str], mask: int) -> int:
        """What a first byte says: a size that follows it, or one in its low bits."""
        return self.number(formats[code]) if code in formats else code & mask

    def mapping(self, size: int, depth: int) -> Any:
        """A map; the array, if it is one in parts."""
        found: dict[str, Any] = {}
        for _ in range(size):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in found:
                raise ValueError("a key of one of its maps is no text, or is there twice")
            found[key] = self.value(depth + 1)
        return _joined(found) if CHUNKED in found else found

    def extension(self, size: int) -> _Array:
        """flax's arrays and numpy scalars: (shape, name of the type, bytes), packed once more."""
        kind = self.number("b")
        if kind not in ARRAY_EXTENSIONS:
            raise ValueError(f"it holds an extension of type {kind}, only {ARRAY_EXTENSIONS} are read")
        match _Unpacker(self.take(size)).only_value():
            case [list() as shape, str() as dtype, memoryview() as data]:
                return _Array(_shape(shape), dtype, [data])
        raise ValueError("one of its arrays is not (shape, type, bytes)")


def _joined(chunked: Mapping[str, Any]) -> _Array:
    """An array in parts: {"shape": {"0": rows, ...}, "chunks": {"0": array, ...}}."""
    match chunked:
        case {"shape": dict() as shape, "chunks": dict() as chunks}:
            parts = [chunks.get(str(i)) for i in range(len(chunks))]
            sizes = _shape([shape.get(str(i)) for i in range(len(shape))])
            if parts and all(isinstance(part, _Array) and part.dtype == parts[0].dtype for part in parts):
                return _Array(sizes, parts[0].dtype, [data for part in parts for data in part.parts])
    raise ValueError("one of its arrays in parts lacks some, or has parts of several types")


def _shape(sizes: Sequence[Any]) -> tuple[int, ...]:
    if len(sizes) > MAX_DIMS or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"one of its arrays has the shape {sizes[:MAX_DIMS]}")
    return tuple(sizes)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _first_set(tree: Mapping[str, Any], sets: Sequence[str]) -> dict[str, Any]:
    for name in sets:
        if isinstance(tree.get(name), dict):
            return tree[name]
    raise ValueError(f"it has no {' or '.join(sets)}, only {', '.join(sorted(tree)[:5]) or 'nothing'}")

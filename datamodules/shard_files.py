"""What lies in a folder of shards (shards.py), read as if a stranger had written it.

`meta.json` and the headers of safetensors files say where the bytes of which tensor are; they are followed only after
every number in them was held against the size of the file. Whatever does not fit is one ValueError that names the file
and the cure.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

META, PLAN = "meta.json", "unfinished.json"
# safetensors dtype -> how numpy maps it, what torch makes of it (numpy has no bfloat16)
DTYPES = {
    "U8": (np.uint8, torch.uint8),
    "I16": (np.int16, torch.int16),
    "U16": (np.uint16, torch.uint16),
    "I32": (np.int32, torch.int32),
    "I64": (np.int64, torch.int64),
    "F16": (np.float16, torch.float16),
    "BF16": (np.int16, torch.bfloat16),
    "F32": (np.float32, torch.float32),
}
CAPTIONS = {"caption": {"dtype": "U8", "shape": []}, "caption_end": {"dtype": "I64", "shape": []}}
MAX_DIMS = 32
CURE = "delete the folder and write it again"


class Field(NamedTuple):
    """One tensor of a shard file: safetensors dtype, shape with the row axis, first byte counted from the file's."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_meta(folder: Path) -> dict[str, Any]:
    """`meta.json` of a finished folder. Raises ValueError when there is none, it is no such file, or a part is amiss
    of what a reader goes by: rows, tensors and shards."""
    path = folder / META
    if not path.exists():
        state = "is unfinished: run what writes it again" if (folder / PLAN).exists() else "is no folder of shards"
        raise ValueError(f"'{folder}' {state} ({META} is missing)")
    meta = read_json(path)
    check_kinds(meta, {"n": int, "tensors": dict, "shards": list}, path)
    _check_tensors(meta["tensors"], path)
    for shard in meta["shards"]:
        _check_shard(shard, path)
    if not meta["n"] or sum(shard["rows"] for shard in meta["shards"]) != meta["n"]:
        raise ValueError(f"'{path}' is damaged (its shards do not have n={meta['n']} rows): {CURE}")
    return meta


def check_kinds(entries: Any, kinds: Mapping[str, type | tuple[type, ...]], path: Path) -> None:
    """Raises ValueError for an entry of a JSON object that is missing or of another type."""
    for name, kind in kinds.items():
        value = entries.get(name, ...) if isinstance(entries, dict) else ...
        wanted = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            found = "is missing" if value is ... else f"is {value!r:.100}"
            raise ValueError(f"'{path}' is damaged ({name} {found}): {CURE}")


def read_header(path: Path, *, size: int) -> dict[str, Field]:
    """Tensors of a safetensors file, from its header. Raises ValueError unless it has `size` bytes and they fit."""
    if not path.is_file():
        raise ValueError(f"shard '{path}' is missing: {CURE}")
    found = path.stat().st_size
    if found != size:
        raise ValueError(f"shard '{path}' has {found} bytes instead of {size}: {CURE}")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, size))
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        return {name: _field(entry, start=8 + length, size=size) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"shard '{path}' is damaged in its header: {CURE}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, or ValueError for a file that holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is damaged ({error}): {CURE}") from error
    if not isinstance(value, dict):
        raise ValueError(f"'{path}' is damaged (it holds a {type(value).__name__}): {CURE}")
    return value


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_tensors(tensors: Mapping[str, Any], path: Path) -> None:
    for name, tensor in tensors.items():
        check_kinds(tensor, {"dtype": str, "shape": list}, path)
        if tensor["dtype"] not in DTYPES or not _is_shape(tensor["shape"]) or CAPTIONS.get(name, tensor) != tensor:
            raise ValueError(f"'{path}' is damaged (tensor '{name:.60}' is {tensor!r:.100}): {CURE}")
    if len(CAPTIONS.keys() & tensors.keys()) == 1:
        raise ValueError(f"'{path}' is damaged (only one of {', '.join(CAPTIONS)} is there): {CURE}")


def _check_shard(shard: Any, path: Path) -> None:
    check_kinds(shard, {"file": str, "bytes": int, "sha256": str, "rows": int}, path)
    if shard["rows"] < 0 or Path(shard["file"]).name != shard["file"] or "\0" in shard["file"]:  # of this folder only
        raise ValueError(f"'{path}' is damaged (one of its shards is {shard!r:.200}): {CURE}")


def _field(entry: Mapping[str, Any], *, start: int, size: int) -> Field:
    """A header entry, checked against the file's size: a wrong one would map bytes of another tensor."""
    begin, end = entry["data_offsets"]
    shape, dtype = entry["shape"], np.dtype(DTYPES[entry["dtype"]][0])
    whole = _is_shape(shape) and _is_shape([begin, end]) and max(shape, default=0) <= size
    if not whole or begin + math.prod(shape) * dtype.itemsize != end or end > size - start:
        raise ValueError(f"{entry} does not fit into {size} bytes")
    return Field(entry["dtype"], tuple(shape), start + begin)


def _is_shape(value: Any) -> bool:
    whole = isinstance(value, list) and len(value) <= MAX_DIMS
    return whole and all(type(size) is int and size >= 0 for size in value)

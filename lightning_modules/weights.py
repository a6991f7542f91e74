"""Reading weights from files: our checkpoints, official checkpoints, safetensors. Nothing here unpickles code."""

import argparse
import hashlib
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


class Nothing:
    """Stands for a class that a file names and nobody needs."""


LIGHTNING_1 = [
    (Nothing, f"pytorch_lightning.callbacks.{name}") for name in ("model_checkpoint.ModelCheckpoint", "ModelCheckpoint")
]
# what torch.load raises for files that are none, or are cut short
DAMAGED = (UnpicklingError, RuntimeError, EOFError, OSError, LookupError, AttributeError, TypeError, ValueError)
DAMAGED += (zipfile.BadZipFile, struct.error, ArithmeticError, AssertionError)
DAMAGED += (MemoryError,)  # for a size that is a lie
EXPANSION, SMALL = 32, 2**26  # times its own size, or bytes, that the tensors of a file may have; weights are not views
NAMED = re.compile(r".+-([0-9a-f]{8})\.pth")  # how torch.hub names a file by the beginning of its sha256

# what a run goes on with, as Lightning stores it
RESUMED = {"state_dict": Mapping, "optimizer_states": list, "lr_schedulers": list, "loops": Mapping}
RESUMED |= {"callbacks": Mapping, "epoch": int, "global_step": int, "pytorch-lightning_version": str}

CHECKERS = 8  # threads that compute checksums

EMA_STATE = "EMA"  # key of the EMA callback's state in a checkpoint


def read_torch(path: str | Path) -> dict[str, Any]:
    """A torch file as tensors and plain values, memory-mapped.

    argparse.Namespace, which official trainers store beside the weights, is the one class allowed; of Lightning 1.x,
    which names its checkpoint callback's class in every file (LDM's are such), that name is read as an empty one.
    Raises FileNotFoundError, or ValueError for a file that is damaged or holds anything else.
    """
    path = existing(path)
    mapped = is_zip(path)  # files in torch's format of before 2020 can only be read whole
    with readable(path), torch.serialization.safe_globals([argparse.Namespace, *LIGHTNING_1]):
        if mapped:
            _check_stored(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        size = path.stat().st_size
        if _tensor_bytes(content) > max(EXPANSION * size, SMALL):
            raise ValueError(f"its {size} bytes say that they are {_tensor_bytes(content)} of tensors")
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict of weights")
    return content


def _check_stored(path: Path) -> None:
    """Raise ValueError for a torch file with compressed parts, of which a small one may unpack to any size."""
    with zipfile.ZipFile(path) as archive:
        if packed := [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]:
            raise ValueError(f"'{packed[0]}' in it is compressed, as torch writes nothing")


def _tensor_bytes(content: Any) -> int:
    """Bytes of all tensors as their shapes have it: views of few bytes, or of none, count in full."""
    todo, seen, total = [content], set(), 0
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, Mapping):
            todo += value.values()
        elif isinstance(value, list | tuple | set):
            todo += value
    return total


def is_zip(path: Path) -> bool:
    """Whether a file begins as torch's do since 2020. Not zipfile's test, which stumbles over damage."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\3\4"


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What torch raises of a file that it cannot read, as one ValueError."""
    try:
        yield
    except DAMAGED as error:
        if "allowed global" in str(error):
            raise ValueError(f"{path} holds more than tensors and plain values, so it is not loaded") from error
        raise ValueError(f"{path} is not a readable torch checkpoint (damaged or cut short?)") from error


def check_whole(path: str | Path) -> None:
    """Raise ValueError for a torch file that cannot be loaded, or not as it was written; FileNotFoundError for none."""
    read_torch(path)
    check_bytes(path)


def check_resumable(content: Mapping[str, Any], path: str | Path) -> None:
    """Raise ValueError for a checkpoint of which a run cannot go on as it stood: something of it is not there."""
    missing = [name for name, kind in RESUMED.items() if not isinstance(content.get(name), kind)]
    if not missing and not content["optimizer_states"]:
        missing = ["optimizer_states"]
    loop = None if missing else content["loops"].get("fit_loop")
    if not missing and not (isinstance(loop, Mapping) and "epoch_loop.batch_progress" in loop):
        missing = ["loops"]
    if missing:
        raise ValueError(
            f"{path} is of no run that could go on (CKPT=): it has no {missing[0]}; give weights to start from with "
            f"OFFICIAL="
        )


def check_bytes(path: str | Path) -> None:
    """Read all of a torch file and compare the checksums that it holds, one for each tensor: torch.load does not.

    Raises ValueError for a file that is cut short or damaged.
    """
    try:
        with open(path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            records = zipfile.ZipFile(file).infolist()
            shares = [records[i::CHECKERS] for i in range(CHECKERS)]
            with ThreadPoolExecutor(CHECKERS) as pool:
                damaged = sum(pool.map(lambda share: sum(not _is_intact(one, content) for one in share), shares))
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged or cut short ({error})") from error
    if damaged:
        raise ValueError(f"{path} is damaged: {damaged} of its parts differ from the checksums stored with them")


def _is_intact(record: zipfile.ZipInfo, content: mmap) -> bool:
    """Not by ZipFile, which would copy every byte several times. torch compresses nothing."""
    name, extra = struct.unpack_from("<HH", content, record.header_offset + 26)  # lengths of what precedes the data
    start = record.header_offset + 30 + name + extra
    with memoryview(content) as view, view[start : start + record.file_size] as data:
        return len(data) == record.file_size and zlib.crc32(data) == record.CRC


def existing(path: str | Path) -> Path:
    """The path, or FileNotFoundError if no file is there."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at '{path}': nothing was loaded, nothing was trained; give a file that exists"
        )
    return path


def check_named(path: str | Path) -> None:
    """Raise ValueError for a file that torch.hub's rule names by a checksum that is not its own, such as a damaged
    vgg16-397923af.pth. Other names say nothing."""
    path = existing(path)
    if not (named := NAMED.fullmatch(path.name)):
        return
    found = file_sha256(path)
    if not found.startswith(named[1]):
        raise ValueError(
            f"{path} has the sha256 {found[:8]}..., but is named after {named[1]}: it is damaged or another file, so "
            f"download it again (or rename it, if it is meant to differ)"
        )


def read_official(path: str | Path, key: str | None, *, keys: Sequence[str]) -> dict[str, Tensor]:
    """Weights under official names from a safetensors file (one set) or an official torch file (`key` picks the set).

    `keys` are the sets such a file has, raw weights first; without `key` the first EMA is taken. A torch file that is a
    bare state dict is accepted as it is. Raises ValueError if the set is not in the file.
    """
    path = existing(path)
    if path.suffix == ".safetensors":
        if key is not None:
            raise ValueError(f"{path} holds one set of weights, so '{key}' cannot be chosen in it: leave it out")
        try:
            return load_file(path)
        except (SafetensorError, *DAMAGED) as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error})") from error
    content = read_torch(path)
    if key is None and not any(k in content for k in keys):
        return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    key = key or keys[min(1, len(keys) - 1)]
    if not isinstance(content.get(key), Mapping):
        raise ValueError(
            f"{path} has no weights '{key}'; it has {', '.join(k for k in keys if k in content) or 'none'}"
        )
    return _named_tensors(content[key], f"'{key}' of {path}")


def read_own(path: str | Path, key: str | None) -> dict[str, Tensor] | None:
    """Weights of one of our checkpoints ("ema" by default, see `checkpoint_weights`); None for any other file."""
    path = existing(path)
    content = {} if path.suffix == ".safetensors" else read_torch(path)
    if not isinstance(content.get("state_dict"), Mapping):
        return None
    _check_own(content, path)
    return checkpoint_weights(content, key or "ema")


def read_checkpoint(path: str | Path, weights: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Constructor arguments and chosen weights (see `checkpoint_weights`) of one of our checkpoints.

    Raises ValueError for a file of another kind.
    """
    content = read_torch(path)
    if "hyper_parameters" not in content or "state_dict" not in content:
        raise ValueError(f"{path} is not a checkpoint of ours: official files are given with OFFICIAL= (from_official)")
    _check_own(content, path)
    arguments = content["hyper_parameters"]
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise ValueError(f"'hyper_parameters' of {path} are no arguments by name: it is damaged or not ours")
    return dict(arguments), checkpoint_weights(content, weights)


def _check_own(content: Mapping[str, Any], path: str | Path) -> None:
    """Raise ValueError unless the weights of a checkpoint, and its averages where it has some, are of their kinds."""
    _named_tensors(content["state_dict"], f"'state_dict' of {path}")
    callbacks = content.get("callbacks", {})
    state = callbacks.get(EMA_STATE) if isinstance(callbacks, Mapping) else callbacks
    if state is None:
        return
    decays, shadows = (state.get(name) if isinstance(state, Mapping) else None for name in ("decays", "shadows"))
    if not (isinstance(decays, list) and isinstance(shadows, list) and len(decays) == len(shadows)):
        raise ValueError(f"the averages in {path} are no list of decays and one of weights: it is damaged or not ours")
    for decay, shadow in zip(decays, shadows, strict=True):
        _named_tensors(shadow, f"the average {decay} of {path}")


def _named_tensors(state: Any, where: str) -> dict[str, Tensor]:
    """A state dict as it is. Raises ValueError for anything else."""
    if not isinstance(state, Mapping):
        raise ValueError(f"{where} is a {type(state).__name__}, expected weights by name")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{where} holds {name!r:.60} of type {type(tensor).__name__}, expected tensors by name")
    return dict(state)


def ema_state(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """State of the EMA callback inside one of our checkpoints: {"decays": [...], "shadows": [{name: tensor}, ...]}.

    None if the run kept no average.
    """
    state = (checkpoint.get("callbacks") or {}).get(EMA_STATE)
    return state if state and state["decays"] else None


def checkpoint_weights(checkpoint: Mapping[str, Any], weights: str) -> dict[str, Tensor]:
    """State dict of one of our checkpoints: "raw", "ema" (the first decay; raw if there is none) or a decay "0.9999".

    Raises ValueError if that decay was not kept.
    """
    state = dict(checkpoint["state_dict"])
    ema = ema_state(checkpoint)
    if weights == "raw" or (weights == "ema" and ema is None):
        return state
    decays = ["ema", *(str(decay) for decay in ema["decays"])] if ema else []
    if weights not in decays:
        raise ValueError(f"no weights '{weights}' in the checkpoint; it has raw{''.join(f', {d}' for d in decays)}")
    state.update(ema["shadows"][max(0, decays.index(weights) - 1)])
    return state


def file_sha256(path: str | Path) -> str:
    """Checksum of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Hexadecimal digest of a state dict: names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

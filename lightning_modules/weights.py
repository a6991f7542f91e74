"""Reading weights from files: our checkpoints, official checkpoints, safetensors. Nothing here unpickles code."""

import argparse
import hashlib
import zipfile
from collections.abc import Mapping, Sequence
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

EMA_STATE = "EMA"  # key of the EMA callback's state in a checkpoint


def read_torch(path: str | Path) -> dict[str, Any]:
    """A torch file as tensors and plain values, memory-mapped.

    argparse.Namespace, which official trainers store beside the weights, is the one class allowed; of Lightning 1.x,
    which names its checkpoint callback's class in every file (LDM's are such), that name is read as an empty one.
    Raises FileNotFoundError, or ValueError for a file that is damaged or holds anything else.
    """
    path = existing(path)
    mapped = zipfile.is_zipfile(path)  # files in torch's format of before 2020 can only be read whole
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *LIGHTNING_1]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except DAMAGED as error:
        if "allowed global" in str(error):
            raise ValueError(f"{path} holds more than tensors and plain values, so it is not loaded") from error
        raise ValueError(f"{path} is not a readable torch checkpoint (damaged or cut short?)") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict of weights")
    return content


def existing(path: str | Path) -> Path:
    """The path, or FileNotFoundError if no file is there."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at '{path}': nothing was loaded, nothing was trained")
    return path


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
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file ({error})") from error
    content = read_torch(path)
    if key is None and not any(k in content for k in keys):
        return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    key = key or keys[min(1, len(keys) - 1)]
    if not isinstance(content.get(key), Mapping):
        raise ValueError(
            f"{path} has no weights '{key}'; it has {', '.join(k for k in keys if k in content) or 'none'}"
        )
    return dict(content[key])


def read_own(path: str | Path, key: str | None) -> dict[str, Tensor] | None:
    """Weights of one of our checkpoints ("ema" by default, see `checkpoint_weights`); None for any other file."""
    path = existing(path)
    content = {} if path.suffix == ".safetensors" else read_torch(path)
    return checkpoint_weights(content, key or "ema") if isinstance(content.get("state_dict"), Mapping) else None


def read_checkpoint(path: str | Path, weights: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Constructor arguments and chosen weights (see `checkpoint_weights`) of one of our checkpoints.

    Raises ValueError for a file of another kind.
    """
    content = read_torch(path)
    if "hyper_parameters" not in content or "state_dict" not in content:
        raise ValueError(f"{path} is not a checkpoint of ours: official files are given with OFFICIAL= (from_official)")
    return dict(content["hyper_parameters"]), checkpoint_weights(content, weights)


def ema_state(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """State of the EMA callback inside one of our checkpoints: {"decays": [...], "shadows": [{name: tensor}, ...]}.

    None if the run kept no average.
    """
    state = checkpoint.get("callbacks", {}).get(EMA_STATE)
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


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Hexadecimal digest of a state dict: names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

"""Weights of tokenizers: read from the files that their arguments name, and kept out of checkpoints while frozen.

A frozen tokenizer is stored as its constructor arguments, its file's path among them; the checkpoint holds no copy.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from layers.tokenizers.base import KEYS, Tokenizer
from layers.tokenizers.consistency import ConsistencyTokenizer
from layers.tokenizers.learned import LearnedTokenizer
from lightning_modules.flax_files import is_msgpack, read_msgpack, read_npz
from lightning_modules.weights import existing, file_sha256, read_official, read_own

PREFIX = "tokenizer."  # of a tokenizer's names inside a module
OWN = f"{PREFIX}vae."  # autoencoder trained by this project
SETS = ("model",)  # MAR's kl16.ckpt; LDM's files have "state_dict", as Lightning's have
FLAX_SETS = ("ema_params", "g_params")  # GIVT's beta-VAEs: the average first, which is the one that GIVT uses
TRAINING_ONLY = ("loss.",)  # LDM's files also hold the discriminator and the perceptual network


def load_tokenizer_weights(tokenizer: Tokenizer) -> None:
    """Read the files that a tokenizer names, once; a tokenizer that names none is left alone.

    Raises FileNotFoundError, or ValueError for a file that is damaged, unsafe or of another autoencoder.
    """
    if isinstance(tokenizer, LearnedTokenizer) and tokenizer.weights and not tokenizer.loaded:
        if not Path(tokenizer.weights).is_file():
            raise FileNotFoundError(
                f"no tokenizer at '{tokenizer.weights}': put the file there that the recipe's header names, or give "
                f"another by {KEYS}.weights"
            )
        state, left_out = read_autoencoder(tokenizer.weights)
        tokenizer.load_weights(state, origin=tokenizer.weights)
        rank_zero_info(f"tokenizer: {len(state)} tensors of {tokenizer.weights}{_listing(left_out)}")
    if isinstance(tokenizer, ConsistencyTokenizer) and tokenizer.network is None:
        tokenizer.set_network(read_script(tokenizer.decoder, tokenizer.decoder_sha256))


def read_autoencoder(path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under official names, and the names that were left out: those of training alone.

    Takes MAR's kl16.ckpt, LDM's checkpoints, GIVT's flax files (the average), ours (the average where there is one),
    bare state dicts and safetensors.
    """
    if is_msgpack(path):
        return {f"cnn_{name}": tensor for name, tensor in read_msgpack(path, sets=FLAX_SETS).items()}, []
    if Path(path).suffix == ".npz":
        return read_npz(path), []
    state = read_own(path, None)
    if state is None:
        state = read_official(path, None, keys=SETS)
    if any(name.startswith(OWN) for name in state):
        weights = {name.removeprefix(OWN): tensor for name, tensor in state.items() if name.startswith(OWN)}
        return weights, [name for name in state if not name.startswith(OWN)]
    weights = {name: tensor for name, tensor in state.items() if not name.startswith(TRAINING_ONLY)}
    return weights, [name for name in state if name not in weights]


def read_script(path: str | Path, sha256: str) -> nn.Module:
    """A TorchScript module, on the CPU.

    Loading one runs what is in it, so it can do whatever the process can: only the file whose SHA-256 was stated is
    loaded. Raises FileNotFoundError, or ValueError for a file with another checksum.
    """
    path = existing(path)
    found = file_sha256(path)
    if found != sha256.lower():
        raise ValueError(
            f"{path} has the SHA-256 {found}, not {sha256}: it is code of unknown origin and was not loaded (if you "
            f"trust it, set {KEYS}.decoder_sha256)"
        )
    return torch.jit.load(path, map_location="cpu")


def without_frozen(state: Mapping[str, Tensor], tokenizer: Tokenizer) -> dict[str, Tensor]:
    """A module's state dict without a frozen tokenizer's weights: what a checkpoint holds."""
    return {name: tensor for name, tensor in state.items() if not (tokenizer.frozen and name.startswith(PREFIX))}


def with_frozen(state: Mapping[str, Tensor], tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The inverse: a checkpoint's state dict and the frozen tokenizer's own weights, so that loading stays strict."""
    own = {f"{PREFIX}{name}": tensor for name, tensor in tokenizer.state_dict().items()} if tokenizer.frozen else {}
    return dict(state) | own


def _listing(left_out: list[str]) -> str:
    prefixes = sorted({name.partition(".")[0] for name in left_out})
    return f"; {len(left_out)} of {', '.join(f'{p}.*' for p in prefixes)} left out" if left_out else ""

"""The readers of checkpoints and statistics: tensors by name, or one error that names the file."""

import argparse
import copy
import io
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save

from experiments.image_files import read_images
from lightning_modules.flax_files import is_msgpack, read_msgpack, read_npz
from lightning_modules.jit import JiTModule
from lightning_modules.reference import load_reference
from lightning_modules.tokenizer_weights import read_autoencoder
from lightning_modules.weights import check_whole, read_checkpoint, read_official, read_own, read_torch
from tests.fuzz.guard import fresh, survives
from tests.fuzz.mutations import SCALARS, mutated, mutated_tree, mutated_zip
from tests.lightning_modules.flax_writer import chunked, packed

KEYS = ("model", "model_ema1")
WEIGHTS = {"net.w": torch.arange(6.0).view(2, 3), "net.b": torch.ones(3, dtype=torch.bfloat16)}
SMALL = {
    "net": {"width": 16, "depth": 1, "num_heads": 2, "bottleneck_dim": 8, "in_context_len": 0, "in_context_start": 0},
    "tokenizer": {
        "class_path": "layers.tokenizers.pixels.PixelTokenizer",
        "init_args": {"image_size": 8, "patch_size": 4},
    },
    "num_classes": 3,
}


def ours() -> dict:
    """A checkpoint of a tiny JiT with an average."""
    module = JiTModule(**copy.deepcopy(SMALL))
    state = module.state_dict()
    return {
        "state_dict": dict(state),
        "hyper_parameters": dict(module.hparams),
        "callbacks": {"EMA": {"decays": [0.9], "shadows": [dict(state)]}},
        "global_step": 2,
    }


def torch_file(content, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def npz_file(how=np.savez, **arrays) -> bytes:
    buffer = io.BytesIO()
    how(buffer, **arrays)
    return buffer.getvalue()


OURS = ours()
OFFICIAL = {"model": WEIGHTS, "model_ema1": WEIGHTS, "args": argparse.Namespace(lr=0.1), "epoch": 3}
TORCH = [torch_file(OFFICIAL), torch_file(OURS), torch_file(WEIGHTS)]
OLD = [torch_file(OFFICIAL, _use_new_zipfile_serialization=False)]
SAFE = [save(WEIGHTS), save({"a": torch.zeros(0, 4), "b": torch.ones(5, dtype=torch.uint8)}, {"note": "x"})]
NPZ = [
    npz_file(**{"params/a": np.ones((2, 3), np.float32), "opt/b": np.ones(4)}),
    npz_file(np.savez_compressed, **{"a/b": np.asfortranarray(np.ones((2, 3))), "c": np.int32(3)}),
]
FLAX = [
    packed({"g_params": {"a": WEIGHTS["net.w"], "b": {"c": 1.5}, "d": None}}),
    packed({"ab": chunked(WEIGHTS["net.w"], 2)}),
]
STATS = [
    npz_file(mu=np.zeros(3), sigma=np.eye(3), about='{"n": 5}', features=np.ones((4, 3), np.float32)),
    npz_file(mu=np.zeros(3, np.float32), sigma=np.eye(3), arr_0=np.zeros((2, 4, 4, 3), np.uint8)),
]
SAMPLES = [npz_file(arr_0=np.zeros((2, 4, 4, 3), np.uint8), labels=np.arange(2))]


def check_torch(path):
    """Every reader of torch files."""
    content = survives(lambda: read_torch(path), named=path.name)
    assert content is None or hasattr(content, "items")
    survives(lambda: read_checkpoint(path, "ema"), named="" if content else path.name)
    for state in (
        survives(lambda: read_own(path, None)),
        survives(lambda: read_official(path, None, keys=KEYS), named=path.name),
        (survives(lambda: read_autoencoder(path)) or [None])[0],
    ):
        assert state is None or all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    survives(lambda: check_whole(path), named=path.name)


@given(data=mutated(TORCH) | mutated_zip(TORCH))
def test_torch_files(data, tmp_path):
    check_torch(fresh(tmp_path, data, ".pth"))


@given(data=mutated(OLD))
def test_torch_files_of_the_old_format(data, tmp_path):
    check_torch(fresh(tmp_path, data, ".ckpt"))


@given(data=st.binary(max_size=64))
def test_files_that_are_none(data, tmp_path):
    check_torch(fresh(tmp_path, data, ".ckpt"))
    for suffix in (".safetensors", ".npz", ""):
        path = fresh(tmp_path, data, suffix)
        survives(lambda path=path: read_autoencoder(path), named=path.name)


WITHOUT_ARGUMENTS = {key: value for key, value in OURS.items() if key != "hyper_parameters"}


@example(content=WITHOUT_ARGUMENTS | {"callbacks": None}, kept=True)  # found by an hour of it
@given(content=mutated_tree(WITHOUT_ARGUMENTS, values=SCALARS | st.just(torch.zeros(2))), kept=st.booleans())
def test_contents_of_our_checkpoints(content, kept, tmp_path):
    arguments = OURS["hyper_parameters"] if kept else ["net"]
    path = fresh(tmp_path, torch_file({"hyper_parameters": arguments} | content), ".ckpt")
    check_torch(path)
    survives(lambda: JiTModule.load_from_checkpoint(path))


# sizes are those of small networks: as many layers as a file asks for are made, though none has memory before it fits
SIZES = st.integers(-2, 40) | st.floats(-1, 2) | st.none() | st.text(max_size=4) | st.sampled_from(["x", "eps", "heun"])


@given(arguments=mutated_tree(OURS["hyper_parameters"], values=SIZES))
def test_arguments_of_our_checkpoints(arguments, tmp_path):
    path = fresh(tmp_path, torch_file(OURS | {"hyper_parameters": arguments}), ".ckpt")
    survives(lambda: JiTModule.load_from_checkpoint(path))


@given(data=mutated(SAFE))
def test_safetensors(data, tmp_path):
    path = fresh(tmp_path, data, ".safetensors")
    survives(lambda: read_official(path, None, keys=KEYS), named=path.name)


@given(data=mutated(NPZ) | mutated_zip(NPZ))
def test_npz(data, tmp_path):
    path = fresh(tmp_path, data, ".npz")
    survives(lambda: read_npz(path), named=path.name)


@given(data=mutated(FLAX))
def test_msgpack(data, tmp_path):
    path = fresh(tmp_path, data)
    survives(lambda: is_msgpack(path), named=path.name)
    survives(lambda: read_msgpack(path, sets=("g_params",)), named=path.name)
    survives(lambda: read_msgpack(path), named=path.name)


@given(data=mutated(STATS) | mutated_zip(STATS))
def test_statistics(data, tmp_path):
    path = fresh(tmp_path, data, ".npz")
    survives(lambda: load_reference(path), named=path.name)


@given(data=mutated(SAMPLES) | mutated_zip(SAMPLES))
def test_samples(data, tmp_path):
    path = fresh(tmp_path, data, ".npz")
    survives(lambda: read_images(path), named=path.name)


def test_a_view_of_few_bytes_is_no_tensor_of_many(tmp_path):
    """expand() costs a file nothing; whoever copied it would take a terabyte."""
    torch.save({"w": torch.zeros(1).expand(2**38)}, tmp_path / "wide.pth")
    with pytest.raises(ValueError, match=r"wide\.pth is not a readable torch checkpoint"):
        read_torch(tmp_path / "wide.pth")


def test_a_network_that_does_not_fit_the_weights_costs_no_memory(tmp_path):
    arguments = copy.deepcopy(OURS["hyper_parameters"])
    arguments["net"]["width"] = 2**20
    torch.save(OURS | {"hyper_parameters": arguments}, tmp_path / "wide.ckpt")
    assert survives(lambda: JiTModule.load_from_checkpoint(tmp_path / "wide.ckpt"), named="wide.ckpt") is None


def test_a_compressed_torch_file_is_not_unpacked(tmp_path):
    torch.save({"w": torch.zeros(2**24)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    assert (tmp_path / "small.pth").stat().st_size < 2**20
    with pytest.raises(ValueError, match=r"small\.pth is not a readable torch checkpoint"):
        read_torch(tmp_path / "small.pth")

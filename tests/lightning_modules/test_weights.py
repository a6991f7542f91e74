"""Reading weights: nothing is run, nothing is guessed, nothing is loaded in part."""

import argparse
import os
import pickle
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from lightning_modules.weights import checkpoint_weights, ema_state, read_official, read_torch

KEYS = ("model", "model_ema1", "model_ema2")


def state(value: float) -> dict[str, torch.Tensor]:
    return {"net.w": torch.full((2, 3), value), "net.b": torch.full((3,), -value)}


def assert_state(actual, value: float):
    assert list(actual) == ["net.w", "net.b"] or sorted(actual) == ["net.b", "net.w"]
    assert all(torch.equal(actual[name], tensor) for name, tensor in state(value).items())


class Malicious:
    """Unpickling makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))])
@pytest.mark.parametrize("read", [read_torch, lambda path: read_official(path, None, keys=KEYS)])
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path, write, read):
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    write({"model": state(1.0), "args": Malicious(trace)}, path)
    with pytest.raises(ValueError, match=r"evil\.pth"):
        read(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if write is torch.save else pickle.loads(path.read_bytes())
    assert trace.exists(), "the file must be one that does harm when unpickled"


def test_namespaces_of_official_trainers_are_read(tmp_path):
    torch.save({"model": state(1.0), "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pth")
    content = read_torch(tmp_path / "a.pth")
    assert content["args"].lr == 0.1
    assert_state(content["model"], 1.0)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_an_error_naming_it(tmp_path, share):
    path = tmp_path / "cut.pth"
    torch.save({"model": {"w": torch.randn(100, 10)}}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"cut\.pth is not a readable torch checkpoint"):
        read_torch(path)


@pytest.mark.parametrize("content", [b"<html>not found</html>" * 50, bytes(range(256)) * 8])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_of_another_kind_is_an_error_naming_it(tmp_path, content, suffix):
    path = tmp_path / f"page{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"page.* is not a readable"):
        read_official(path, None, keys=KEYS)


def test_a_file_that_holds_no_dict_is_an_error_naming_its_type(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        read_torch(tmp_path / "list.pth")


@pytest.mark.parametrize("name", ["none.pth", "none.safetensors", ""])
def test_a_missing_file_or_a_folder_is_never_taken_for_an_empty_start(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="nothing was loaded"):
        read_official(tmp_path / name, None, keys=KEYS)


@pytest.mark.parametrize(("key", "value"), [(None, 2.0), ("model", 1.0), ("model_ema1", 2.0), ("model_ema2", 3.0)])
def test_key_picks_the_set_and_the_first_average_is_the_default(tmp_path, key, value):
    torch.save({name: state(i + 1.0) for i, name in enumerate(KEYS)} | {"epoch": 3}, tmp_path / "a.pth")
    assert_state(read_official(tmp_path / "a.pth", key, keys=KEYS), value)


def test_a_method_without_averages_takes_its_only_set(tmp_path):
    torch.save({"model": state(5.0)}, tmp_path / "a.pth")
    assert_state(read_official(tmp_path / "a.pth", None, keys=("model",)), 5.0)


@pytest.mark.parametrize("key", ["model_ema2", "modle", None])
def test_a_wrong_key_is_an_error_listing_those_that_are_there(tmp_path, key):
    torch.save({"model": state(1.0), "epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"no weights '{key or 'model_ema1'}'; it has model$"):
        read_official(tmp_path / "a.pth", key, keys=KEYS)


def test_a_bare_state_dict_is_taken_as_it_is(tmp_path):
    torch.save(state(4.0), tmp_path / "a.pth")
    assert_state(read_official(tmp_path / "a.pth", None, keys=KEYS), 4.0)


def test_safetensors_hold_one_set(tmp_path):
    save_file(state(4.0), tmp_path / "a.safetensors")
    assert_state(read_official(tmp_path / "a.safetensors", None, keys=KEYS), 4.0)


def test_a_truncated_safetensors_file_is_an_error_naming_it(tmp_path):
    path = tmp_path / "cut.safetensors"
    save_file(state(4.0), path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"cut\.safetensors is not a readable safetensors file"):
        read_official(path, None, keys=KEYS)


def checkpoint(*, ema: bool) -> dict:
    """Raw weights 1, buffer 9; averages 2 (0.9) and 3 (0.5) of the trainable weight only."""
    content = {"state_dict": state(1.0) | {"table": torch.full((1,), 9.0)}}
    if ema:
        shadows = [{"net.w": torch.full((2, 3), value)} for value in (2.0, 3.0)]
        content["callbacks"] = {"EMA": {"decays": [0.9, 0.5], "shadows": shadows}}
    return content


@pytest.mark.parametrize(("weights", "value"), [("raw", 1.0), ("ema", 2.0), ("0.9", 2.0), ("0.5", 3.0)])
def test_choice_of_weights_replaces_what_was_averaged_and_keeps_the_rest(weights, value):
    content = checkpoint(ema=True)
    chosen = checkpoint_weights(content, weights)
    assert chosen["net.w"].unique().tolist() == [value]
    assert chosen["net.b"].unique().tolist() == [-1.0] and chosen["table"].item() == 9
    assert content["state_dict"]["net.w"].unique().tolist() == [1.0], "the checkpoint itself must not change"


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_without_averages_raw_weights_are_taken(weights):
    content = checkpoint(ema=False)
    assert ema_state(content) is None
    assert checkpoint_weights(content, weights)["net.w"].unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("ema", "message"), [(True, r"no weights '0\.99'.* raw, ema, 0\.9, 0\.5$"), (False, r"no weights '0\.99'.* raw$")]
)
def test_a_decay_that_was_not_kept_is_an_error_listing_those_that_were(ema, message):
    with pytest.raises(ValueError, match=message):
        checkpoint_weights(checkpoint(ema=ema), "0.99")


def test_a_file_of_lightning_1_that_names_its_callback_loads(tmp_path, monkeypatch):
    """LDM's checkpoints have the callback's class as a key; no such package is needed, nor trusted."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    content = {"state_dict": state(1.0), "callbacks": {module.ModelCheckpoint: {"best": torch.zeros(1)}}}
    torch.save(content, tmp_path / "ldm.ckpt")
    monkeypatch.undo()
    read = read_torch(tmp_path / "ldm.ckpt")
    assert read["state_dict"].keys() == content["state_dict"].keys()


@pytest.mark.parametrize("content", [b"hello", b"\x80\x02}", b"", b"version https://git-lfs", bytes(range(256))])
def test_files_that_are_no_checkpoint_are_one_error(tmp_path, content):
    path = tmp_path / "file.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a readable torch checkpoint"):
        read_torch(path)

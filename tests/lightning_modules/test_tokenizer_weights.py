"""Files of tokenizers' weights, and checkpoints without them."""

import hashlib

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from layers.tokenizers.consistency import ConsistencyTokenizer
from layers.tokenizers.kl_vae import KLVAETokenizer
from layers.tokenizers.pixels import PixelTokenizer
from layers.tokenizers.vq import VQTokenizer
from lightning_modules import tokenizer_weights
from lightning_modules.tokenizer_weights import (
    load_tokenizer_weights,
    read_autoencoder,
    with_frozen,
    without_frozen,
)

ARCH = {
    "base_channels": 4,
    "multipliers": [1, 1],
    "num_res_blocks": 1,
    "z_channels": 4,
    "encoder_attention": [],
    "norm_groups": 2,
}


def tokenizer(path=None, **changes) -> KLVAETokenizer:
    return KLVAETokenizer(8, arch=ARCH, latent_scale=1.0, weights=path and str(path), **changes)


@pytest.fixture
def source() -> dict[str, torch.Tensor]:
    return tokenizer().vae.state_dict()


def loss_entries() -> dict[str, torch.Tensor]:
    return {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(2)}


def own_checkpoint(source) -> dict:
    state = {f"tokenizer.vae.{n}": t for n, t in source.items()} | {"discriminator.weight": torch.zeros(1)}
    return {"state_dict": state, "hyper_parameters": {}}


KINDS = {
    "mar": lambda s: {"model": s},
    "ldm": lambda s: {"state_dict": s | loss_entries(), "epoch": 3},
    "own": own_checkpoint,
    "bare": lambda s: dict(s),
}


def equal(built: KLVAETokenizer, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(t, state[n]) for n, t in built.vae.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_torch_file_is_read(kind, source, tmp_path):
    path = tmp_path / "file.ckpt"
    torch.save(KINDS[kind](source), path)
    built = tokenizer(path)
    assert not equal(built, source)
    load_tokenizer_weights(built)
    assert built.loaded and equal(built, source)
    assert built.encode_image(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape == (1, 8, 4, 4)


def test_safetensors_are_read(source, tmp_path):
    save_file(source, tmp_path / "file.safetensors")
    built = tokenizer(tmp_path / "file.safetensors")
    load_tokenizer_weights(built)
    assert equal(built, source)


def test_what_is_for_training_alone_is_left_out_and_said(source, tmp_path, monkeypatch):
    path, said = tmp_path / "ldm.ckpt", []
    torch.save(KINDS["ldm"](source), path)
    monkeypatch.setattr(tokenizer_weights, "rank_zero_info", said.append)
    assert sorted(read_autoencoder(path)[1]) == sorted(loss_entries())
    load_tokenizer_weights(tokenizer(path))
    assert len(said) == 1 and f"{len(source)} tensors of {path}; 2 of loss.* left out" in said[0]


def test_average_of_our_own_checkpoint_is_taken(source, tmp_path):
    content = own_checkpoint(source)
    shadow = {n: t + 1 for n, t in content["state_dict"].items()}
    content["callbacks"] = {"EMA": {"decays": [0.9], "shadows": [shadow]}}
    torch.save(content, tmp_path / "own.ckpt")
    built = tokenizer(tmp_path / "own.ckpt")
    load_tokenizer_weights(built)
    assert equal(built, {n: t + 1 for n, t in source.items()})


def test_a_file_of_another_autoencoder_is_an_error_naming_file_and_names(source, tmp_path):
    path = tmp_path / "other.ckpt"
    state = source | {"first_stage.extra": torch.zeros(1)}
    del state["decoder.conv_in.bias"]
    state["quant_conv.bias"] = torch.zeros(3)
    torch.save({"model": state}, path)
    message = r"other\.ckpt.*missing \(decoder\.conv_in\.bias\).*first_stage\.extra.*quant_conv\.bias \(3,\)"
    with pytest.raises(ValueError, match=message):
        load_tokenizer_weights(tokenizer(path))


def test_missing_unsafe_and_broken_files_are_clear_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.ckpt"):
        load_tokenizer_weights(tokenizer(tmp_path / "absent.ckpt"))
    torch.save({"model": nn.Linear(1, 1)}, tmp_path / "code.ckpt")
    with pytest.raises(ValueError, match=r"code\.ckpt holds more than tensors"):
        load_tokenizer_weights(tokenizer(tmp_path / "code.ckpt"))
    (tmp_path / "broken.ckpt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken\.ckpt is not a readable"):
        load_tokenizer_weights(tokenizer(tmp_path / "broken.ckpt"))


def test_nothing_is_read_twice_or_for_tokenizers_that_name_no_file(source, tmp_path):
    path = tmp_path / "once.ckpt"
    torch.save({"model": source}, path)
    built = tokenizer(path)
    load_tokenizer_weights(built)
    path.unlink()
    load_tokenizer_weights(built)
    load_tokenizer_weights(tokenizer())
    load_tokenizer_weights(PixelTokenizer(8, 2))


def test_codebook_comes_with_the_weights(tmp_path):
    first = VQTokenizer(8, arch=ARCH | {"double_z": False}, num_codes=16)
    torch.save({"state_dict": first.vae.state_dict() | loss_entries()}, tmp_path / "vq.ckpt")
    second = VQTokenizer(8, arch=ARCH | {"double_z": False}, num_codes=16, weights=str(tmp_path / "vq.ckpt"))
    load_tokenizer_weights(second)
    assert torch.equal(second.vae.quantize.embedding.weight, first.vae.quantize.embedding.weight)


class Module(nn.Module):
    def __init__(self, inner) -> None:
        super().__init__()
        self.tokenizer, self.net = inner, nn.Linear(2, 2)


def test_checkpoints_hold_no_frozen_tokenizer_and_load_strictly(source, tmp_path):
    torch.save({"model": source}, tmp_path / "kl.ckpt")
    trained, fresh = Module(tokenizer(tmp_path / "kl.ckpt")), Module(tokenizer(tmp_path / "kl.ckpt"))
    stored = without_frozen(trained.state_dict(), trained.tokenizer)
    assert sorted(stored) == ["net.bias", "net.weight"]
    load_tokenizer_weights(fresh.tokenizer)
    fresh.load_state_dict(with_frozen(stored, fresh.tokenizer), strict=True)
    assert torch.equal(fresh.net.weight, trained.net.weight) and equal(fresh.tokenizer, source)


@pytest.mark.parametrize("inner", [lambda: tokenizer(frozen=False), lambda: PixelTokenizer(8, 2)])
def test_a_trained_tokenizer_stays_in_the_checkpoint(inner):
    module = Module(inner())
    state = module.state_dict()
    assert without_frozen(state, module.tokenizer).keys() == state.keys()
    assert with_frozen({}, module.tokenizer) == {}


class Script(nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x], dim=1) * (t.view(-1, 1, 1, 1) / 1024) + features.mean()


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "decoder.pt"
    torch.jit.script(Script()).save(str(path))
    return path


def consistency(path, sha256) -> ConsistencyTokenizer:
    arch = ARCH | {"multipliers": [1, 1, 1, 1]}
    return ConsistencyTokenizer(16, arch=arch, latent_scale=1.0, decoder=str(path), decoder_sha256=sha256)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")  # of torch.jit: the published file is TorchScript
def test_script_of_the_stated_checksum_is_run(script):
    built = consistency(script, hashlib.sha256(script.read_bytes()).hexdigest().upper())
    load_tokenizer_weights(built)
    x = torch.randn(2, 1, 16)
    plain = consistency(script, "")
    plain.set_network(Script())
    torch.testing.assert_close(built.decode(x), plain.decode(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_script_of_another_checksum_is_not_loaded(script, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=r"decoder\.pt has the SHA-256 [0-9a-f]{64}, not c9ce.* was not loaded"):
        load_tokenizer_weights(consistency(script, "c9ce"))
    with pytest.raises(FileNotFoundError, match="absent"):
        load_tokenizer_weights(consistency("absent.pt", "c9ce"))

"""GIVT's beta-VAE against the official code: numbers of the network and its tokens, names of the released files, and
both containers that GIVT's weights come in.

Cases are discovered; sizes and options are read from each case. Tolerances are those of the golden README.
"""

import re

import pytest
import torch
from torch import Tensor

from layers.checkpoint import to_official
from layers.maskgit_autoencoder import MaskGITAutoencoderConfig, flax_rules
from layers.tokenizers.beta_vae import BetaVAETokenizer
from lightning_modules.flax_files import read_msgpack, read_npz
from tests.golden_cases import Golden, case_id, golden_paths, read_json

METHOD = "givt"
BLOCK = re.compile(r"(.*/EncDecBlock)(\d+)(/.*)")


def golden(pattern: str):
    return pytest.mark.parametrize("path", golden_paths(METHOD, pattern), ids=case_id)


def architecture(config: dict) -> MaskGITAutoencoderConfig:
    """Of a case or of the manifest, in official names; what we have no option for must be as it always is."""
    fixed = {"conv_downsample": False, "activation_fn": "swish", "norm_type": "GN"}
    assert {name: config.get(name, value) for name, value in fixed.items()} == fixed
    return MaskGITAutoencoderConfig(
        base_channels=config.get("filters", 128),
        multipliers=config["channel_multipliers"],
        num_res_blocks=config.get("num_res_blocks", 2),
        z_channels=config["codeword_dim"],
        unit_range=config.get("malib_ckpt", False),
    )


def channels_first(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2)


def tokenizer_of(g: Golden, config: dict) -> BetaVAETokenizer:
    patch = config.get("pixel_shuffle_patch_size", [1, 1])
    tokenizer = BetaVAETokenizer(g["image"].shape[1], patch, arch=architecture(config))
    weights = {name.removeprefix("params/"): g[name] for name in g.names() if name.startswith("params/")}
    tokenizer.load_weights(weights, origin=str(g.path))
    return tokenizer


@golden("**/cnnvae*.safetensors")
def test_golden_vae(path):
    with Golden(path) as g, torch.no_grad():
        tokenizer = tokenizer_of(g, read_json(path.with_suffix(".json")))
        vae, raw = tokenizer.vae, tokenizer.vae.encode(channels_first(g["image"]))
        posterior = tokenizer.posterior(raw)
        noise = tokenizer.join(g["eps"])
        assert tuple(g["eps"].shape[1:]) == (tokenizer.seq_len, tokenizer.token_dim)
        seen = {
            "encoder_raw": raw.permute(0, 2, 3, 1),
            "mu": tokenizer.cut(posterior.mean),
            "logvar": tokenizer.cut(posterior.logvar),
            "kl_per_image": posterior.kl(),
            "z": tokenizer.encode_raw(raw, lambda shape: noise.view(*shape)).x,
            "decoder_raw": vae.decoder(tokenizer.join(g["z_in"])).permute(0, 2, 3, 1),
            "decoded": tokenizer.decode(g["z_in"]).permute(0, 2, 3, 1),
            "decoded_mu": tokenizer.decode(g["mu"]).permute(0, 2, 3, 1),
        }
        inputs = {"image", "eps", "z_in", *(name for name in g.names() if name.startswith("params/"))}
        assert set(g.names()) == {*seen, *inputs}
        for name, value in seen.items():
            bounds = {"atol": 1e-4, "rtol": 0} if name.startswith("decoded") else {"atol": 5e-5, "rtol": 1e-4}
            torch.testing.assert_close(value, g[name], **bounds, msg=lambda text, n=name: f"{n}: {text}")


@golden("**/manifest.json")
def test_golden_manifest_of_the_released_vaes(path):
    """Exactly the official names and shapes, and the number of parameters."""
    entries = [e for e in read_json(path).values() if "cnn_encoder/Conv_0/kernel" in e.get("params", {})]
    for entry in entries:
        arch = architecture(entry["model"])
        with torch.device("meta"):
            state = BetaVAETokenizer(16 * arch.stride, arch=arch).vae.state_dict()
        official = {name: list(tensor.shape) for name, tensor in to_official(state, flax_rules(arch)).items()}
        assert official == entry["params"]
        assert sum(tensor.numel() for tensor in state.values()) == entry["num_params_total"]
        if entry["num_params_total"] == 53_032_611:
            assert arch == MaskGITAutoencoderConfig()  # the default is what was released


@golden("**/*.msgpack")
def test_golden_container_of_the_released_vaes(path):
    state, expected = read_msgpack(path), read_json(path.with_suffix(".json"))
    assert state.keys() == expected.keys()
    for name, (shape, dtype, total) in expected.items():
        assert list(state[name].shape) == shape and str(state[name].dtype) == f"torch.{dtype}", name
        assert state[name].double().sum().item() == pytest.approx(total, rel=1e-9, abs=1e-9), name
    for chosen in {name.partition("/")[0] for name in expected if "/" in name}:
        below = read_msgpack(path, sets=("absent", chosen))
        assert all(torch.equal(tensor, state[f"{chosen}/{name}"]) for name, tensor in below.items())
        assert len(below) == sum(name.startswith(f"{chosen}/") for name in expected)


def stacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Blocks of one name each -> one name for all, stacked along axis 1; others as they are."""
    layers: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        if match := BLOCK.fullmatch(name):
            layers.setdefault(match[1] + match[3], {})[int(match[2])] = tensor
    found = {name: tensor for name, tensor in state.items() if not BLOCK.fullmatch(name)}
    return found | {name: torch.stack([t[i] for i in range(len(t))], dim=1) for name, t in layers.items()}


@golden("**/*_params_*.npz")
def test_golden_npz_holds_the_parameters_of_its_case(path):
    case = path.with_name(path.name.partition("_params_")[0] + ".safetensors")
    with Golden(case, partial=True) as g:
        expected = {name.removeprefix("params/"): g[name] for name in g.names() if name.startswith("params/")}
    state, expected = stacked(read_npz(path)), stacked(expected)
    assert state.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(state[name], tensor)] == []

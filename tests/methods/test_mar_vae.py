"""MAR's tokenizers against the official code: the KL autoencoders, the names of KL-16, and the order inside a patch.

Cases are discovered; sizes and options are read from each case. Tolerances are those of the golden README.
"""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from layers.conv_autoencoder import NORM_EPS, AutoencoderConfig, ConvAutoencoder, Posterior
from layers.patch import channel_major_to_ours, ours_to_channel_major, patchify, unpatchify
from layers.tokenizers.kl_vae import KLVAETokenizer
from tests.golden_cases import Golden, case_id, golden_paths, read_json

METHOD = "mar"
DECODED = {"decoded_mean", "decoded_sample"}
SUFFIX = "_config.json"


def golden(pattern: str):
    return pytest.mark.parametrize("path", golden_paths(METHOD, pattern), ids=case_id)


def architecture(config: dict) -> AutoencoderConfig:
    assert config["norm_eps"] == NORM_EPS  # no option of ours
    return AutoencoderConfig(
        base_channels=config["ch"],
        multipliers=config["mult"],
        num_res_blocks=config["nrb"],
        z_channels=config["z"],
        embed_channels=config["embed"],
        double_z=config["double_z"],
        resolution=config["res"],
        encoder_attention=config["enc_attn"],
        decoder_attention=config["dec_attn"],
        norm_groups=config["norm_groups"],
    )


def weights(path: Path) -> dict[str, Tensor]:
    """All weight files of a case: one, or one for each half."""
    files = sorted(path.parent.glob(path.name.replace(SUFFIX, "_weights*.safetensors")))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def tokenizer_of(path: Path) -> KLVAETokenizer:
    config = read_json(path)
    tokenizer = KLVAETokenizer(config["image_resolution_fed"], arch=architecture(config), latent_scale=0.5)
    tokenizer.load_weights(weights(path), origin=str(path))
    return tokenizer


def run(vae: ConvAutoencoder, g: Golden) -> dict[str, Tensor]:
    """Everything that the golden file holds besides its inputs."""
    seen: dict[str, Tensor] = {}
    for name, module in {
        "encoder_out": vae.encoder,
        "encoder_mid_attn_out": vae.encoder.mid.attn_1,
        "decoder_conv_in_out": vae.decoder.conv_in,
        "decoder_mid_out": vae.decoder.mid,
    }.items():
        module.register_forward_hook(lambda _, inputs, output, name=name: seen.__setitem__(name, output))
    seen["moments"] = vae.encode(g["image"])
    posterior, extreme = Posterior(seen["moments"]), Posterior(g["extreme_moments"])
    seen["sample"] = posterior.sample(g["sample_noise"])
    seen["decoded_sample"] = vae.decode(seen["sample"])
    seen["decoded_mean"] = vae.decode(posterior.mean)  # last: the hooks keep the decoder's inner values of the mean
    seen |= {"mean": posterior.mean, "logvar": posterior.logvar, "std": posterior.std, "kl": posterior.kl()}
    return seen | {"extreme_mean": extreme.mean, "extreme_logvar": extreme.logvar, "extreme_std": extreme.std}


@golden(f"**/vae_*{SUFFIX}")
def test_golden_vae(path):
    vae = tokenizer_of(path).vae
    with Golden(path.with_name(path.name.replace(SUFFIX, ".safetensors"))) as g, torch.no_grad():
        seen = run(vae, g)
        assert set(g.names()) == {*seen, "image", "sample_noise", "extreme_moments"}
        for name, value in seen.items():
            bound = 5e-5 if name in DECODED else 1e-5 * max(1.0, g[name].abs().max().item())
            torch.testing.assert_close(value, g[name], atol=bound, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


@golden(f"**/vae_*{SUFFIX}")
def test_golden_tokens_are_scaled_samples_and_decode_to_the_image(path):
    tokenizer = tokenizer_of(path)
    with Golden(path.with_name(path.name.replace(SUFFIX, ".safetensors")), partial=True) as g, torch.no_grad():
        tokens = tokenizer.encode_raw(g["moments"], torch.Generator().manual_seed(3)).x
        noise = torch.randn(g["mean"].shape, generator=torch.Generator().manual_seed(3))
        expected = (g["mean"] + g["std"] * noise) * 0.5
        assert tokens.shape == (len(g["image"]), tokenizer.seq_len, tokenizer.token_dim)
        torch.testing.assert_close(tokens, patchify(expected, 1), atol=1e-6, rtol=1e-6)
        images = tokenizer.decode(patchify(g["sample"] * 0.5, 1))
        torch.testing.assert_close(images, g["decoded_sample"], atol=5e-5, rtol=0)


@golden("**/manifest_kl16.json")
def test_golden_manifest_of_the_released_kl16(path):
    """Exactly the official names and shapes."""
    manifest = read_json(path)
    with torch.device("meta"):
        state = KLVAETokenizer(256).vae.state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == manifest
    assert sum(tensor.numel() for tensor in state.values()) == sum(math.prod(shape) for shape in manifest.values())


@golden("**/patchify.safetensors")
def test_golden_patches(path):
    """Official tokens hold a patch channel by channel, ours position by position."""
    with Golden(path) as g:
        image, channels = g["image"], g["image"].shape[1]
        patch = math.isqrt(g["tokens"].shape[-1] // channels)
        grid = (image.shape[2] // patch, image.shape[3] // patch)
        to_ours, to_official = channel_major_to_ours(patch, channels), ours_to_channel_major(patch, channels)
        assert torch.equal(patchify(image, patch)[..., to_official], g["tokens"])
        assert torch.equal(patchify(image, patch), g["tokens"][..., to_ours])
        assert torch.equal(unpatchify(g["tokens2"][..., to_ours], patch, grid), g["image2"])

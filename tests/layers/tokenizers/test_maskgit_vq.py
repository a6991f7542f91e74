"""MaskGIT's VQGAN against the official code: network, ids, bytes, names of the released file; and what it promises.

Cases are discovered; sizes and options are read from each case. Tolerances are those of the golden README.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

from layers.tokenizers.base import from_uint8, to_uint8
from layers.tokenizers.maskgit_vq import MASKGIT_CODES, MaskGITVQConfig, MaskGITVQTokenizer
from layers.tokenizers.vq import VQTokenizer
from lightning_modules.config import as_tokenizer, tokenizer_config
from lightning_modules.tokenizer_weights import load_tokenizer_weights
from tests.golden_cases import Golden, case_id, golden_paths, read_json

METHOD = "rar"
SUFFIX = "config.json"
ARCH = {"base_channels": 8, "multipliers": [1, 2], "num_res_blocks": 1, "z_channels": 4, "norm_groups": 4}


def golden(pattern: str):
    return pytest.mark.parametrize("path", golden_paths(METHOD, pattern), ids=case_id)


def tokenizer_of(path: Path, image_size: int) -> MaskGITVQTokenizer:
    """The tokenizer of a case: its config, and all its weight files, one or one for each half."""
    config = read_json(path)
    arch = MaskGITVQConfig(
        base_channels=config["hidden_channels"],
        multipliers=config["channel_mult"],
        num_res_blocks=config["num_res_blocks"],
        z_channels=config["z_channels"],
    )
    files = sorted(path.parent.glob(path.name.replace(SUFFIX, "weights*.safetensors")))
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    tokenizer = MaskGITVQTokenizer(image_size, arch=arch, num_codes=config["num_embeddings"])
    tokenizer.load_weights(state, origin=str(path))
    return tokenizer


def outputs(tokenizer: MaskGITVQTokenizer, g: Golden) -> dict[str, Tensor]:
    """Everything that the golden file holds besides its inputs, by ids that are the official ones."""
    vae, size = tokenizer.vae, tokenizer.latent_size
    z = vae.encoder(g["image"])
    ids = vae.quantize.nearest(z)
    z_q, random_z = vae.quantize.latents(ids, size), vae.quantize.latents(g["random_indices"], size)
    return {
        "z": z,
        "distances": vae.quantize.distances(z),
        "indices": ids,
        "z_q": z_q,
        "decode_raw": vae.decoder(z_q),
        "decode_image": tokenizer.unit_images(ids),
        "decode_uint8": rearrange(to_uint8(tokenizer.decode(ids)), "b c h w -> b h w c"),
        "random_decode_raw": vae.decoder(random_z),
        "random_decode_image": tokenizer.unit_images(g["random_indices"]),
    }


@golden(f"**/vq_*{SUFFIX}")
def test_golden_network_ids_and_bytes(path):
    with Golden(path.with_name(path.name.replace(SUFFIX, "io.safetensors"))) as g, torch.no_grad():
        seen = outputs(tokenizer_of(path, g["image"].shape[-1]), g)
        assert set(g.names()) == {*seen, "image", "random_indices"}
        assert torch.equal(seen.pop("indices"), g["indices"])
        off = (seen.pop("decode_uint8").int() - g["decode_uint8"].int()).abs()
        assert off.max() <= 1 and (off > 0).float().mean() < 1e-3
        for name, value in seen.items():
            # a distance is a difference of squares, which are as large as the largest
            bound = 5e-5 * (max(1.0, g[name].abs().max().item()) if name == "distances" else 1.0)
            torch.testing.assert_close(value, g[name], atol=bound, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def architecture(shapes: Mapping[str, Sequence[int]]) -> MaskGITVQConfig:
    """Of the network that has parameters of these names and shapes."""
    levels = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("encoder.down."))
    base = shapes["encoder.conv_in.weight"][0]
    return MaskGITVQConfig(
        base_channels=base,
        multipliers=[shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] // base for i in range(levels)],
        num_res_blocks=1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("encoder.mid.")),
        z_channels=shapes["encoder.conv_out.weight"][0],
    )


@golden("**/manifest_maskgit_vqgan*.json")
def test_golden_manifest_of_the_released_file(path):
    """Exactly the official names and shapes."""
    manifest = read_json(path)
    arch, num_codes = architecture(manifest), manifest["quantize.embedding.weight"][0]
    with torch.device("meta"):
        tokenizer = MaskGITVQTokenizer(16 * arch.stride, arch=arch, num_codes=num_codes)
    assert {name: list(tensor.shape) for name, tensor in tokenizer.vae.state_dict().items()} == manifest
    total = sum(math.prod(shape) for shape in manifest.values())
    if total == 54_515_587:
        assert (arch, num_codes) == (MaskGITVQConfig(), MASKGIT_CODES)  # the defaults are what was released


def build(*, load: bool = True, **changes) -> MaskGITVQTokenizer:
    tokenizer = MaskGITVQTokenizer(16, **{"arch": ARCH, "num_codes": 32} | changes)
    torch.nn.init.normal_(tokenizer.vae.quantize.embedding.weight)
    if load:
        tokenizer.load_weights(tokenizer.vae.state_dict(), origin="itself")
    return tokenizer


def pictures(batch: int = 2) -> Tensor:
    return torch.randint(0, 256, (batch, 3, 16, 16), dtype=torch.uint8)


def test_the_released_network_gives_256_ids_of_1024():
    with torch.device("meta"):
        tokenizer = MaskGITVQTokenizer(256)
    counts = [sum(p.numel() for p in part.parameters()) for part in tokenizer.vae.children()]
    assert counts == [23_775_104, 30_478_339, 262_144]
    assert (tokenizer.grid, tokenizer.seq_len, tokenizer.vocab_size, tokenizer.token_dim) == ((16, 16), 256, 1024, 1)


def test_ids_have_the_interface_of_vq_16():
    """So that whatever takes ids takes either."""
    ours, other = build(), VQTokenizer(16, arch=ARCH | {"double_z": False}, num_codes=32)
    other.load_weights(other.vae.state_dict(), origin="itself")
    for name in ("grid", "seq_len", "vocab_size", "token_dim", "image_size", "frozen"):
        assert getattr(ours, name) == getattr(other, name)
    for tokenizer in (ours, other):
        raw = tokenizer.encode_image(pictures())
        x, logdet = tokenizer.encode_raw(raw.to(torch.int32))
        assert raw.shape == (2, 64) and raw.dtype == x.dtype == torch.int64 and logdet is None
        assert tokenizer.decode(x).shape == (2, 3, 16, 16)


def test_pixels_are_in_0_to_1_inside_and_ids_those_of_the_nearest_codes():
    tokenizer, images = build(), pictures()
    z = tokenizer.vae.encoder(images / 255)
    torch.testing.assert_close(tokenizer.vae.encode(from_uint8(images)), z)
    codes = tokenizer.vae.quantize.embedding.weight
    expected = torch.cdist(z.flatten(2).mT.double(), codes.double()).argmin(-1)
    assert torch.equal(tokenizer.encode_image(images), expected)


def test_grey_levels_are_cut_down_not_rounded():
    """Official: uint8(255 * clamp(x, 0, 1)), which truncates."""
    tokenizer = build()
    ids = torch.randint(0, 32, (4, 64))
    torch.nn.init.constant_(tokenizer.vae.decoder.conv_out.bias, 0.5)  # values on both sides of each bound
    unit = tokenizer.unit_images(ids)
    assert unit.min() == 0 and unit.max() == 1
    truncated = (unit * 255).to(torch.uint8)
    assert torch.equal(to_uint8(tokenizer.decode(ids)), truncated)
    assert not torch.equal(to_uint8(unit * 2 - 1), truncated), "rounding would show"


def test_every_grey_level_survives_the_way_to_bytes(monkeypatch):
    tokenizer, levels = build(), torch.arange(256.0)
    monkeypatch.setattr(tokenizer, "unit_images", lambda ids: levels.clamp(max=254.999) / 255 + 0.5 / 255)
    assert torch.equal(to_uint8(tokenizer.decode(None)), levels.to(torch.uint8))


@pytest.mark.parametrize("bad", [-1, 32])
def test_an_id_that_is_no_code_is_an_error(bad):
    with pytest.raises(ValueError, match=rf"ids lie in .*{bad}.* the codebook has 0\.\.31: .*num_codes"):
        build().decode(torch.tensor([[bad, *[0] * 63]]))


def test_frozen_without_weights_never_makes_ids_or_images():
    tokenizer = build(load=False)
    for use in (lambda: tokenizer.encode_image(pictures()), lambda: tokenizer.decode(torch.zeros(1, 64).long())):
        with pytest.raises(ValueError, match="MaskGITVQTokenizer is frozen and has no weights yet"):
            use()


def test_a_trained_one_starts_with_codes_among_the_latents():
    tokenizer = MaskGITVQTokenizer(16, arch=ARCH, num_codes=512, frozen=False)
    assert not tokenizer.vae.decoder.conv_in.bias.any(), "as flax starts"
    codes, z = tokenizer.vae.quantize.embedding.weight, tokenizer.vae.encode(from_uint8(pictures(8)))
    assert codes.std().item() == pytest.approx(1, rel=0.1)
    assert len(tokenizer.vae.quantize.nearest(z).unique()) > 30


@pytest.mark.parametrize("save", ["torch", "safetensors"])
def test_the_released_kinds_of_file_are_read(save, tmp_path):
    """A bare state dict, as .bin or converted."""
    source = build()
    path = tmp_path / ("vqgan.bin" if save == "torch" else "vqgan.safetensors")
    (torch.save if save == "torch" else save_file)(source.vae.state_dict(), path)
    tokenizer = build(load=False, weights=str(path))
    load_tokenizer_weights(tokenizer)
    images = pictures()
    assert torch.equal(tokenizer.encode_image(images), source.encode_image(images))


def test_another_autoencoder_s_file_is_an_error():
    other = VQTokenizer(16, arch=ARCH | {"double_z": False}, num_codes=32)
    with pytest.raises(ValueError, match=r"^vq\.ckpt does not fit this model: .*missing .*unknown"):
        build().load_weights(other.vae.state_dict(), origin="vq.ckpt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": ARCH | {"double_z": True}}, "double_z False"),
        ({"arch": ARCH | {"unit_range": False}}, "unit_range is False, but MaskGIT's VQGAN sees"),
        ({"num_codes": 0}, "num_codes is 0: use 1 or more"),
    ],
)
def test_sizes_that_cannot_be_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_config_rebuilds_the_tokenizer():
    tokenizer = build(weights="vqgan.bin")
    again = as_tokenizer(tokenizer_config(tokenizer))
    assert type(again) is MaskGITVQTokenizer and again.init_args() == tokenizer.init_args()

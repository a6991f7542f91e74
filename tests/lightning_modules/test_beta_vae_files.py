"""GIVT's beta-VAE with files: the released container, our checkpoints and exports, a cache, training from a file."""

from contextlib import chdir

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from datamodules.digits import DigitsData
from datamodules.latents import LatentData
from experiments import cache, export, recipes
from experiments.main import cli
from layers.checkpoint import to_official
from layers.conv_autoencoder import Posterior
from layers.discriminator import DiscriminatorConfig
from layers.maskgit_autoencoder import flax_rules
from layers.tokenizers.base import from_uint8
from layers.tokenizers.beta_vae import BetaVAETokenizer
from lightning_modules.autoencoder import AutoencoderModule, AutoencoderObjective
from lightning_modules.cache_check import check_cache
from lightning_modules.tokenizer_weights import load_tokenizer_weights, read_autoencoder
from tests.lightning_modules.flax_writer import nested, packed
from tests.smoke import call, shrunken

ARCH = {"base_channels": 8, "multipliers": [1, 2], "num_res_blocks": 1, "z_channels": 4, "norm_groups": 4}
SIZE = 16


def tokenizer(path=None, **changes) -> BetaVAETokenizer:
    return BetaVAETokenizer(SIZE, arch=ARCH, weights=path and str(path), **changes)


@pytest.fixture(scope="module")
def source() -> BetaVAETokenizer:
    torch.manual_seed(3)
    return tokenizer(frozen=False)


def flax(source: BetaVAETokenizer, prefix: str, *, shift: float = 0.0) -> dict[str, torch.Tensor]:
    state = {name: tensor + shift for name, tensor in source.vae.state_dict().items()}
    official = to_official(state, flax_rules(source.arch))
    return {name.replace("cnn_", prefix): tensor for name, tensor in official.items()}


@pytest.fixture(scope="module")
def released(source, tmp_path_factory):
    """A file as the released ones: no suffix, raw weights, an average, and the state of an optimiser."""
    path = tmp_path_factory.mktemp("released") / "vae_imagenet_2012_beta_5e-5_params"
    other = {"step": 5, "optimizer/0/count": torch.tensor(3), "d_params/Conv_0/kernel": torch.zeros(2)}
    tree = nested(other | flax(source, "g_params/", shift=1.0) | flax(source, "ema_params/"))
    path.write_bytes(packed(tree))
    return path


def equal(built: BetaVAETokenizer, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in built.vae.state_dict().items())


def pictures(batch: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, SIZE, SIZE), dtype=torch.uint8)


def test_the_average_of_a_released_file_is_loaded(released, source):
    built = tokenizer(released)
    load_tokenizer_weights(built)
    assert built.loaded and equal(built, source.vae.state_dict())
    assert built.encode_image(pictures()).shape == (3, 8, 8, 8)


def test_without_an_average_the_raw_weights_are_loaded(source, tmp_path):
    path = tmp_path / "vae_params"
    path.write_bytes(packed(nested(flax(source, "g_params/"))))
    built = tokenizer(path)
    load_tokenizer_weights(built)
    assert equal(built, source.vae.state_dict())


@pytest.mark.parametrize("kind", ["npz", "safetensors", "checkpoint"])
def test_other_files_are_loaded_too(kind, source, tmp_path):
    path = tmp_path / f"vae.{kind}"
    state = source.vae.state_dict()
    if kind == "npz":
        np.savez(path, **{f"params/{name}": tensor.numpy() for name, tensor in flax(source, "cnn_").items()})
    elif kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": {f"tokenizer.vae.{n}": t for n, t in state.items()}, "hyper_parameters": {}}, path)
    built = tokenizer(path)
    load_tokenizer_weights(built)
    assert equal(built, state)


def test_a_file_of_another_size_or_with_no_weights_is_an_error_that_names_it(released, tmp_path):
    larger = BetaVAETokenizer(SIZE, arch=ARCH | {"num_res_blocks": 2}, weights=str(released))
    with pytest.raises(ValueError, match=r"beta_5e-5_params does not fit this model: .* missing"):
        load_tokenizer_weights(larger)
    deeper = BetaVAETokenizer(SIZE, arch=ARCH | {"multipliers": [1]}, weights=str(released))
    with pytest.raises(ValueError, match=r"beta_5e-5_params does not fit .*arch: .*unknown \(cnn_"):
        load_tokenizer_weights(deeper)
    (tmp_path / "other_params").write_bytes(packed({"params": {"a": 1}}))
    with pytest.raises(ValueError, match=r"other_params is not .*no ema_params or g_params, only params"):
        read_autoencoder(tmp_path / "other_params")


def build(**objective) -> AutoencoderModule:
    settings = AutoencoderObjective(**{"disc_start": 0} | objective)
    return AutoencoderModule(tokenizer(frozen=False), 10, settings, DiscriminatorConfig(channels=4, num_layers=1))


def test_loss_is_half_the_squared_error_and_beta_times_the_kl():
    module, images = build(l1_weight=0.0, l2_weight=0.5, kl_weight=5e-5, disc_weight=0.0), pictures()
    noise, vae, target = torch.randn(3, 4, 8, 8), module.tokenizer.vae, from_uint8(images)
    found = module.losses(images, noise)
    posterior = Posterior(vae.encode(target))
    error = vae.decode(posterior.sample(noise)) - target
    kl = -0.5 * (1 + posterior.logvar - posterior.mean**2 - posterior.logvar.exp()).sum() / 3
    torch.testing.assert_close(found["loss"], 0.5 * error.square().sum() / 3 + 5e-5 * kl)
    torch.testing.assert_close(found["kl"], kl)


def test_both_sides_of_the_adversarial_training_get_gradients():
    module, images = build(disc_weight=0.5, kl_weight=0.1), pictures()
    module.losses(images, torch.randn(3, 4, 8, 8))["loss"].backward()
    assert [name for name, p in module.tokenizer.named_parameters() if not p.grad.any()] == []
    assert [name for name, p in module.discriminator.named_parameters() if p.grad is None] == []
    assert module.reconstruct(images).shape == images.shape


def test_training_goes_on_from_a_released_file(released, source):
    module = build(disc_weight=0.0)
    module.load_official(released)
    images = pictures()
    expected = source.vae.decode(source.posterior(source.vae.encode(from_uint8(images))).mean)
    torch.testing.assert_close(module.reconstruct(images), expected)


@pytest.mark.parametrize("patch", [1, (1, 2)])
def test_a_cache_gives_the_tokens_that_the_images_give(patch, released, tmp_path):
    vae = f"--{cache.TOKENIZER}"
    arguments = f"image_size: {SIZE}, patch_size: {list(patch) if patch != 1 else 1}, arch: {ARCH}, weights: {released}"
    line = [f"{vae}.class_path=layers.tokenizers.beta_vae.BetaVAETokenizer", f"{vae}.init_args={{{arguments}}}"]
    line += ["--data.init_args.limit_n=20", "--out", str(tmp_path), "--dtype", "float32", "--device", "cpu"]
    call(cache.main, "--exp", "jit_digits", *line)
    data = LatentData(str(tmp_path), DigitsData(SIZE, limit_n=20), batch_size=5, num_workers=0, val_length=0)
    data.setup()
    data.images.setup()
    module = torch.nn.Module()
    module.tokenizer = BetaVAETokenizer(SIZE, patch, arch=ARCH, weights=str(released))
    load_tokenizer_weights(module.tokenizer)
    check_cache(module, data)
    cached = torch.cat([batch["raw"] for batch in data.ordered_loader("train")])
    images = torch.cat([batch["image"] for batch in data.images.ordered_loader("train")])
    assert cached.shape == (20, 8, 8, 8)
    draws = [
        module.tokenizer(batch, torch.Generator().manual_seed(0)).x for batch in ({"raw": cached}, {"image": images})
    ]
    torch.testing.assert_close(*draws, atol=1e-5, rtol=1e-5)
    assert draws[0].shape[1:] == (module.tokenizer.seq_len, module.tokenizer.token_dim)


@pytest.mark.slow
def test_a_trained_one_and_its_export_are_weights_of_a_tokenizer(tmp_path):
    with chdir(tmp_path):
        cli(["fit", "--exp", "vae_givt", *shrunken("vae_givt")])
        path = recipes.find_checkpoint("vae_givt", "last").resolve()
        call(export.main, "--exp", "vae_givt", "--ckpt", "last", "--out", "vae.safetensors")
    built = [tokenizer(path), tokenizer(tmp_path / "vae.safetensors")]
    for one in built:
        load_tokenizer_weights(one)
    images = pictures()
    assert torch.equal(built[0].encode_image(images), built[1].encode_image(images))
    module = AutoencoderModule.load_from_checkpoint(path)  # the average
    torch.testing.assert_close(module.tokenizer.encode_image(images), built[0].encode_image(images))
    raw = AutoencoderModule.load_from_checkpoint(path, weights="raw")
    assert not torch.equal(raw.tokenizer.encode_image(images), built[0].encode_image(images))

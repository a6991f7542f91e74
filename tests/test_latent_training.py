"""From images to a latent model: cache, train, resume, sample, and a checkpoint that holds no copy of the tokenizer."""

from contextlib import chdir

import pytest
import torch
from safetensors.torch import save_file

from datamodules.digits import DigitsData
from experiments import cache, recipes, sample
from experiments.main import cli
from layers.conv_autoencoder import AutoencoderConfig
from layers.tokenizers.conv import latent_statistics
from layers.tokenizers.kl_vae import KLVAETokenizer
from lightning_modules.mar import MARModule
from lightning_modules.weights import read_torch
from tests.smoke import SMOKE, call, tiny

ARCH = {"base_channels": 8, "multipliers": [1, 1, 2], "num_res_blocks": 1, "z_channels": 4, "norm_groups": 4}


def save_vae(path, seed):
    torch.manual_seed(seed)
    tokenizer = KLVAETokenizer(16, arch=AutoencoderConfig(**ARCH), frozen=False)
    save_file(tokenizer.vae.state_dict(), path)
    return tokenizer


def common(weights):
    """mar, shrunken, on latents of the digits."""
    vae, data = "--model.init_args.tokenizer", "--data.init_args"
    sizes = {k: v for k, v in tiny("mar").items() if ".net." in k or ".head." in k or ".sampling." in k}
    arch = ", ".join(f"{name}: {value}" for name, value in ARCH.items())
    overrides = [
        f"{vae}.init_args.image_size=16",
        f"{vae}.init_args.latent_scale=2.0",
        f"{vae}.init_args.weights={weights}",
        f"{vae}.init_args.arch={{{arch}}}",
        "--data.class_path=datamodules.latents.LatentData",
        f"{data}.root=cache",
        f"{data}.batch_size=16",
        f"{data}.images.class_path=datamodules.digits.DigitsData",
        f"{data}.images.init_args.image_size=16",
    ]
    return overrides, [f"--{key}={value}" for key, value in sizes.items()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two autoencoders, a cache of the first, and a run of three steps on it."""
    folder = tmp_path_factory.mktemp("latents")
    for seed in (1, 2):
        save_vae(folder / f"vae{seed}.safetensors", seed)
    with chdir(folder):
        overrides, sizes = common("vae1.safetensors")
        call(cache.main, "--exp", "mar", "--device", "cpu", *overrides)
        fit(overrides + sizes, "--trainer.max_steps=3")
    return folder


def fit(overrides, *extra):
    smoke = ["--trainer.limit_train_batches=2", "--model.init_args.num_classes=10"]
    return cli(["fit", "--exp", "mar", f"--config={SMOKE}", *overrides, *smoke, *extra])


@pytest.mark.slow
def test_a_checkpoint_holds_no_frozen_tokenizer_and_loads_with_it(trained):
    with chdir(trained):
        path = recipes.find_checkpoint("mar", "last")
        stored = read_torch(path)
        assert not [name for name in stored["state_dict"] if name.startswith("tokenizer.")]
        module = MARModule.load_from_checkpoint(path)
        assert module.tokenizer.loaded and not module.tokenizer.training
        images = module.sample([1, 2], generator=torch.Generator().manual_seed(0))
    assert images.shape == (2, 3, 16, 16)


@pytest.mark.slow
def test_a_resumed_run_equals_the_unbroken_one(trained, tmp_path):
    overrides, sizes = common(trained / "vae1.safetensors")
    overrides = [o.replace("root=cache", f"root={trained / 'cache'}") for o in overrides]
    with chdir(tmp_path):
        fit(overrides + sizes, "--trainer.max_steps=1")
        fit(overrides + sizes, "--ckpt", "last", "--trainer.max_steps=3")
        resumed = read_torch(recipes.find_checkpoint("mar", "last"))["state_dict"]
    with chdir(trained):
        unbroken = read_torch(recipes.find_checkpoint("mar", "last"))["state_dict"]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())


def test_samples_come_out_of_the_command(trained):
    with chdir(trained):
        call(sample.main, "--exp", "mar", "--ckpt", "last", "--num", "2", "--labels", "1,0", "--out", "out")
    assert (trained / "out" / "grid.png").is_file()


def test_latents_of_another_tokenizer_are_refused_before_training(trained):
    overrides, sizes = common("vae2.safetensors")
    with chdir(trained), pytest.raises(ValueError, match="latents in 'cache' were made by a tokenizer with sha256"):
        fit(overrides + sizes)


def test_a_missing_file_of_weights_stops_the_run(trained):
    overrides, sizes = common("nowhere.ckpt")
    with chdir(trained), pytest.raises(FileNotFoundError, match=r"no tokenizer at 'nowhere\.ckpt'"):
        fit(overrides + sizes)


def test_a_file_that_lacks_weights_is_named(trained):
    state = save_vae(trained / "whole.safetensors", 3).vae.state_dict()
    state.pop("decoder.conv_out.weight")
    save_file(state, trained / "partial.safetensors")
    overrides, sizes = common("partial.safetensors")
    with chdir(trained), pytest.raises(ValueError, match=r"partial.*1 missing \(decoder\.conv_out\.weight\)"):
        fit(overrides + sizes)


def test_measured_statistics_make_tokens_of_unit_variance(tmp_path):
    tokenizer = save_vae(tmp_path / "vae.safetensors", 1)
    data = DigitsData(image_size=16, batch_size=128)
    data.setup()
    batches = list(data.val_dataloader())
    with torch.no_grad():
        stats = latent_statistics(tokenizer, batches, generator=torch.Generator().manual_seed(0))
        tokenizer.latent_scale, tokenizer.latent_shift = 1 / stats.std, stats.mean
        x = torch.cat([tokenizer(batch, torch.Generator().manual_seed(0)).x for batch in batches])
    assert abs(x.mean().item()) < 0.02 and abs(x.std().item() - 1) < 0.02

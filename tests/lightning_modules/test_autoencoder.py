"""Training of tokenizers: losses by their formulas, the two sides apart, resume, pictures, the way into a recipe."""

import json
import signal
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from datamodules.digits import DigitsData
from experiments import export, measure_latents, recipes, sample
from experiments.main import cli
from layers.conv_autoencoder import Posterior
from layers.discriminator import DiscriminatorConfig, adaptive_weight, hinge_discriminator, hinge_generator
from layers.perceptual import PerceptualDistance
from layers.tokenizers.base import from_uint8
from layers.tokenizers.conv import latent_statistics
from layers.tokenizers.kl_vae import KLVAETokenizer
from layers.tokenizers.pixels import PixelTokenizer
from layers.tokenizers.vq import VQTokenizer
from lightning_modules import autoencoder
from lightning_modules.autoencoder import AutoencoderModule, AutoencoderObjective, psnr
from lightning_modules.base import to_uint8
from lightning_modules.pictures import enlarge, make_grid, spread_rows
from lightning_modules.tokenizer_weights import load_tokenizer_weights
from lightning_modules.weights import read_torch
from tests.methods.test_autoencoder import TINY
from tests.signals import option
from tests.smoke import call

ARCH = {
    "base_channels": 8,
    "multipliers": [1, 2],
    "num_res_blocks": 1,
    "z_channels": 4,
    "encoder_attention": [],
    "norm_groups": 4,
}
SMALL = DiscriminatorConfig(channels=4, num_layers=1)
SIZE = 16


def kl_tokenizer(**changes) -> KLVAETokenizer:
    return KLVAETokenizer(SIZE, arch=ARCH, **{"frozen": False} | changes)


def vq_tokenizer() -> VQTokenizer:
    built = VQTokenizer(SIZE, arch=ARCH | {"double_z": False}, num_codes=16, frozen=False)
    torch.nn.init.normal_(built.vae.quantize.embedding.weight)
    return built


def build(tokenizer=None, **objective) -> AutoencoderModule:
    settings = AutoencoderObjective(**{"disc_start": 0} | objective)
    return AutoencoderModule(tokenizer or kl_tokenizer(), 10, settings, SMALL)


def pictures(batch: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, SIZE, SIZE), dtype=torch.uint8)


def noise_for(images: torch.Tensor) -> torch.Tensor:
    return torch.randn(len(images), 4, 8, 8)


def gradients(loss: torch.Tensor, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    names, params = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


def gradients_once(loss: torch.Tensor, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """As `gradients`, but the graph is not kept, which compiled code does not allow."""
    module.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


# Losses


@pytest.mark.parametrize(("reduction", "values"), [("sum", 3 * SIZE * SIZE), ("mean", 1)])
@pytest.mark.parametrize(("l1", "l2"), [(1.0, 0.0), (0.0, 0.5), (2.0, 3.0)])
def test_kl_loss_is_that_of_ldm(reduction, values, l1, l2):
    module = build(disc_weight=0.0, l1_weight=l1, l2_weight=l2, reduction=reduction, kl_weight=1e-3)
    images, vae = pictures(), module.tokenizer.vae
    noise = noise_for(images)
    found = module.losses(images, noise)
    posterior = Posterior(vae.encode(from_uint8(images)))
    error = vae.decode(posterior.sample(noise)) - from_uint8(images)
    rec = l1 * error.abs().mean() + l2 * error.square().mean()
    kl = 0.5 * (posterior.mean**2 + posterior.std**2 - 1 - posterior.logvar).sum() / len(images)
    torch.testing.assert_close(found, {"loss": values * rec + 1e-3 * kl, "rec": rec, "kl": kl})


def test_noise_is_drawn_from_the_given_generator():
    module, images = build(disc_weight=0.0), pictures()
    drawn = module.training_loss({"image": images}, torch.Generator().manual_seed(3))
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn["loss"], module.losses(images, noise)["loss"])


@pytest.fixture
def perceptual_files(monkeypatch, tmp_path) -> dict[str, str]:
    """A small network in VGG's place, and its two files."""
    stages = ((4,), (5, 6))
    monkeypatch.setattr(autoencoder, "PerceptualDistance", lambda: PerceptualDistance(stages))
    state = {name: torch.rand_like(tensor) for name, tensor in PerceptualDistance(stages).named_weights().items()}
    vgg = {name: tensor for name, tensor in state.items() if name.startswith("features.")}
    torch.save(vgg | {"classifier.0.bias": torch.zeros(2)}, tmp_path / "vgg16.pth")
    save_file({name: tensor for name, tensor in state.items() if name not in vgg}, tmp_path / "lpips.safetensors")
    return {"vgg": str(tmp_path / "vgg16.pth"), "lpips": str(tmp_path / "lpips.safetensors")}


def test_perceptual_term_counts_as_much_as_every_value_does(perceptual_files):
    module, images = build(disc_weight=0.0, perceptual_weight=0.3, **perceptual_files), pictures()
    assert module.losses(images, noise_for(images))["loss"].isnan(), "the files were not read"
    module.perceptual.load_weights(autoencoder.read_files(list(perceptual_files.values())), origin="test")
    found = module.losses(images, noise_for(images))
    assert found["perceptual"] > 0
    expected = 3 * SIZE * SIZE * (found["rec"] + 0.3 * found["perceptual"]) + 1e-6 * found["kl"]
    torch.testing.assert_close(found["loss"], expected)
    assert not any(name.startswith("perceptual") for name in module.state_dict())


def test_each_side_gets_its_own_gradients_and_nothing_of_the_other():
    module, images = build(kl_weight=0.1, disc_weight=0.5), pictures()
    noise = noise_for(images)
    found = module.losses(images, noise)
    vae, disc = module.tokenizer.vae, module.discriminator
    posterior = Posterior(vae.encode(from_uint8(images)))
    output, target = vae.decode(posterior.sample(noise)), from_uint8(images)
    rec, fooled = (output - target).abs().sum() / len(images), hinge_generator(disc(output))
    weight = adaptive_weight(rec, fooled, vae.decoder.conv_out.weight)
    learnt = hinge_discriminator(disc(target), disc(output.detach()))
    torch.testing.assert_close([found[n] for n in ("adversarial", "adaptive", "disc")], [fooled, weight, learnt])
    autoencoder_loss = rec + 0.1 * posterior.kl().mean() + 0.5 * weight * fooled
    torch.testing.assert_close(found["loss"], autoencoder_loss + learnt)
    for side, loss in ((vae, autoencoder_loss), (disc, learnt)):
        torch.testing.assert_close(gradients(found["loss"], side), gradients(loss, side), rtol=1e-4, atol=1e-4)


def test_before_its_start_the_discriminator_does_nothing_but_has_gradients():
    module, images = build(disc_start=1), pictures()
    noise = noise_for(images)
    found, without = module.losses(images, noise), build(module.tokenizer, disc_weight=0.0).losses(images, noise)
    assert found.keys() == without.keys() and torch.equal(found["loss"], without["loss"])
    found["loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.discriminator.parameters())


def test_validation_leaves_the_discriminator_out_and_adds_psnr():
    module, images = build().eval(), pictures()
    found = module.losses(images, noise_for(images))
    assert list(found) == ["loss", "rec", "kl", "psnr"]
    with torch.no_grad():
        assert build().losses(images, noise_for(images))["adaptive"] == 0  # as when FLOPs are counted


def test_psnr_is_of_clamped_images():
    target = torch.full((2, 3, 4, 4), 0.5)
    output = torch.stack([target[0] + 0.2, torch.full((3, 4, 4), 7.0)])
    expected = [10 * np.log10(4 / 0.04), 10 * np.log10(4 / 0.25)]
    assert psnr(output, target).tolist() == pytest.approx(expected, rel=1e-5)


def test_sides_are_clipped_apart():
    module = build()
    for p, value in ((module.tokenizer, 10.0), (module.discriminator, 1e-5)):
        for param in p.parameters():
            param.grad = torch.full_like(param, value)
    module.configure_gradient_clipping(None, 1.0, "norm")
    norms = [
        torch.stack([p.grad.norm() for p in s.parameters()]).norm() for s in (module.tokenizer, module.discriminator)
    ]
    assert norms[0].item() == pytest.approx(1, rel=1e-4) and norms[1] < 0.1
    assert all(torch.equal(p.grad, torch.full_like(p, 1e-5)) for p in module.discriminator.parameters())


@pytest.mark.slow
def test_compiled_parts_leave_the_gradient_of_the_last_weight_free():
    module, images = build(), pictures()
    noise = noise_for(images)
    plain = module.losses(images, noise)
    expected = gradients(plain["loss"], module)
    for part in module.compiled_modules():
        part.compile(backend="aot_eager", dynamic=False)
    found = module.losses(images, noise)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(gradients_once(found["loss"], module), expected)


# Reconstructions and latents


@pytest.mark.parametrize("make", [kl_tokenizer, vq_tokenizer])
def test_reconstruction_takes_the_mean_or_the_codes(make):
    module, images = build(make(), disc_weight=0.0), pictures()
    vae = module.tokenizer.vae
    encoded = vae.encode(from_uint8(images))
    kl = isinstance(module.tokenizer, KLVAETokenizer)
    latents = encoded.chunk(2, dim=1)[0] if kl else vae.quantize.latents(vae.quantize.nearest(encoded), 8)
    torch.testing.assert_close(module.reconstruct(images), vae.decode(latents))
    assert module.training and not module.reconstruct(images).requires_grad


def test_ids_have_no_scale():
    with pytest.raises(ValueError, match="VQTokenizer are ids"):
        build(vq_tokenizer(), disc_weight=0.0).measure_latents(None, 1)


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AutoencoderModule(PixelTokenizer(8, 2)), "PixelTokenizer is not trained here: set .*KLVAETokenizer"),
        (lambda: AutoencoderModule(kl_tokenizer(frozen=True)), r"frozen, so there is nothing.*frozen=false"),
        (lambda: AutoencoderModule(kl_tokenizer(weights="x.ckpt")), "weights is 'x.ckpt'.*give OFFICIAL="),
        (lambda: AutoencoderModule(kl_tokenizer()), "16 pixels are too small .* 3 layers, which needs 24"),
        (lambda: AutoencoderObjective(kl_weight=-1), "objective.kl_weight is -1: a weight cannot be negative"),
        (lambda: AutoencoderObjective(entropy_temperature=0), "entropy_temperature is 0: it must be positive"),
        (lambda: AutoencoderObjective(l1_weight=0), "nothing compares the reconstruction"),
        (lambda: AutoencoderObjective(perceptual_weight=1), "needs the files objective.vgg .* or set it to 0"),
        (lambda: AutoencoderObjective(perceptual_weight=1, vgg="x"), "needs the files"),
        (lambda: build().reconstruct(pictures()[..., 2:]), "images are 16x14, the tokenizer expects 16: give --data"),
        (lambda: build().sample([0]), "an autoencoder draws no images: make sample"),
        (lambda: build().load_official("x.ckpt", key="raw"), "'raw' cannot be chosen in x.ckpt"),
    ],
)
def test_mistakes_name_value_and_cure(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Runs


def settings(**changes) -> list[str]:
    tiny = {key: value for key, value in TINY.items() if not key.startswith("data.")} | {
        "trainer.max_steps": 8,
        "trainer.limit_train_batches": 6,
        "trainer.log_every_n_steps": 1,
        "trainer.val_check_interval": 3,
        "trainer.enable_progress_bar": False,
        "trainer.gradient_clip_val": 1.0,
        "data.init_args.batch_size": 8,
        "data.init_args.limit_n": 60,
        "model.init_args.objective.disc_weight": 0.5,
        "model.init_args.objective.disc_start": 4,
        "ema.decays": [0.5],
        "samples.every_n_steps": 8,
        "samples.num_images": 4,
        "checkpoint.every_n_train_steps": 100,
    }
    return [f"--{key}={value}" for key, value in (tiny | changes).items()]


def run(*extra: str) -> None:
    cli(["fit", "--exp", "vae_digits", *settings(), *extra])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """Working directory and checkpoint of a whole run, in which the discriminator starts in the middle."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    with chdir(folder):
        run()
        return folder, recipes.find_checkpoint("vae_digits", "last").resolve()


def state_of(path: Path) -> dict[str, torch.Tensor]:
    content = read_torch(path)
    found = {f"raw.{name}": tensor for name, tensor in content["state_dict"].items()}
    found |= {f"ema.{name}": tensor for name, tensor in content["callbacks"]["EMA"]["shadows"][0].items()}
    for i, state in content["optimizer_states"][0]["state"].items():
        found |= {f"optimizer{i}.{name}": tensor for name, tensor in state.items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 5, 7])
def test_a_stopped_run_resumes_bit_for_bit(step, trained, tmp_path):
    """Before and after the discriminator's start, in the first epoch of six steps and in the second."""
    with chdir(tmp_path):
        with pytest.raises(SystemExit):
            run(option(step, signal.SIGTERM))
        run("--ckpt", "last")
        resumed, unbroken = state_of(recipes.find_checkpoint("vae_digits", "last")), state_of(trained[1])
    assert resumed.keys() == unbroken.keys()
    assert [name for name in unbroken if not torch.equal(resumed[name], unbroken[name])] == []


def test_weights_of_both_sides_were_trained(trained):
    state = state_of(trained[1])
    weights = [name for name, tensor in state.items() if name.startswith("raw.") and tensor.ndim > 1]
    assert {name.split(".")[1] for name in weights} == {"tokenizer", "discriminator"}
    assert [name for name in weights if torch.equal(state[name], state[name.replace("raw.", "ema.")])] == []


def test_checkpoint_is_the_weights_of_a_frozen_tokenizer(trained):
    frozen = kl_tokenizer(frozen=True, latent_scale=1.0, weights=str(trained[1]))
    load_tokenizer_weights(frozen)
    module, images = AutoencoderModule.load_from_checkpoint(trained[1]), pictures()
    assert torch.equal(frozen.encode_image(images), module.tokenizer.encode_image(images))
    raw = AutoencoderModule.load_from_checkpoint(trained[1], weights="raw")
    assert not torch.equal(raw.reconstruct(images), module.reconstruct(images)), "the average is what is read"


def test_the_end_of_training_measures_the_latents(trained, capsys):
    stats = json.loads((trained[1].parent / "latent_stats.json").read_text())
    module, data = AutoencoderModule.load_from_checkpoint(trained[1]), digits()
    generator = torch.Generator().manual_seed(0)
    images = torch.cat([row["image"] for row in spread_rows(data.train_set, 60)])
    expected = latent_statistics(module.tokenizer, [{"image": images}], generator=generator)
    assert (stats["mean"], stats["std"], stats["count"]) == pytest.approx(expected, rel=1e-5)
    assert stats["latent_scale"] == pytest.approx(1 / expected.std, rel=1e-5) and stats["average"] == "0.5"

    before = dict(stats)
    (trained[1].parent / "latent_stats.json").unlink()
    line = ["--data.init_args.limit_n=60", "--data.init_args.batch_size=8", "--device", "cpu"]
    call(measure_latents.main, "--exp", "vae_digits", "--ckpt", str(trained[1]), *line)
    after = json.loads((trained[1].parent / "latent_stats.json").read_text())
    assert after["std"] == pytest.approx(before["std"], rel=1e-6)
    assert f"latent_scale: {after['latent_scale']:.4g}, weights: " in capsys.readouterr().out


def digits() -> DigitsData:
    data = DigitsData(16, 8, limit_n=60)
    data.setup()
    return data


def test_grid_shows_validation_images_then_what_came_back(trained):
    (path,) = (trained[1].parent.parent / "samples").glob("*.png")
    picture = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    module, data = AutoencoderModule.load_from_checkpoint(trained[1], weights="raw"), digits()
    originals = module.originals(data, 4)
    assert torch.equal(originals, torch.cat([data.val_set[i]["image"] for i in (0, 15, 30, 45)]))
    first, second = (
        enlarge(make_grid(x, columns=8), size=16) for x in (originals, to_uint8(module.reconstruct(originals)))
    )
    width = first.shape[-1]
    assert torch.equal(picture[..., :width], first)
    gap = 6 * 3
    assert torch.equal(picture[..., width + gap : 2 * width + gap], second)


def test_make_sample_writes_pairs_and_refuses_labels(trained, tmp_path, capsys):
    line = ["--exp", "vae_digits", "--ckpt", str(trained[1]), "--num", "5", "--device", "cpu"]
    call(sample.main, *line, "--out", str(tmp_path), "--data.init_args.limit_n=60")
    with np.load(tmp_path / "samples.npz") as arrays:
        images, originals = arrays["arr_0"], arrays["originals"]
    assert images.shape == originals.shape == (5, 16, 16, 3) and len(list(tmp_path.glob("0*.png"))) == 5
    error = ((images.astype(float) - originals) ** 2).mean((1, 2, 3))
    psnr_found = json.loads((tmp_path / "settings.json").read_text())["psnr"]
    assert psnr_found == pytest.approx((10 * np.log10(255**2 / error)).mean())
    assert f"mean PSNR {psnr_found:.2f} dB" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        call(sample.main, *line, "--labels", "1")
    assert "an autoencoder draws nothing" in capsys.readouterr().err


def test_exported_weights_start_another_run_and_a_tokenizer(trained, tmp_path):
    file = tmp_path / "tokenizer.safetensors"
    call(export.main, "--exp", "vae_digits", "--ckpt", str(trained[1]), "--out", str(file))
    module = AutoencoderModule.load_from_checkpoint(trained[1])
    fresh, images = build(), pictures()
    disc = fresh.discriminator.main[0].weight.clone()
    fresh.load_official(file)
    assert torch.equal(fresh.reconstruct(images), module.reconstruct(images))
    assert torch.equal(fresh.discriminator.main[0].weight, disc)
    frozen = kl_tokenizer(frozen=True, weights=str(file))
    load_tokenizer_weights(frozen)
    assert torch.equal(frozen.encode_image(images), module.tokenizer.encode_image(images))


def test_perceptual_files_are_read_before_training_or_it_does_not_start(perceptual_files, tmp_path):
    words = [f"--model.init_args.objective.{name}={path}" for name, path in perceptual_files.items()]
    words += ["--model.init_args.objective.perceptual_weight=0.5", "--trainer.max_steps=1"]
    with chdir(tmp_path):
        run(*words)
        content = read_torch(recipes.find_checkpoint("vae_digits", "last"))
        assert not any("perceptual" in name for name in content["state_dict"])
        AutoencoderModule.load_from_checkpoint(recipes.find_checkpoint("vae_digits", "last"))
        Path(perceptual_files["lpips"]).unlink()
        with pytest.raises(FileNotFoundError, match=r"lpips\.safetensors.*perceptual_weight=0"):
            run(*words)

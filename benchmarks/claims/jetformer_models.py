"""Small JetFormers for claims, on scikit-learn's digits: 8x8 grey pixels in 2x2 patches, dequantised at their own 17
levels, so 16 tokens of 4 numbers, of which the decoder models some and a standard normal distribution the rest.

A cell trains one model and holds its figures on validation digits and those of samples. Beside it: how much of a
picture the modelled numbers hold, by drawing the others anew; a flow alone, a small autoencoder, and noisy pixels.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from benchmarks.claims import digits
from benchmarks.claims.digits import VALIDATION
from benchmarks.claims.ledger import Cell, Settings
from datamodules.digits import SIDE
from layers.conv_autoencoder import AutoencoderConfig
from layers.flows.factored import FactorConfig
from layers.flows.jet import JetConfig
from layers.flows.linear import PCA
from layers.networks.jetformer import DecoderConfig
from layers.tokenizers.base import Tokens, to_uint8
from layers.tokenizers.kl_vae import KLVAETokenizer
from lightning_modules.autoencoder import AutoencoderModule, AutoencoderObjective
from lightning_modules.base import Batch, GenerativeModule, eval_mode
from lightning_modules.callbacks.ema import EMA
from lightning_modules.jet import JetModule
from lightning_modules.jetformer import (
    HeadConfig,
    JetFormerModule,
    JetFormerObjective,
    JetFormerSampling,
    rgb_noise,
)
from lightning_modules.optim import OptimConfig

PATCH = 2  # pixels
TOKENS = (SIDE // PATCH) ** 2
MODEL = {
    "seeds": [0, 1],
    "width": 64,
    "depth": 3,
    "num_heads": 4,
    "couplings": 12,
    "flow_width": 32,
    "flow_heads": 2,
    "kept": 2,
    "steps": 600,
    "batch": 48,
    "lr": 2e-3,
    "warmup": 100,
    "clip": 1.0,
    "ema": 0.99,
    "noise_draws": 4,
    "samples": 500,
}
DRAWN, ALONE = "samples", "flow alone"  # groups of figures
RMS = "rms"  # of pictures against what they were, in grey levels
LIKELIHOOD = {"bpd": "bits per pixel"}


class Model(NamedTuple):
    """What distinguishes the trained models; the defaults are the released form."""

    name: str = "released form"
    kept: bool = True  # some numbers of a token are modelled, the others factored out; False: all are modelled
    split: str = "flow"  # what they are factored out behind: FactorConfig's
    flow: str = "trained along"  # or "alone first" and frozen, or "none"
    mixtures: int = 16
    init: str = "spread"
    tables: int = 16  # copies of the label, each of a table of its own
    rgb_noise: float = 64.0  # on pixels, at the start
    token_noise: float = 0.3

    def key(self, seed: int) -> str:
        return f"{self.name} seed={seed}"


RELEASED = Model()


class Curriculum(GenerativeModule):
    """A module that knows without a trainer how far it is: noise on pixels falls from `loudest` to nothing over `total`
    training losses."""

    loudest, total, done = RELEASED.rgb_noise, 1, 0

    def rgb_sigma(self) -> float:
        return rgb_noise(self.done, self.total, largest=self.loudest, smallest=0.0)

    def training_loss(self, batch: Batch, generator: Generator | None = None) -> dict[str, Tensor]:
        losses = super().training_loss(batch, generator)
        self.done += self.training
        return losses


class TimedJetFormer(Curriculum, JetFormerModule):
    """A JetFormer so."""


class TimedJet(Curriculum, JetModule):
    """A flow alone, with the noise that it has in a JetFormer."""

    def tokens(self, batch: Batch, generator: Generator | None) -> Tokens:
        levels = self.tokenizer.encode_image(batch["image"])
        if self.training:
            levels = noisy(levels, self.rgb_sigma(), generator)
        return self.tokenizer.encode_raw(levels, generator)


def build(model: Model, settings: Settings, seed: int) -> TimedJetFormer:
    """A fresh model, without dropout: its weights depend on the seed, its sizes on `settings`; PCA is fitted."""
    width, heads = settings["width"], settings["num_heads"]
    net = DecoderConfig(
        width=width,
        depth=settings["depth"],
        num_heads=heads,
        head_dim=width // heads,
        mlp_hidden=2 * width,
        dropout=0.0,
        text_tables=model.tables,
    )
    factor = FactorConfig(settings["kept"] if model.kept else None, model.split, model.flow != "trained along")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = TimedJetFormer(
            digits.dequantised(PATCH),
            digits.CLASSES,
            net=net,
            head=HeadConfig(model.mixtures, init=model.init, dtype="float32"),
            flow=flow_config(settings, couplings=1 if model.flow == "none" else settings["couplings"]),
            factor=factor,
            objective=JetFormerObjective(token_noise=model.token_noise),
            optim=OptimConfig(lr=settings["lr"]),
        )
    module.loudest = model.rgb_noise
    if isinstance(module.front.linear, PCA):
        shown = digits.whole(SIDE, "train")
        module.front.linear.fit([module.tokenizer(shown, Generator().manual_seed(seed)).x])
    return module


def flow_config(settings: Settings, *, couplings: int) -> JetConfig:
    """Of couplings over channels, as JetFormer's; one that is frozen from the start is the identity."""
    sizes = {"width": settings["flow_width"], "num_heads": settings["flow_heads"]}
    return JetConfig(depth=couplings, block_depth=1, kinds=["channels"], **sizes)


def fit(module: JetFormerModule | JetModule | AutoencoderModule, settings: Settings, seed: int) -> EMA:
    """Train on the training digits; each step's noise has a seed of its own, whatever the model draws of it."""
    if isinstance(module, Curriculum):
        module.total, module.done = settings["steps"], 0
    return digits.train(module, settings, seed, reseed=True, clip=settings["clip"])


def compute(model: Model, settings: Settings, seed: int) -> tuple[TimedJetFormer, EMA, Cell]:
    """The trained model, its average, and the average's figures, ten samples as "points"."""
    module, alone = build(model, settings, seed), {"points": {}}
    if model.flow == "alone first":
        flow, average, alone = flow_alone(settings, seed)
        with average.weights(flow, average.names[0]):
            module.front.jet.load_state_dict(flow.net.state_dict())
    average = fit(module, settings, seed)
    cell = figures(module, average, settings, seed)
    return module, average, {**alone, **cell, "points": alone["points"] | cell["points"]}


def figures(module: JetFormerModule | JetModule, average: EMA, settings: Settings, seed: int) -> Cell:
    """Groups `VALIDATION` and `DRAWN`, and ten samples. Samples are drawn at temperature 1, without guidance."""
    validation = digits.validate(module, average, digits.whole(SIDE, "val"), settings["noise_draws"])
    plain = JetFormerSampling() if isinstance(module, JetFormerModule) else module.sampling
    images, labels = digits.draw_samples(module, average, settings["samples"], seed, sampling=plain)
    points = images[: digits.CLASSES].tolist()
    return {VALIDATION: validation, DRAWN: digits.measure(images, labels), "points": {DRAWN: points}}


# Beside JetFormer


def flow_alone(settings: Settings, seed: int) -> tuple[JetModule, EMA, Cell]:
    """The same couplings under a normal prior for all numbers, trained in the same way; all figures as one group."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = flow_config(settings, couplings=settings["couplings"])
        flow = TimedJet(digits.dequantised(PATCH), digits.CLASSES, config, optim=OptimConfig(lr=settings["lr"]))
    average = fit(flow, settings, seed)
    found = figures(flow, average, settings, seed)
    points = {ALONE: found["points"][DRAWN]}
    return flow, average, {ALONE: {**found[VALIDATION], **found[DRAWN]}, "points": points}


def autoencoder(settings: Settings, seed: int) -> tuple[AutoencoderModule, EMA]:
    """A small KL autoencoder whose latents are as many numbers as the decoder models, at the places of the tokens."""
    arch = AutoencoderConfig(
        base_channels=16,
        multipliers=(1, 2),  # so a latent for each patch
        num_res_blocks=1,
        z_channels=settings["kept"],
        encoder_attention=(),
        norm_groups=8,
    )
    objective = AutoencoderObjective(l1_weight=0.0, l2_weight=1.0, kl_weight=1e-4, disc_weight=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = KLVAETokenizer(SIDE, arch=arch, frozen=False)
        optim = OptimConfig(lr=settings["lr"])
        module = AutoencoderModule(tokenizer, digits.CLASSES, objective, optim=optim)
    return module, fit(module, {**settings, "steps": settings["vae_steps"]}, seed)


@torch.no_grad()
def reconstructed(module: AutoencoderModule, average: EMA, images: Tensor) -> Tensor:
    """uint8 images (B, 3, S, S) there and back."""
    with average.weights(module, average.names[0]):
        return to_uint8(module.reconstruct(images))


# What pictures become


@torch.no_grad()
def redrawn(module: JetFormerModule, average: EMA, images: Tensor, seed: int) -> Tensor:
    """uint8 images (B, 3, S, S) of which what the decoder models is kept, and the rest drawn from its prior."""
    generator = Generator().manual_seed(seed)
    with eval_mode(module), average.weights(module, average.names[0]):
        latents = module.front(module.tokenizer({"image": images}, generator).x)
        rest = torch.randn(latents.rest.shape, generator=generator)
        return to_uint8(module.tokenizer.decode(module.front.inverse(latents.soft, rest)))


def noised(images: Tensor, sigma: float, seed: int) -> Tensor:
    """uint8 images (B, 3, S, S) with the curriculum's noise; what leaves the range is clipped, only to be seen."""
    tokenizer, generator = digits.dequantised(PATCH), Generator().manual_seed(seed)
    levels = noisy(tokenizer.encode_image(images), sigma, generator)
    return to_uint8(tokenizer.decode(tokenizer.encode_raw(levels, generator).x))


def noisy(levels: Tensor, sigma: float, generator: Generator | None) -> Tensor:
    """Levels (B, 1, S, S) with noise of `sigma` levels of 256, whole numbers, as JetFormer's."""
    noise = torch.randn(levels.shape, generator=generator)
    return (levels + sigma * (digits.LEVELS - 1) / 255 * noise).round()


def distance(images: Tensor, others: Tensor) -> float:
    """Root mean square, in grey levels of 256."""
    return (images.float() - others.float()).square().mean().sqrt().item()


# What is told


def bits(found: dict[str, Cell], settings: Settings, model: Model) -> float:
    """Per pixel of the validation digits, mean over seeds."""
    return digits.figure(found, settings, model, VALIDATION, "bpd")


def far(found: dict[str, Cell], settings: Settings, model: Model) -> float:
    """Distance of the samples, mean over seeds."""
    return digits.figure(found, settings, model, DRAWN)


def closer(found: dict[str, Cell], settings: Settings, one: Model, other: Model) -> tuple[bool, str]:
    """Whether samples of `one` are nearer to the data, and both distances."""
    first, second = (far(found, settings, model) for model in (one, other))
    return first < second, f"{first:.3g} and {second:.3g}"


def setting(settings: Settings) -> str:
    """Data, model, training, figures: what all JetFormer claims share."""
    kept = settings["kept"]
    return (
        f"scikit-learn's digits at {SIDE} px, grey, in {PATCH}x{PATCH} patches, dequantised at their own "
        f"{digits.LEVELS} levels: {TOKENS} tokens of {PATCH**2} numbers, as in GIVT's claims. The released form: a "
        f"flow of {settings['couplings']} couplings, each with one ViT block {settings['flow_width']} wide, and a "
        f"decoder {settings['width']} wide and {settings['depth']} deep models {kept} numbers of a token by "
        f"{RELEASED.mixtures} components that start apart, the other {PATCH**2 - kept} are standard normal; "
        f"{RELEASED.tables} tables for the label, no dropout; noise on pixels falls from {RELEASED.rgb_noise:g} levels "
        f"of 256 to 0, that on tokens is at most {RELEASED.token_noise:g}. {settings['steps']} steps of "
        f"{settings['batch']} images, AdamW, lr {settings['lr']:g} with a cosine, gradients clipped to norm "
        f"{settings['clip']:g}, average {settings['ema']}; of a seed all models see the same rows with the same noise "
        f"in their levels; seeds {settings['seeds']}. Bits are those of the validation digits without other noise, "
        f"means over {settings['noise_draws']} draws of that in their levels. {settings['samples']} samples at "
        "temperature 1 without guidance; `fd_randconv` is a Frechet distance to the training digits over fixed random "
        "convolutions; a support vector machine reads the samples; variance is that of pixels within a class. Tables "
        "of the paper were not at hand: its claims are those that its reviews and later papers tell."
    )

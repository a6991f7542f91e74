"""Small GIVT-Causals for claims: on scikit-learn's digits, and on sequences whose entropy is known.

Digits are 8x8 grey pixels in 2x2 patches, dequantised at their own 17 levels: 16 tokens of 4 numbers. Sequences are 16
vectors of 2 numbers of `datamodules.synthetic.MixtureData`. A cell trains one model and holds its figures on validation
rows and a group of figures for each way in which it is sampled.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from benchmarks.claims import digits
from benchmarks.claims.digits import VALIDATION
from benchmarks.claims.ledger import Cell, Settings
from datamodules.digits import SIDE
from datamodules.synthetic import MixtureData, VectorRows
from layers.flows.adapter import AdapterConfig
from layers.networks.givt import GIVTConfig
from layers.random import mix_seed
from layers.tokenizers.base import Tokenizer, Tokens, to_uint8
from layers.tokenizers.vectors import VectorTokenizer
from lightning_modules.base import Batch
from lightning_modules.callbacks.ema import EMA
from lightning_modules.givt import GIVTModule, GIVTObjective, GIVTSampling, HeadConfig
from lightning_modules.optim import OptimConfig

PATCH = 2  # pixels
TOKENS = (SIDE // PATCH) ** 2
MODEL = {
    "seeds": [0, 1, 2],
    "width": 64,
    "depth": 4,
    "num_heads": 4,
    "adapter_blocks": 8,
    "bottleneck": 16,
    "label_drop": 0.1,
    "steps": 900,
    "batch": 32,
    "lr": 2e-3,
    "warmup": 100,
    "clip": 1.0,
    "ema": 0.99,
    "noise_draws": 4,
    "samples": 500,
}
PROCESS = {"image_size": 4, "token_dim": 2, "num_modes": 4, "num_classes": 4}  # MixtureData's
DIGITS, KNOWN = "digits", "known entropy"
LIKELIHOOD = {"nats_per_token": "nats per token", "bpd": "bits per pixel"}
USAGE = {"component_entropy": "entropy of components", "component_spread": "spread of components"}
OWN_NATS = "own_nats"  # of samples, under the model that drew them


class Model(NamedTuple):
    """What distinguishes the trained models."""

    num_mixtures: int
    kind: str = "diagonal"
    init: str = "spread"
    adapter: bool = False
    rows: str = DIGITS

    def key(self, seed: int) -> str:
        adapter = " adapter" if self.adapter else ""
        return f"{self.rows} k={self.num_mixtures} {self.kind} {self.init}{adapter} seed={seed}"

    def name(self) -> str:
        what = f"k = {self.num_mixtures}" if self.kind == "diagonal" else f"k = 1, {self.kind} covariance"
        return what + ", init zero" * (self.init == "zero") + ", adapter" * self.adapter


class Way(NamedTuple):
    """How a model is sampled. Ways of one stream start from the same noise; those of two are independent."""

    sampling: GIVTSampling
    stream: int = 0


def build(model: Model, settings: Settings, seed: int) -> GIVTModule:
    """A fresh model, without dropout: its weights depend on the seed, its sizes on `settings`."""
    width = settings["width"]
    net = GIVTConfig(
        width=width, depth=settings["depth"], num_heads=settings["num_heads"], mlp_hidden=4 * width, dropout=0.0
    )
    head = HeadConfig(model.num_mixtures, model.kind, init=model.init)
    adapter = AdapterConfig(settings["adapter_blocks"] if model.adapter else 0, settings["bottleneck"])
    objective = GIVTObjective(label_drop_prob=settings["label_drop"])
    classes = digits.CLASSES if model.rows == DIGITS else PROCESS["num_classes"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        optim = OptimConfig(lr=settings["lr"])
        return GIVTModule(make_tokenizer(model.rows), classes, net, head, adapter, objective, optim=optim)


def make_tokenizer(rows: str) -> Tokenizer:
    if rows == DIGITS:
        return digits.dequantised(PATCH)
    return VectorTokenizer(PROCESS["image_size"], PROCESS["token_dim"])


def train_and_validate(model: Model, settings: Settings, seed: int) -> tuple[GIVTModule, EMA, Cell]:
    """The trained module, its average, and the average's figures on validation rows."""
    module, train, val = build(model, settings, seed), *make_rows(model.rows)
    average = digits.train(module, settings, seed, data=train, clip=settings["clip"])
    return module, average, digits.validate(module, average, val, settings["noise_draws"])


def make_rows(rows: str) -> tuple[Batch, Batch]:
    """Training and validation rows."""
    return known_rows() if rows == KNOWN else tuple(digits.whole(SIDE, split) for split in ("train", "val"))


@cache
def known_rows() -> tuple[Batch, Batch]:
    return tuple(_vectors(rows) for rows in MixtureData(**PROCESS).make_datasets())


def _vectors(rows: VectorRows) -> Batch:
    return {"raw": rows.z, "label": rows.labels, "true_nats": rows.true_nats}


def compute(model: Model, settings: Settings, seed: int, ways: dict[str, Way]) -> tuple[Cell, dict[str, Tensor]]:
    """Train, then a group of figures for each way, ten images of each as "points"; and all images by way."""
    module, average, validation = train_and_validate(model, settings, seed)
    cell, images = {VALIDATION: validation}, {}
    for name, way in ways.items():
        generator = Generator().manual_seed(mix_seed(seed, way.stream))
        images[name], labels, nats = draw(module, average, settings["samples"], way.sampling, generator)
        cell[name] = {**digits.measure(images[name], labels), OWN_NATS: nats}
    points = {name: found[: digits.CLASSES].tolist() for name, found in images.items()}
    return {**cell, "points": points}, images


@torch.no_grad()
def draw(
    module: GIVTModule, average: EMA, count: int, sampling: GIVTSampling, generator: Generator
) -> tuple[Tensor, Tensor, float]:
    """uint8 images (count, 3, S, S) of the averaged weights, their labels, classes in turn, and nats per token of what
    was drawn, under the untempered model."""
    labels = torch.arange(count) % digits.CLASSES
    module.eval()
    with average.weights(module, average.names[0]):
        x = module.sample_tokens(labels, sampling, generator)
        nats = module.causal_loss(Tokens(x), labels, {})["nats_per_token"].item()
    return to_uint8(module.tokenizer.decode(x)), labels, nats


def setting(settings: Settings) -> str:
    """Data, model, training, figures: what all GIVT claims share."""
    return (
        f"scikit-learn's digits at {SIDE} px, grey, in {PATCH}x{PATCH} patches, dequantised at their own "
        f"{digits.LEVELS} levels: {TOKENS} tokens of {PATCH**2} numbers. GIVT-Causal, {settings['width']} wide "
        f"and {settings['depth']} deep, no dropout, labels dropped at {settings['label_drop']:g}; {settings['steps']} "
        f"steps of {settings['batch']} images, AdamW, lr {settings['lr']:g} with a cosine, gradients clipped to norm "
        f"{settings['clip']:g}, average {settings['ema']}; of a seed all models see the same rows and noise; seeds "
        f"{settings['seeds']}. Likelihoods are those of the validation digits, means over {settings['noise_draws']} "
        f"draws of the noise that fills their levels. {settings['samples']} samples; `fd_randconv` is a Frechet "
        "distance to the training digits over fixed random convolutions; a support vector machine reads the samples; "
        "variance is that of pixels within a class. Single cells were tried after the rules were written and before "
        "the full run. Rules that do not name the paper are expectations of ours, not claims of its."
    )

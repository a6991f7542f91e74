"""Small models on scikit-learn's digits, for claims: a training loop, and figures that need no trained network.

The digits are stored at 8 px; larger ones have every pixel repeated. In: a GenerativeModule. Out: uint8 samples
(N, 3, S, S) and their Frechet distance, the verdict of `judge_digits`, and their noise; the verdict of a claim's rules.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from benchmarks.claims.ledger import Cell, Settings
from benchmarks.judge_digits import judge
from datamodules.base import TensorRows
from datamodules.digits import SIDE, DigitsData
from layers.random import mix_seed
from lightning_modules.base import GenerativeModule, to_uint8
from lightning_modules.callbacks.ema import EMA
from lightning_modules.extractors import RandomConvolutions
from lightning_modules.optim import learning_rate
from lightning_modules.scores import frechet_distance

CLASSES = 10
LARGE = 32  # pixels at which distances are taken


@cache
def rows(image_size: int, split: str) -> TensorRows:
    """The "train" or "val" split."""
    train, val = DigitsData(image_size=image_size, batch_size=1).make_datasets()
    return train if split == "train" else val


def train(module: GenerativeModule, settings: Settings, seed: int, *, reseed: bool = False) -> EMA:
    """`steps` AdamW steps of `batch` rows with `lr`, `warmup` and a cosine to 0; the average of decay `ema`.

    Rows and noise depend on the seed alone, not on the model. reseed: each step's noise has a seed of its own, as in
    training by recipe, for a module that takes more than noise from the seed.
    """
    digits = rows(module.tokenizer.image_size, "train")
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings["lr"], betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    average = EMA([settings["ema"]])
    average.start(module)
    order, generator = Generator().manual_seed(seed), Generator().manual_seed(seed + 1000)
    module.train()
    for step in range(settings["steps"]):
        optimizer.param_groups[0]["lr"] = learning_rate(
            step, peak=settings["lr"], warmup=settings["warmup"], total=settings["steps"], schedule="cosine"
        )
        chosen = torch.randint(len(digits), (settings["batch"],), generator=order)
        batch = {"image": digits.images[chosen], "label": digits.labels[chosen]}
        if reseed:
            generator.manual_seed(mix_seed(seed, step))
        optimizer.zero_grad()
        module.training_loss(batch, generator)["loss"].backward()
        optimizer.step()
        average.update(module)
    return average


def draw_samples(
    module: GenerativeModule, average: EMA, count: int, seed: int, *, sampling: Any = None
) -> tuple[Tensor, Tensor]:
    """uint8 images (count, 3, S, S) of the averaged weights and their labels, classes in turn; NaN becomes grey.

    `sampling` instead of the module's own settings.
    """
    labels = torch.arange(count) % CLASSES
    with average.weights(module, average.names[0]):
        samples = module.sample(labels, sampling, Generator().manual_seed(seed))
    return to_uint8(samples.nan_to_num(0.0)), labels


def measure(images: Tensor, labels: Tensor) -> Cell:
    """Figures of uint8 samples (N, 3, S, S) that were asked for as labels (N,)."""
    verdict = judge(images, labels.numpy())
    return {
        "fd_randconv": frechet_distance(*moments(images), *real_moments()),
        "accuracy": verdict["accuracy"],
        "variance_ratio": verdict["variance_ratio"],
        "noise": noise_level(images),
    }


def moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of fixed random convolutions' features, at 32 px whatever the size."""
    factor = LARGE // images.shape[-1]
    large = images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    features = RandomConvolutions()(large)[0].double()  # (N, d)
    return features.mean(0), features.T.cov()


@cache
def real_moments() -> tuple[Tensor, Tensor]:
    return moments(rows(LARGE, "train").images)


def noise_level(images: Tensor) -> float:
    """RMS distance, in grey levels, from the nearest image that is grey and constant over each repeated pixel, as every
    real digit is."""
    x, factor = images.float(), images.shape[-1] // SIDE
    nearest = F.adaptive_avg_pool2d(x.mean(1, keepdim=True), SIDE)
    return (x - nearest.repeat_interleave(factor, -1).repeat_interleave(factor, -2)).square().mean().sqrt().item()


def rules_verdict(judged: Sequence[tuple[bool, str]]) -> str:
    """How many rules hold, and a line for each: whether it does, and its text with the figures found."""
    held = sum(holds for holds, _ in judged)
    lines = [f"{i}. {'agrees' if holds else 'DISAGREES'}: {text}." for i, (holds, text) in enumerate(judged, 1)]
    return f"{held} of {len(judged)} rules agree with the paper; distances are `fd_randconv`.\n\n" + "\n".join(lines)

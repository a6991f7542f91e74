"""Small models on scikit-learn's digits, for claims: a training loop, figures that need no trained network, and what is
told of them.

The digits are stored at 8 px; larger ones have every pixel repeated. In: a GenerativeModule. Out: uint8 samples
(N, 3, S, S) and their Frechet distance, the verdict of `judge_digits`, and their noise; table lines, pictures, and the
verdict of a claim's rules. A cell of figures is that of a model and a seed, and has a group for each way of sampling.
"""

import math
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from benchmarks.claims.ledger import Cell, Settings, mean, spread
from benchmarks.judge_digits import judge
from datamodules.base import TensorRows
from datamodules.digits import SIDE, DigitsData
from layers.random import mix_seed
from layers.tokenizers.dequantised import DequantisedTokenizer
from lightning_modules.base import Batch, GenerativeModule, to_uint8
from lightning_modules.callbacks.ema import EMA
from lightning_modules.extractors import RandomConvolutions
from lightning_modules.optim import learning_rate
from lightning_modules.pictures import make_grid
from lightning_modules.scores import frechet_distance

CLASSES = 10
LARGE = 32  # pixels at which distances are taken
LEVELS = 17  # grey values of the digits
VALIDATION = "validation"  # group of figures on validation rows
FIGURES = {
    "fd_randconv": "`fd_randconv`",
    "accuracy": "read as asked",
    "variance_ratio": "variance, of real",
}
REAL = "real digits (validation)"  # a cell without a model: about the best that can be reached


class Keyed(Protocol):
    """What distinguishes a claim's models."""

    def key(self, seed: int) -> str:
        """Name of the cell."""


@cache
def rows(image_size: int, split: str) -> TensorRows:
    """The "train" or "val" split."""
    train, val = DigitsData(image_size=image_size, batch_size=1).make_datasets()
    return train if split == "train" else val


def whole(image_size: int, split: str) -> Batch:
    """A split as one batch."""
    found = rows(image_size, split)
    return {"image": found.images, "label": found.labels}


def train(
    module: GenerativeModule,
    settings: Settings,
    seed: int,
    *,
    reseed: bool = False,
    data: Batch | None = None,
    clip: float = math.inf,
) -> EMA:
    """`steps` AdamW steps of `batch` rows with `lr`, `warmup` and a cosine to 0; the average of decay `ema`.

    Rows and noise depend on the seed alone, not on the model. reseed: each step's noise has a seed of its own, as in
    training by recipe, for a module that takes more than noise from the seed. data: the rows, by default the training
    digits. clip: largest norm of a step's gradient.
    """
    data = whole(module.tokenizer.image_size, "train") if data is None else data
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
        chosen = torch.randint(len(data["label"]), (settings["batch"],), generator=order)
        batch = {name: values[chosen] for name, values in data.items()}
        if reseed:
            generator.manual_seed(mix_seed(seed, step))
        optimizer.zero_grad()
        module.training_loss(batch, generator)["loss"].backward()
        if clip < math.inf:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        average.update(module)
    return average


def dequantised(patch_size: int) -> DequantisedTokenizer:
    """Tokens of the stored digits with their density. Among 256 levels a model's first gain is to find those that never
    occur, by scales so small that it takes thousands of steps."""
    return DequantisedTokenizer(SIDE, patch_size, channels=1, levels=LEVELS)


@torch.no_grad()
def validate(module: GenerativeModule, average: EMA, batch: Batch, noise_draws: int) -> Cell:
    """What the loss tells of the averaged weights, means over draws of the noise in the tokens."""
    module.eval()
    with average.weights(module, average.names[0]):
        draws = [module.training_loss(batch, Generator().manual_seed(i)) for i in range(noise_draws)]
    return {name: mean([terms[name].item() for terms in draws]) for name in draws[0]}


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


def measure_real() -> Cell:
    """Figures of the validation digits."""
    real = rows(SIDE, "val")
    return measure(real.images, real.labels)


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


# What is told of the figures


def of_seeds(found: dict[str, Cell], settings: Settings, model: Keyed, way: str, name: str) -> list[float]:
    return [found[model.key(seed)][way][name] for seed in settings["seeds"]]


def figure(found: dict[str, Cell], settings: Settings, model: Keyed, way: str, name: str = "fd_randconv") -> float:
    """Mean over seeds."""
    return mean(of_seeds(found, settings, model, way, name))


def table_line(
    found: dict[str, Cell], settings: Settings, model: Keyed, way: str, names: Iterable[str] = FIGURES
) -> list[str]:
    """Each of `names`: mean over seeds and range."""
    return [spread(of_seeds(found, settings, model, way, name)) for name in names]


def series(values: Sequence[float], at: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g} at {x:g}" for value, x in zip(values, at, strict=True))


def draw_panels(panels: Sequence[Sequence[tuple[str, Any]]], path: Path) -> None:
    """Rows of (title, ten uint8 images as lists or a tensor), each as two rows of five digits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = max(map(len, panels))
    size = (1.7 * columns, 1.05 * len(panels))
    sheet, axes = pyplot.subplots(len(panels), columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for row, line in zip(axes, panels, strict=True):
        for axis, (title, images) in zip(row, line, strict=False):  # a shorter line leaves the rest empty
            grid = make_grid(torch.as_tensor(images, dtype=torch.uint8), columns=5, pad=1)
            axis.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_title(title, fontsize=6)
    sheet.tight_layout(pad=0.4)
    sheet.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(sheet)


def rules_verdict(judged: Sequence[tuple[bool, str]]) -> str:
    """How many rules hold, and a line for each: whether it does, and its text with the figures found."""
    held = sum(holds for holds, _ in judged)
    lines = [f"{i}. {'agrees' if holds else 'DISAGREES'}: {text}." for i, (holds, text) in enumerate(judged, 1)]
    return f"{held} of {len(judged)} rules agree with the paper; distances are `fd_randconv`.\n\n" + "\n".join(lines)

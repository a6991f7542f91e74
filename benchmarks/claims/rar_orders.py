"""The orders in which RAR is trained: `python -m benchmarks.claims.rar_orders`.

On real digits, as 16 ids of a codebook: random orders that anneal to raster order, raster order alone, random orders
alone; and random orders that anneal to each of the paper's six scans. One cell is one model and seed.
"""

import math
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from benchmarks.claims import digits, mar_models
from benchmarks.claims.digits import FIGURES, REAL, VALIDATION, figure
from benchmarks.claims.ledger import Cell, Claim, Settings, command, markdown_table
from benchmarks.claims.mar_models import PATCH, TOKENS
from datamodules.digits import SIDE
from experiments.errors import one_line_errors
from layers.networks.rar import RARConfig
from layers.orders import Scan, annealed_orders, random_ratio
from lightning_modules.base import Batch
from lightning_modules.optim import OptimConfig
from lightning_modules.rar import RARModule, RARObjective, RARSampling

SETTINGS = {
    "seeds": [0, 1],
    "vocab": 64,
    "width": 64,
    "depth": 3,
    "num_heads": 4,
    "anneal": [0.5, 0.75],
    "label_drop": 0.1,
    "steps": 1000,
    "batch": 32,
    "lr": 2e-3,
    "warmup": 100,
    "clip": 1.0,
    "ema": 0.0,
    "noise_draws": 4,
    "samples": 500,
    "random_orders": 10,
}
CODED = "real digits, coded"  # about the best that can be reached
DRAWN = "samples"  # group of the figures of samples
BITS = {"bits": "bits per id"}
ANNEALED, FIXED, RANDOM = "annealed", "fixed", "random"
PAPER = {ANNEALED: 2.18, FIXED: 3.08, RANDOM: 3.01}  # FID of RAR-L, Table 2; the scans' are Table 3's
PAPER_SCANS: dict[Scan, float] = {
    "raster": 2.18,
    "z_curve": 2.29,
    "subsample": 2.39,
    "spiral_out": 2.46,
    "alternate": 2.48,
    "spiral_in": 2.50,
}
ALIKE = 0.5  # rank correlation that our order of scans and the paper's must have


class Model(NamedTuple):
    """What distinguishes the trained models."""

    orders: str  # ANNEALED, FIXED or RANDOM
    scan: Scan = "raster"  # what is annealed to, or fixed

    def key(self, seed: int) -> str:
        return f"{self.orders} {self.scan} seed={seed}"

    def name(self) -> str:
        scan = self.scan.replace("_", "-")
        return {ANNEALED: f"annealed to {scan}", FIXED: f"{scan} only", RANDOM: "always random"}[self.orders]

    def paper(self) -> float:
        return PAPER_SCANS[self.scan] if self.orders == ANNEALED else PAPER[self.orders]


PERMUTED, RASTER_ONLY, ALWAYS_RANDOM = Model(ANNEALED), Model(FIXED), Model(RANDOM)
SCANS = [Model(ANNEALED, scan) for scan in PAPER_SCANS]  # the first is PERMUTED
MODELS = (RASTER_ONLY, ALWAYS_RANDOM, *SCANS)


class TimedRAR(RARModule):
    """A RAR that knows without a trainer how far it is, and is used in the orders in which its training ends: in its
    scan, or, where those are random, in orders that are drawn."""

    done, groups = 0, 1  # training losses so far; orders that share the images of a random model

    def training_loss(self, batch: Batch, generator: Generator | None = None) -> dict[str, Tensor]:
        if self.training:
            losses = super().training_loss(batch, generator)
            self.done += 1
        else:
            ids = self.tokens(batch, generator).x
            coins, keys = (torch.rand(shape, generator=generator) for shape in (len(ids), ids.shape))
            orders = annealed_orders(coins, keys, self.scan, self.random_ratio())
            losses = self.order_loss(ids, batch["label"], orders)
        return {**losses, "bits": losses["loss"].detach() / math.log(2)}

    def random_ratio(self) -> float:
        return random_ratio(self.done, start=self.objective.anneal_start, end=self.objective.anneal_end)

    def sample_tokens(self, labels: Tensor, sampling: RARSampling, generator: Generator | None = None) -> Tensor:
        if not self.random_ratio():
            return super().sample_tokens(labels, sampling, generator)
        scan, parts = self.scan, []
        for part in labels.chunk(self.groups):
            self.scan = torch.randperm(len(scan), generator=generator)
            parts.append(super().sample_tokens(part, sampling, generator))
        self.scan = scan
        return torch.cat(parts)


def build(model: Model, settings: Settings, seed: int) -> TimedRAR:
    """A fresh model, without dropout: its weights depend on the seed, its sizes on `settings`."""
    width, steps = settings["width"], settings["steps"]
    net = RARConfig(
        width=width,
        depth=settings["depth"],
        num_heads=settings["num_heads"],
        mlp_hidden=4 * width,
        attn_dropout=0.0,
        proj_dropout=0.0,
    )
    annealed = [round(share * steps) for share in settings["anneal"]]
    start, end = {ANNEALED: annealed, FIXED: [0, 0], RANDOM: [steps + 1, steps + 1]}[model.orders]
    objective = RARObjective(start, end, model.scan, settings["label_drop"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = mar_models.GreyCodes(SIDE, PATCH, settings["vocab"])
        module = TimedRAR(tokenizer, digits.CLASSES, net, objective, optim=OptimConfig(lr=settings["lr"]))
    module.groups = settings["random_orders"]
    return module


def cells(settings: Settings) -> list[str]:
    return [REAL, *(model.key(seed) for seed, model in product(settings["seeds"], MODELS)), CODED]


def compute(key: str, settings: Settings) -> Cell:
    """Train one model, look at its likelihood in its last orders, draw from it in them."""
    if key == REAL:
        return digits.measure_real()
    if key == CODED:
        return mar_models.measure_coded(settings)
    model, seed = next((m, s) for s, m in product(settings["seeds"], MODELS) if m.key(s) == key)
    module = build(model, settings, seed)
    average = digits.train(module, settings, seed, reseed=True, clip=settings["clip"])
    validation = digits.validate(module, average, digits.whole(SIDE, "val"), settings["noise_draws"])
    images, labels = digits.draw_samples(module, average, settings["samples"], seed)
    points = images[: digits.CLASSES].tolist()
    return {VALIDATION: validation, DRAWN: digits.measure(images, labels), "points": {DRAWN: points}}


def verdict(found: dict[str, Cell], settings: Settings) -> str:
    """A line per rule."""
    return digits.rules_verdict(rules(found, settings))


def rules(found: dict[str, Cell], settings: Settings) -> list[tuple[bool, str]]:
    """Whether each rule holds, and what it says with the figures found."""
    others = (RASTER_ONLY, ALWAYS_RANDOM)
    nearer = [distance_rule(found, settings, other) for other in others]
    return [*nearer, *(bits_rule(found, settings, other) for other in others), *scan_rules(found, settings)]


def far(found: dict[str, Cell], settings: Settings, model: Model) -> float:
    """Distance of the samples, mean over seeds."""
    return figure(found, settings, model, DRAWN)


def distance_rule(found: dict[str, Cell], settings: Settings, other: Model) -> tuple[bool, str]:
    ours, theirs = (far(found, settings, model) for model in (PERMUTED, other))
    return ours < theirs, (
        f"random orders that anneal to raster give better samples than {other.name()}: {ours:.3g} and {theirs:.3g} "
        f"(wanted: less; paper: FID {PERMUTED.paper()} and {other.paper()})"
    )


def bits_rule(found: dict[str, Cell], settings: Settings, other: Model) -> tuple[bool, str]:
    ours, theirs = (figure(found, settings, model, VALIDATION, "bits") for model in (PERMUTED, other))
    return ours < theirs, f"and fewer bits per id than {other.name()}: {ours:.4g} and {theirs:.4g} (wanted: less)"


def scan_rules(found: dict[str, Cell], settings: Settings) -> list[tuple[bool, str]]:
    distances = {model.scan: far(found, settings, model) for model in SCANS}
    best, worst = (pick(distances, key=distances.__getitem__) for pick in (min, max))
    fixed, alike = (
        far(found, settings, RASTER_ONLY),
        rank_correlation(list(distances.values()), [*PAPER_SCANS.values()]),
    )
    told = ", ".join(f"{scan.replace('_', '-')} {distance:.3g}" for scan, distance in distances.items())
    return [
        (
            best == PERMUTED.scan,
            f"of the scans to anneal to raster is the best: {told} (wanted: raster the least; paper: FID "
            f"{', '.join(map(str, PAPER_SCANS.values()))}); seeds of one model differ by up to "
            f"{widest(found, settings):.3g}",
        ),
        (
            distances[worst] < fixed,
            f"and the worst of them is better than raster only: {distances[worst]:.3g} and {fixed:.3g} (wanted: less; "
            f"paper: {max(PAPER_SCANS.values())} and {PAPER[FIXED]})",
        ),
        (
            alike >= ALIKE,
            f"and they come in the paper's order: rank correlation {alike:.3g} (wanted: at least {ALIKE:g})",
        ),
    ]


def widest(found: dict[str, Cell], settings: Settings) -> float:
    """Largest range over seeds of the distance of one scan's samples."""
    seeds = [digits.of_seeds(found, settings, model, DRAWN, "fd_randconv") for model in SCANS]
    return max(max(values) - min(values) for values in seeds)


def rank_correlation(values: list[float], others: list[float]) -> float:
    """Spearman's, without ties: 1 for the same order, -1 for the reverse."""
    ranks = [torch.tensor(series).argsort().argsort() for series in (values, others)]
    count = len(values)
    return 1 - 6 * (ranks[0] - ranks[1]).square().sum().item() / (count * (count**2 - 1))


def tables(found: dict[str, Cell], settings: Settings) -> str:
    """A line per model, means over seeds with their range, beside the paper's FID."""
    lines = [[name, "", *(f"{found[name][column]:.3g}" for column in FIGURES), ""] for name in (REAL, CODED)]
    for model in MODELS:
        bits = digits.table_line(found, settings, model, VALIDATION, BITS)
        lines.append([model.name(), *bits, *digits.table_line(found, settings, model, DRAWN), f"{model.paper():.2f}"])
    return markdown_table(["digits", *BITS.values(), *FIGURES.values(), "FID (paper)"], lines)


def draw(found: dict[str, Cell], settings: Settings, path: Path) -> None:
    """Samples of the first seed, ten per model: above by how orders were drawn, below by scan."""

    def panel(model: Model) -> tuple[str, list]:
        return model.name(), found[model.key(settings["seeds"][0])]["points"][DRAWN]

    real = digits.rows(SIDE, "val")
    shown = torch.stack([real.images[real.labels == label][0] for label in range(digits.CLASSES)])
    above = [("real", shown), *map(panel, (PERMUTED, RASTER_ONLY, ALWAYS_RANDOM))]
    digits.draw_panels([above, list(map(panel, SCANS[1:]))], path)


def setting(settings: Settings) -> str:
    """Data, model, training, figures."""
    start, end = settings["anneal"]
    return (
        f"scikit-learn's digits at {SIDE} px, grey, in {PATCH}x{PATCH} patches as ids of {settings['vocab']} codes, "
        f"which k-means finds in the training patches: {TOKENS} ids. RAR, {settings['width']} wide and "
        f"{settings['depth']} deep, no dropout, labels dropped at {settings['label_drop']:g}; {settings['steps']} "
        f"steps of {settings['batch']} images, AdamW, lr {settings['lr']:g} with a cosine, gradients clipped to norm "
        f"{settings['clip']:g}, raw weights. Orders anneal from {start:g} to {end:g} of the steps, as in the paper; of "
        f"a seed all models see the same rows and draws; seeds {settings['seeds']}. Bits are those of the validation "
        "digits, each model in the orders in which its training ends, in which its samples are drawn as well: one that "
        f"is always random is validated in {settings['noise_draws']} random orders per image and draws in "
        f"{settings['random_orders']}. "
        f"{settings['samples']} samples at temperature 1 without guidance; `fd_randconv` is a Frechet distance to the "
        "training digits over fixed random convolutions; a support vector machine reads the samples; variance is that "
        "of pixels within a class. Sizes and steps were chosen by the time they take, before any model was judged. "
        "Rules about bits and about the order of all scans are expectations of ours."
    )


CLAIM = Claim(
    name="rar_orders",
    title="RAR: random orders that anneal to raster beat raster alone and random orders alone",
    statement=(
        "At equal budget, training in random orders that give way to raster order lowers FID from 3.08 to 2.18; random "
        "orders to the end, also in sampling, give 3.01 (Yu et al., arXiv 2411.00776, Table 2, RAR-L). Of six scans to "
        "anneal to raster is the best (Table 3)."
    ),
    setting=setting,
    settings=SETTINGS,
    cells=cells,
    compute=compute,
    verdict=verdict,
    tables=tables,
    draw=draw,
    caption="Samples of the first seed, ten per model: above real digits and orders, below scans that are annealed to.",
)


@one_line_errors
def main() -> None:
    command(CLAIM)


if __name__ == "__main__":
    main()

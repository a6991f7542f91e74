"""Search guidance and average: `python -m experiments.sweep --exp jit_shapes --ckpt last --cfg 1:4:0.5 --final 2000`.

Every pair of a guidance scale and an average is scored with few images (`--num`), then the best with many (`--final`):
the papers choose both so, and their best differ by model and length of training. Rows go to results.json and .csv, a
plot of the metric over the scale to sweep.png. Figures of few and many images do not compare. `make sweep` calls this.
"""

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L

from experiments import recipes, results
from experiments.errors import one_line_errors
from experiments.evaluate import (
    add_scoring,
    check_module,
    check_options,
    describe,
    launch,
    make_evaluation,
    prepared,
    score,
)
from experiments.load import split_overrides
from experiments.sample import add_source, load
from lightning_modules.evaluation import Evaluation
from lightning_modules.paths import shown

HIGHER_IS_BETTER = ("is", "precision", "recall", "density", "coverage")
Rows = list[dict[str, Any]]


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the rest: overrides of the model."""
    parser = argparse.ArgumentParser(prog="sweep", description=__doc__, allow_abbrev=False)
    add_source(parser)
    add_scoring(parser, num=1000)
    parser.add_argument("--cfg", required=True, help="guidance scales: 1:4:0.5 (first:last:step) or 1,1.5,3")
    parser.add_argument("--metric", help="what to choose by (default: the distance, else the first accuracy)")
    parser.add_argument("--final", type=int, default=0, help="images for the best pair; 0: stop after the search")
    return parser.parse_known_args(argv)


def parse_scales(text: str) -> list[float]:
    """ "1:4:0.5" -> 1, 1.5, ..., 4 and "1,2" -> 1, 2. Raises ValueError for anything else."""
    try:
        if ":" in text:
            first, last, step = (float(part) for part in text.split(":"))
            count = int((last - first) / step + 1e-6) + 1
            scales = [round(first + i * step, 6) for i in range(count)] if step > 0 and last >= first else []
        else:
            scales = [float(part) for part in text.split(",")]
    except (ValueError, ZeroDivisionError, OverflowError):
        scales = []
    if not scales:
        raise ValueError(f"CFG is '{text}': give first:last:step such as 1:4:0.5, or a list such as 1,1.5,3")
    return scales


def choose_metric(figures: dict[str, float], wanted: str | None) -> str:
    """The figure to choose by. Raises ValueError for one that was not measured."""
    if wanted is None:
        keys = [key for key in figures if key == "fid" or key.startswith("fd_")]
        return [*keys, *(key for key in figures if is_better_high(key))][0]
    if wanted not in figures:
        raise ValueError(f"METRIC is '{wanted}': measured were {', '.join(figures)}")
    return wanted


def is_better_high(metric: str) -> bool:
    return metric in HIGHER_IS_BETTER or metric.endswith("_acc") or metric.startswith("is_")


def best_row(rows: Rows, metric: str) -> dict[str, Any]:
    """The row with the lowest distance, or the highest score."""
    return (max if is_better_high(metric) else min)(rows, key=lambda row: row[metric])


def score_pair(
    options: argparse.Namespace,
    overrides: list[str],
    evaluation: Evaluation,
    fabric: L.Fabric,
    ema: str | None,
    cfg: float,
) -> tuple[dict[str, Any], dict[str, float]]:
    """The row of one average and one guidance scale, kept on disk, and the figures in it."""
    options.ema = ema
    module, source = load(options, [*overrides, f"--model.init_args.sampling.cfg_scale={cfg}"])
    figures = score(prepared(module, fabric), evaluation, options, fabric)
    row = {"experiment": options.exp, "weights": source, "ema": ema or "first", "cfg_scale": cfg}
    row |= figures | describe(options, evaluation, module)
    if fabric.is_global_zero:  # at once: a search takes hours
        results.append([row], options.out)
    return row, figures


def plot(rows: Rows, metric: str, path: Path) -> None:
    """The metric over the guidance scale, a line per average."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for ema in dict.fromkeys(row["ema"] for row in rows):
        line = sorted((row["cfg_scale"], row[metric]) for row in rows if row["ema"] == ema)
        axes.plot(*zip(*line, strict=True), marker="o", label=f"average {ema}")
    axes.set(xlabel="guidance scale", ylabel=metric, title=f"{rows[0]['experiment']}, {rows[0]['num_images']} images")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@one_line_errors
def main() -> None:
    options, overrides = parse()
    check_options(options)
    if options.final < 0:
        raise ValueError(f"FINAL is {options.final}: give the images for the best pair, or 0 to stop after the search")
    scales, averages = parse_scales(options.cfg), options.ema.split(",") if options.ema else [None]
    options.out = options.out or recipes.RUNS / options.exp / "sweep"
    results.earlier(options.out)
    data_overrides, overrides = split_overrides(overrides)
    evaluation = make_evaluation(options, data_overrides)
    for ema in averages:  # an average that is not there is an error before the first image
        options.ema = ema
        check_module(load(options, overrides)[0], evaluation, options.exp)
    fabric = launch(options)
    rows, metric = [], ""
    for ema, cfg in product(averages, scales):
        row, figures = score_pair(options, overrides, evaluation, fabric, ema, cfg)
        metric = metric or choose_metric(figures, options.metric)  # a name that was not measured ends the first pair
        rows.append(row)
    best = best_row(rows, metric)
    if fabric.is_global_zero:
        report(rows, best, metric, options.out)
    if options.final:
        evaluation.num_images = options.final
        average = None if best["ema"] == "first" else best["ema"]
        final, _ = score_pair(options, overrides, evaluation, fabric, average, best["cfg_scale"])
        if fabric.is_global_zero:
            title = f"{options.exp}: the best, {options.final} images"
            results.show([final], title=title, folder=options.out)


def report(rows: Rows, best: dict[str, Any], metric: str, folder: Path) -> None:
    """Table, plot and the pair that was found."""
    plot(rows, metric, folder / "sweep.png")
    title = f"{rows[0]['experiment']}: {rows[0]['num_images']} images each"
    results.show(rows, title=title, folder=folder, columns=("ema", "cfg_scale"))
    print(
        f"best by {metric}: average {best['ema']}, cfg_scale {best['cfg_scale']}; plot in {shown(folder / 'sweep.png')}"
    )


if __name__ == "__main__":
    main()

"""Score a model: `python -m experiments.evaluate --exp jit_l16 --official checkpoint-last.pth --stats adm.npz`.

Draws `--num` numbered images and takes FID (or fd_<extractor>), IS, and, where the statistics hold features, precision,
recall, density, coverage and KID from them, plus what the data set can judge by itself. No PNG files are made unless
asked for. A row of the table carries everything that it takes to repeat it; rows are kept in results.json and .csv.
`make eval` calls this; `--devices 2` shares the work, with the same images and figures.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch

from experiments import recipes, results
from experiments.errors import one_line_errors
from experiments.image_files import ImageWriter, read_images
from experiments.load import load_config, load_data
from experiments.sample import add_source, load
from lightning_modules.base import GenerativeModule
from lightning_modules.evaluation import Evaluation
from lightning_modules.extractors import make_extractor
from lightning_modules.generate import Drawn, class_major_labels, draw_images, rank_batches, sampling_autocast
from lightning_modules.protocol import Figure, differences
from lightning_modules.reference import load_reference


def add_scoring(parser: argparse.ArgumentParser, *, num: int | None) -> None:
    """The options that say how to score; those left out are the recipe's (its section fid)."""
    parser.add_argument("--num", type=int, default=num, help="images to draw (default: the recipe's fid.num_images)")
    parser.add_argument("--stats", help="npz of make stats, or ADM's or JiT's")
    parser.add_argument("--extractor", help="inception, effnet_lite0, randconv; none: only what the data set can judge")
    parser.add_argument("--inception", help="the Inception weights file, if not in torch's cache folder")
    parser.add_argument("--knn", type=int, default=10_000, help="images in precision, recall, density, coverage, KID")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--devices", type=int, help="processes (default: every GPU, or one on the CPU)")
    parser.add_argument("--out", type=Path, help="folder of results.json and results.csv (default: runs/EXP/eval)")


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the rest: overrides such as --model.init_args.sampling.cfg_scale=2."""
    parser = argparse.ArgumentParser(prog="eval", description=__doc__, allow_abbrev=False)
    add_source(parser)
    add_scoring(parser, num=None)
    parser.add_argument("--images", type=Path, help="score these instead: a folder of PNG files, or an npz with arr_0")
    parser.add_argument("--save", type=Path, help="also write the images: a folder (PNG) or a file.npz (arr_0)")
    return parser.parse_known_args(argv)


def make_evaluation(options: argparse.Namespace) -> Evaluation:
    """Extractor, statistics and judge of a line, over the recipe's section `fid`; what is missing is an error now."""
    section = load_config(options.exp).get("fid") or {}
    name = options.extractor or section.get("extractor", "inception")
    stats = options.stats or section.get("stats")
    options.num = options.num or section.get("num_images", 50_000)
    extractor = None
    if name not in (None, "none"):
        if not stats:
            raise ValueError(
                f"no statistics to measure against: give STATS=, made by `make stats EXP={options.exp} "
                f"EXTRACTOR={name}`, or EXTRACTOR=none for what the data set can judge by itself"
            )
        extractor = make_extractor(name, weights=options.inception or section.get("inception"))
    reference = load_reference(stats) if extractor else None
    if reference is not None:
        reference.check(extractor)
    judge = load_data(options.exp).score_samples
    if extractor is None and judge is None:
        raise ValueError(f"the data of {options.exp} cannot judge images by itself: give EXTRACTOR= and STATS=")
    return Evaluation(options.num, extractor, reference, judge, options.knn)


def launch(options: argparse.Namespace) -> L.Fabric:
    """The processes that share the work: this one, or `--devices` of them (also under torchrun)."""
    devices = options.devices or (torch.cuda.device_count() if options.device == "cuda" else 1)
    fabric = L.Fabric(accelerator=options.device, devices=devices, strategy="ddp" if devices > 1 else "auto")
    fabric.launch()
    return fabric


def score(
    module: GenerativeModule, evaluation: Evaluation, options: argparse.Namespace, fabric: L.Fabric, writer: Any = None
) -> dict[str, float]:
    """Figures of a module, drawn by all processes."""
    labels = class_major_labels(evaluation.num_images, module.num_classes)
    share = {"rank": fabric.global_rank, "world_size": fabric.world_size}
    drawn = draw_images(module, labels, seed=options.seed, batch_size=options.batch_size, **share)
    batches = len(rank_batches(len(labels), options.batch_size, **share))
    if evaluation.extractor is not None:
        evaluation.extractor.to(fabric.device)
    with torch.no_grad(), sampling_autocast(fabric.device):
        shown = results.progress(drawn, total=batches, visible=fabric.is_global_zero)
        return evaluation(writer.passing(shown) if writer else shown, device=fabric.device)


def score_files(evaluation: Evaluation, options: argparse.Namespace, fabric: L.Fabric) -> dict[str, float]:
    """Figures of images that exist already."""
    images, labels = read_images(options.images)
    evaluation.num_images = len(images)
    if labels is None:
        labels, evaluation.judge = torch.zeros(len(images), dtype=torch.int64), None
    if evaluation.extractor is not None:
        evaluation.extractor.to(fabric.device)
    share = {"rank": fabric.global_rank, "world_size": fabric.world_size}
    batches = rank_batches(len(images), options.batch_size, **share)
    drawn = (Drawn(i, labels[i], images.batch(i).to(fabric.device)) for i in batches)
    return evaluation(results.progress(drawn, len(batches), fabric.is_global_zero), device=fabric.device)


def changed_settings(module: GenerativeModule, experiment: str) -> dict[str, Any]:
    """Sampler settings that are not the recipe's."""
    recipe = load_config(experiment)["model"]["init_args"].get("sampling", {})
    plain = {
        name: list(value) if isinstance(value, tuple) else value for name, value in asdict(module.sampling).items()
    }
    return {name: value for name, value in plain.items() if name in recipe and recipe[name] != value}


def describe(options: argparse.Namespace, evaluation: Evaluation, module: GenerativeModule | None) -> dict[str, Any]:
    """All that a row says beside its figures."""
    extractor, reference = evaluation.extractor, evaluation.reference
    about: dict[str, Any] = {
        "num_images": evaluation.num_images,
        "statistics": Path(reference.path).name if reference else None,
        "statistics_sha256": reference.sha256 if reference else None,
        "extractor": extractor.name if extractor else None,
        "extractor_sha256": extractor.sha256 if extractor else None,
        "resize": extractor.resize if extractor else None,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "arithmetic": "bf16 autocast" if options.device == "cuda" else "float32",
        **results.code_version(),
    }
    if module is None:
        return about | {"not_comparable": ["images of unknown making"]}
    figure = Figure(
        key=extractor.key if extractor else "attribute accuracy",
        num_images=evaluation.num_images,
        num_classes=module.num_classes,
        image_size=module.tokenizer.image_size,
        statistics=about["statistics"],
        changed=changed_settings(module, options.exp),
    )
    about["sampling"] = asdict(module.sampling)
    about["not_comparable"] = differences(figure, module.PROTOCOL)
    if module.PROTOCOL and module.PROTOCOL.num_classes == module.num_classes:
        about["paper_protocol"] = module.PROTOCOL.note
    return about


@one_line_errors
def main() -> None:
    options, overrides = parse()
    if options.images and (options.ckpt or options.official):
        raise ValueError("IMAGES= scores files, CKPT= and OFFICIAL= a model: give one of them")
    if options.batch_size < 1 or (options.num is not None and options.num < 1):
        raise ValueError(f"NUM is {options.num} and --batch_size {options.batch_size}: both must be positive")
    evaluation = make_evaluation(options)
    module, source = (None, str(options.images)) if options.images else load(options, overrides)
    if module is not None and evaluation.reference is not None:
        evaluation.reference.check(evaluation.extractor, image_size=module.tokenizer.image_size)
    writer = ImageWriter(options.save) if options.save else None
    fabric = launch(options)
    if module is None:
        figures = score_files(evaluation, options, fabric)
    else:
        module.to(fabric.device)
        if fabric.device.type == "cuda":
            module.prepare_sampling()
        figures = score(module, evaluation, options, fabric, writer)
    if writer:
        fabric.barrier()
    if writer and fabric.is_global_zero:
        writer.finish()
    if fabric.is_global_zero:
        row = {"experiment": options.exp, "weights": source, "ema": options.ema or "first"} | figures
        folder = options.out or recipes.RUNS / options.exp / "eval"
        results.append([row | describe(options, evaluation, module)], folder)
        results.show([row | describe(options, evaluation, module)], title=f"{options.exp}: {source}", folder=folder)


if __name__ == "__main__":
    main()

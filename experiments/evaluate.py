"""Score a model: `python -m experiments.evaluate --exp jit_l16 --official checkpoint-last.pth --stats adm.npz`.

Draws `--num` numbered images and takes FID (or fd_<extractor>), IS, and, where the statistics hold features, precision,
recall, density, coverage and KID from them, plus what the data set can judge by itself. No PNG files are made unless
asked for. A row of the table carries everything that it takes to repeat it; rows are kept in results.json and .csv.
`make eval` calls this; `--devices 2` shares the work, with the same images and figures.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from experiments import recipes, results
from experiments.errors import one_line_errors
from experiments.image_files import ImageSet, ImageWriter, read_images
from experiments.load import load_config, load_data, split_overrides
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


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for numbers that make no sense, before anything is loaded."""
    for name in ("num", "batch_size", "devices"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise ValueError(f"{name.upper() if name != 'batch_size' else '--batch_size'} is {value}: give 1 or more")


def make_evaluation(options: argparse.Namespace, data_overrides: Sequence[str]) -> Evaluation:
    """Extractor, statistics and judge of a line, over the recipe's section `fid`; what is missing is an error now."""
    section = load_config(options.exp).get("fid") or {}
    name = options.extractor or section.get("extractor", "inception")
    name = None if name == "none" else name
    stats = options.stats or section.get("stats")
    if options.num is None:
        options.num = section.get("num_images", 50_000)
    if name and not stats:
        raise ValueError(
            f"no statistics to measure against: give STATS=, made by `make stats EXP={options.exp} "
            f"EXTRACTOR={name}`, or EXTRACTOR=none for what the data set can judge by itself"
        )
    if options.stats and not name:
        raise ValueError(f"STATS is '{options.stats}' but no extractor compares with it: name one with EXTRACTOR=")
    judge = load_data(options.exp, data_overrides).score_samples
    if not name and judge is None:
        raise ValueError(f"the data of {options.exp} cannot judge images by itself: give EXTRACTOR= and STATS=")
    if not name:
        return Evaluation(options.num, judge=judge)
    extractor = make_extractor(name, weights=options.inception or section.get("inception"))
    reference = load_reference(stats)
    reference.check(extractor)
    return Evaluation(options.num, extractor, reference, judge)


def check_module(module: GenerativeModule, evaluation: Evaluation, exp: str) -> None:
    """Raise ValueError unless the statistics are of the module's image size and the judge of its classes."""
    if evaluation.reference is not None:
        evaluation.reference.check(evaluation.extractor, image_size=module.tokenizer.image_size)
    if evaluation.judge is not None:
        classes = evaluation.judge.__self__.num_classes
        if classes != module.num_classes:
            raise ValueError(
                f"the data of {exp} has {classes} classes, the model {module.num_classes}: repeat the data options "
                f"that it was trained with, such as ARGS='--data.init_args.label_by=shape'"
            )


def launch(options: argparse.Namespace) -> L.Fabric:
    """The processes that share the work: this one, `--devices` of them, or those that torchrun started."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 0))  # set by torchrun, and not by Fabric for its own processes
    nodes = int(os.environ["WORLD_SIZE"]) // local if local else 1
    devices = local or options.devices or (torch.cuda.device_count() if options.device == "cuda" else 1)
    strategy = "ddp" if devices * nodes > 1 else "auto"
    fabric = L.Fabric(accelerator=options.device, devices=devices, num_nodes=nodes, strategy=strategy)
    fabric.launch()
    return fabric


def prepared(module: GenerativeModule, fabric: L.Fabric) -> GenerativeModule:
    """The module on its device, a fast bf16 sampler on CUDA."""
    module.to(fabric.device)
    if fabric.device.type == "cuda":
        module.prepare_sampling()
    return module


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


def score_files(evaluation: Evaluation, images: ImageSet, labels: Tensor | None, options: argparse.Namespace) -> Any:
    """(figures, fabric) of images that exist already."""
    evaluation.num_images = len(images)
    if labels is None:
        labels, evaluation.judge = torch.zeros(len(images), dtype=torch.int64), None
    fabric = launch(options)
    if evaluation.extractor is not None:
        evaluation.extractor.to(fabric.device)
    share = {"rank": fabric.global_rank, "world_size": fabric.world_size}
    batches = rank_batches(len(images), options.batch_size, **share)
    drawn = (Drawn(i, labels[i], images.batch(i).to(fabric.device)) for i in batches)
    return evaluation(results.progress(drawn, len(batches), fabric.is_global_zero), device=fabric.device), fabric


def check_files(evaluation: Evaluation, images: ImageSet, labels: Tensor | None, options: argparse.Namespace) -> None:
    """Raise ValueError for options that say nothing of files, and for files that cannot be scored so."""
    for name in ("ema", "save"):
        if getattr(options, name):
            raise ValueError(f"{name.upper()} is of no use with IMAGES=, which scores files as they are: leave it out")
    height, width = images.shape[:2]
    if evaluation.reference is not None:
        evaluation.reference.check(evaluation.extractor, image_size=height if height == width else None)
    if evaluation.extractor is None and labels is None:
        raise ValueError("these images have no labels to judge by: give EXTRACTOR= and STATS=, or an npz with labels")
    if evaluation.judge is not None and labels is not None:
        classes = evaluation.judge.__self__.num_classes
        if classes and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"labels are {int(labels.min())}..{int(labels.max())}, the data has 0..{classes - 1}")


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
        "real_features": len(reference.features) if reference and reference.features is not None else None,
        "extractor": extractor.name if extractor else None,
        "extractor_sha256": extractor.sha256 if extractor else None,
        "resize": extractor.resize if extractor else None,
        "tf32": torch.backends.cudnn.allow_tf32 if options.device == "cuda" else None,
        **results.code_version(),
    }
    if module is None:
        return about | {"not_comparable": ["images of unknown making"]}
    about["seed"], about["batch_size"] = options.seed, options.batch_size
    about["arithmetic"] = "bf16 autocast" if options.device == "cuda" else "float32"
    figure = Figure(
        key=extractor.key if extractor else "attribute accuracy",
        num_images=evaluation.num_images,
        num_classes=module.num_classes,
        image_size=module.tokenizer.image_size,
        statistics=about["statistics"],
        weights=options.ema or "first",
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
    if options.images and options.num is not None:
        raise ValueError(f"NUM is {options.num}, but IMAGES= scores every file there is: leave it out")
    check_options(options)
    folder = options.out or recipes.RUNS / options.exp / "eval"
    results.earlier(folder)
    data_overrides, model_overrides = split_overrides(overrides)
    evaluation = make_evaluation(options, data_overrides)
    if options.images:
        if model_overrides:
            raise ValueError(f"'{model_overrides[0]}' changes nothing here: IMAGES= scores files")
        images, labels = read_images(options.images)
        check_files(evaluation, images, labels, options)
        figures, fabric = score_files(evaluation, images, labels, options)
        row = (
            {"experiment": options.exp, "weights": str(options.images)} | figures | describe(options, evaluation, None)
        )
    else:
        module, source = load(options, model_overrides)
        check_module(module, evaluation, options.exp)
        writer = ImageWriter(options.save) if options.save else None
        fabric = launch(options)
        figures = score(prepared(module, fabric), evaluation, options, fabric, writer)
        fabric.barrier()
        if writer and fabric.is_global_zero:
            writer.finish()
        row = {"experiment": options.exp, "weights": source, "ema": options.ema or "first"} | figures
        row |= describe(options, evaluation, module)
    if fabric.is_global_zero:
        results.append([row], folder)
        results.show([row], title=f"{options.exp}: {row['weights']}", folder=folder)


if __name__ == "__main__":
    main()

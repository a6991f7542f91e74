"""What a recipe takes, before it is started: `python -m experiments.plan --exp jit_l16 --gpu h100 [--gpus 8]`.

Parameters, bytes of the training state and of the activations against the card's memory, FLOPs per image, hours at a
stated MFU, size of a checkpoint. Overrides as for training: `--data.init_args.batch_size=512`. `make plan` calls this.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from datamodules.sources import is_local
from experiments.costs import build, count_activations, is_cached, sampling_flops, training_flops
from experiments.errors import one_line_errors
from experiments.keys import check_keys
from experiments.load import instantiate, load_config
from experiments.main import SECTIONS
from lightning_modules.base import GenerativeModule
from lightning_modules.callbacks.throughput import PEAK_FLOPS

# name: name in PEAK_FLOPS, memory in the data sheet's GB, taken as 1e9 bytes. Most cards have some per cent more, which
# is left to the CUDA context, the allocator and what lives only for a moment.
CARDS = {
    "h100": ("H100", 80),
    "h100-pcie": ("H100 PCIe", 80),
    "h100-nvl": ("H100 NVL", 94),
    "h200": ("H200", 141),
    "b200": ("B200", 180),
    "a100": ("A100", 80),
    "a100-40": ("A100", 40),
    "l40s": ("L40S", 48),
    "a10g": ("A10G", 24),
    "rtx4090": ("RTX 4090", 24),
    "rtx3090": ("RTX 3090", 24),
}
READ = ("model", "data", "trainer", "ema")  # sections of a recipe that matter here
IMAGENET_ROWS = 1_281_167  # training images of ILSVRC 2012
IMAGENET_NAMES = ("imagenet", "imagenet-1k", "ilsvrc2012")  # last part of a source that is not on this machine
SMALL = 20_000_000  # parameters below which hours by FLOPs say nothing
MFU_SEEN = (
    "MFU: well-tuned training of plain transformers reaches 33 to 46 % of the dense bf16 peak on Hopper cards; no "
    "published repository for diffusion or continuous tokens was found above 25 %."
)


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and overrides of the recipe."""
    parser = argparse.ArgumentParser(prog="plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("--exp", required=True, help="experiment")
    parser.add_argument("--gpu", default="h100", help=", ".join(CARDS))
    parser.add_argument("--gpus", type=int, help="over all nodes (default: the recipe's trainer.devices, or 8)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the card's dense bf16 peak")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    return parser.parse_known_args(argv)


def read_recipe(experiment: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The merged recipe. Raises ValueError for an override that no figure depends on."""
    for text in overrides:
        section = text.removeprefix("--").partition(".")[0]
        if not text.startswith("--") or section not in READ:
            raise ValueError(f"'{text}' changes nothing here: override {', '.join(f'--{name}.*' for name in READ)}")
    check_keys(overrides, load_config(experiment), SECTIONS)
    return load_config(experiment, overrides)


def device_count(trainer: dict[str, Any]) -> int:
    """The devices that a recipe asks for; 8, as in the papers, where it takes what there is."""
    devices = trainer.get("devices", "auto")
    return devices if isinstance(devices, int) and devices > 0 else 8


def planned_steps(trainer: dict[str, Any], data: Any) -> int:
    """Optimiser steps of the whole recipe. Raises ValueError for one without an end."""
    max_steps, max_epochs = trainer.get("max_steps", -1), trainer.get("max_epochs")
    ends = [max_steps] if max_steps != -1 else []
    if max_epochs not in (None, -1):
        ends.append(max_epochs * steps_per_epoch(data))
    if not ends:
        raise ValueError("the recipe has no end: give --trainer.max_steps or --trainer.max_epochs")
    return min(ends)


def steps_per_epoch(data: Any) -> int:
    """From ImageNet's published size, or from the set itself where it is at hand."""
    source = getattr(getattr(data, "images", data), "source", None)
    if source and not Path(source).exists() and Path(source).name.lower() in IMAGENET_NAMES:
        return min(IMAGENET_ROWS, data.limit_n or IMAGENET_ROWS) // data.batch_size
    if source and not is_local(source):
        raise ValueError(f"how many images '{source}' has is not known before a download: give --trainer.max_steps")
    data.setup()
    return data.steps_per_epoch()


def device_batch(batch_size: int, gpus: int, accumulate: int) -> int:
    """Images on one device at once. Raises ValueError if the global batch cannot be divided so."""
    parts = gpus * accumulate
    if batch_size % parts:
        raise ValueError(
            f"batch_size {batch_size} is no multiple of {gpus} GPUs x {accumulate} accumulated batches: change --gpus "
            f"(GPUS=) or --data.init_args.batch_size"
        )
    return batch_size // parts


def trained_bytes(module: GenerativeModule) -> int:
    return sum(p.nbytes for p in module.parameters() if p.requires_grad)


def state_bytes(module: GenerativeModule, decays: Sequence[float], gpus: int) -> dict[str, float]:
    """What each device holds whatever the batch, in float32: weights, gradients, AdamW's two moments, averages."""
    trained = trained_bytes(module)
    state = {"weights": sum(t.nbytes for t in [*module.parameters(), *module.buffers()]), "gradients": trained}
    if gpus > 1:
        state["gradient buckets of DDP"] = trained
    return state | {"optimiser (two moments)": 2 * trained} | {f"EMA {decay}": trained for decay in decays}


def plan_memory(config: dict[str, Any], module: GenerativeModule, batch: int, *, gpu: str, gpus: int) -> dict[str, Any]:
    """Bytes on one device at `batch` images, by name."""
    activations = count_activations(config)
    state = state_bytes(module, config["ema"]["decays"], gpus)
    if activations.weight_copies:
        state["weights cast by autocast"] = activations.weight_copies
    per_image = activations.compiled if module.compile_enabled else activations.eager
    total, capacity = sum(state.values()) + batch * per_image, CARDS[gpu][1] * 1e9
    return {
        "state_bytes": state,
        "compiled": module.compile_enabled,
        "activation_bytes_per_image": per_image,
        "activation_bytes_per_image_eager": activations.eager,
        "total_bytes": total,
        "card_bytes": capacity,
        "fits": total <= capacity,
        "largest_batch_per_device": max(0, int((capacity - sum(state.values())) // per_image)),
    }


def plan_time(
    module: GenerativeModule, images: int, *, cached: bool, gpu: str, gpus: int, mfu: float
) -> dict[str, float]:
    """FLOPs per image, and what follows for a run of `images` images."""
    forward, train = training_flops(module, cached=cached)
    draw = sampling_flops(module)
    speed = mfu * PEAK_FLOPS[CARDS[gpu][0]]
    hours = images * train / speed / gpus / 3600
    return {
        "forward_flops": forward,
        "train_flops": train,
        "images_per_s": gpus * speed / train,
        "hours": hours,
        "gpu_hours": hours * gpus,
        "sampling_flops": draw,
        "samples_per_s": speed / draw,
    }


def make_plan(config: dict[str, Any], *, gpu: str, gpus: int, mfu: float) -> dict[str, Any]:
    """Every figure by name, in bytes, FLOPs, images/s and hours. Raises ValueError for an unknown GPU."""
    if gpu not in CARDS:
        raise ValueError(f"unknown GPU '{gpu}' (GPU=): there are {', '.join(CARDS)}")
    if not 0 < mfu <= 1 or gpus < 1:
        raise ValueError(f"--mfu {mfu} must be above 0 and at most 1, --gpus {gpus} at least 1")
    trainer, data = config["trainer"], instantiate(config["data"], "data")
    accumulate = trainer.get("accumulate_grad_batches", 1)
    batch = device_batch(data.batch_size, gpus, accumulate)
    steps, module = planned_steps(trainer, data), build(config)
    trained, decays = trained_bytes(module), config["ema"]["decays"]
    return {
        "gpu": gpu,
        "gpus": gpus,
        "mfu": mfu,
        "precision": trainer.get("precision", "32-true"),
        "parameters_trained": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "parameters_frozen": sum(p.numel() for p in module.parameters() if not p.requires_grad),
        "batch": data.batch_size,
        "accumulate": accumulate,
        "batch_per_device": batch,
        "steps": steps,
        **plan_memory(config, module, batch, gpu=gpu, gpus=gpus),
        **plan_time(module, steps * data.batch_size, cached=is_cached(config), gpu=gpu, gpus=gpus, mfu=mfu),
        "optimiser_traffic_bytes": 7 * trained + 2 * trained * len(decays),  # AdamW 28 bytes, each average 8, of each 4
        "checkpoint_bytes": sum(t.nbytes for t in module.state_dict().values()) + (2 + len(decays)) * trained,
    }


def gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def flops(count: float) -> str:
    return f"{count / 1e12:.2f} TFLOP" if count >= 1e12 else f"{count / 1e9:.2f} GFLOP"


def rows(plan: dict[str, Any]) -> list[tuple[str, str] | None]:
    """Lines of the table; None is a rule between sections."""
    how = "compiled, estimate" if plan["compiled"] else "eager"
    per_image, batch = plan["activation_bytes_per_image"], plan["batch_per_device"]
    verdict = "fits" if plan["fits"] else "DOES NOT FIT"
    split = f"{plan['gpus']} GPUs x {batch}" + (f" x {plan['accumulate']} in turn" if plan["accumulate"] > 1 else "")
    return [
        ("parameters", f"{plan['parameters_trained']:,} trained, {plan['parameters_frozen']:,} frozen"),
        ("global batch", f"{plan['batch']} = {split}"),
        None,
        *((name, gb(count)) for name, count in plan["state_bytes"].items()),
        (f"activations per image ({how})", gb(per_image)),
        (f"activations of {batch} images", gb(batch * per_image)),
        (f"in all, of {plan['card_bytes'] / 1e9:.0f} GB (estimate)", f"{gb(plan['total_bytes'])}: {verdict}"),
        ("largest batch a device (estimate)", f"{plan['largest_batch_per_device']} images"),
        ("checkpoint on disk", gb(plan["checkpoint_bytes"])),
        None,
        ("FLOPs per image, forward", flops(plan["forward_flops"])),
        ("FLOPs per image, training", flops(plan["train_flops"])),
        ("FLOPs per image, sampling", flops(plan["sampling_flops"])),
        ("bytes moved by optimiser and averages", f"{gb(plan['optimiser_traffic_bytes'])} a step, at the least"),
        None,
        (f"training at {plan['mfu']:.0%} MFU", f"{plan['images_per_s']:,.0f} images/s on {plan['gpus']} GPUs"),
        (
            f"{plan['steps']:,} steps (estimate)",
            f"{plan['hours']:,.2f} hours, {plan['gpu_hours']:,.1f} GPU hours",
        ),
        (f"sampling at {plan['mfu']:.0%} MFU", f"{plan['samples_per_s']:,.2f} images/s on one GPU"),
    ]


def notes(plan: dict[str, Any]) -> list[str]:
    """What the figures leave out."""
    lines = [
        "Counted: parameters, state, FLOPs (2 per multiply-accumulate; training is 3 forwards). Estimates: activations "
        f"(eager code keeps {gb(plan['activation_bytes_per_image_eager'])} per image, compiled code recomputes what is "
        "cheap), the sum, and whatever follows from the stated MFU. Not counted: the backward pass's passing buffers, "
        "the CUDA context, data loading, validation and sampling during the run.",
        MFU_SEEN,
    ]
    if plan["precision"] not in ("bf16-mixed", "16-mixed"):
        lines.append(
            f"The recipe trains in {plan['precision']}, for which the bf16 peak is out of reach: it is slower."
        )
    if plan["parameters_trained"] < SMALL:
        lines.append("A network this small keeps no such GPU busy: its speed is that of launching kernels, far lower.")
    return lines


def show(title: str, plan: dict[str, Any]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    for row in rows(plan):
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    console = Console(width=110)
    console.print(table)
    for line in notes(plan):
        console.print(line, highlight=False)


@one_line_errors
def main() -> None:
    options, overrides = parse()
    recipe = read_recipe(options.exp, overrides)
    gpus = device_count(recipe["trainer"]) if options.gpus is None else options.gpus
    plan = make_plan(recipe, gpu=options.gpu.lower(), gpus=gpus, mfu=options.mfu)
    show(f"{options.exp} on {gpus} x {plan['gpu'].upper()}, {plan['precision']}", plan)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"experiment": options.exp, "overrides": overrides, **plan}, indent=2) + "\n"
        )
        print(f"wrote {options.json}")


if __name__ == "__main__":
    main()

"""`make bench EXP=jit`: our training step and sampler against the plain, official-style path in the same run.

Prints milliseconds, images/s, TFLOP/s, MFU (where the device's peak is known), peak memory and the ratios; writes JSON.
Where the plain path offers parts, the same of these, with the memory that each needs. Random data on the device, no
loader; latents count as cached, and samples are tokens, not decoded. Both paths use the same weights, bf16 autocast on
CUDA and float32 on the host, where a method may shrink its recipe (the title says how).
"""

import argparse
import copy
import importlib.util
import itertools
import json
import platform
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Measured, Sizes, measure
from benchmarks.parts import show_parts, time_parts
from experiments.errors import one_line_errors
from experiments.load import instantiate, load_config
from lightning_modules.base import GenerativeModule
from lightning_modules.callbacks.ema import EMA
from lightning_modules.callbacks.throughput import count_flops, peak_flops
from lightning_modules.optim import adamw, param_groups

WARMUP_STEPS = 4  # enough to meet both batch shapes of a sampler with a guidance interval


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Options, and overrides of the model; sizes that are not given are the method's for the device."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--exp", required=True)
    parser.add_argument("--batch", type=int, help="images per training step")
    parser.add_argument("--sample_batch", type=int, nargs="+", help="images per sampled batch, one or more sizes")
    parser.add_argument("--num_steps", type=int, help="sampling.num_steps")
    parser.add_argument("--num_iter", type=int, help="sampling.num_iter, where the method has iterations")
    parser.add_argument("--repeats", type=int, default=50 if cuda else 5)
    parser.add_argument("--sample_repeats", type=int, default=3 if cuda else 2)
    parser.add_argument("--warmup", type=int, default=20 if cuda else 1)
    parser.add_argument("--only", choices=["train", "sample", "parts"], help="one of the three")
    parser.add_argument("--no-reference", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--json", type=Path, help="where to write (default: runs/bench/<exp>.json)")
    return parser.parse_known_args()


def autocast(device: str) -> Any:
    """The precision of the recipes: bf16 on CUDA, float32 on the host."""
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


def fill_in(options: argparse.Namespace, sizes: Sizes, module: GenerativeModule) -> None:
    """The method's sizes where the line names none; the sampler's settings go into the module.

    Raises ValueError for a setting that its sampler does not have.
    """
    options.batch = options.batch or sizes.train_batch
    options.sample_batch = options.sample_batch or list(sizes.sample_batch)
    named = {name: value for name in ("num_steps", "num_iter") if (value := getattr(options, name)) is not None}
    if unknown := [name for name in named if not hasattr(module.sampling, name)]:
        raise ValueError(f"--{unknown[0]}: the sampler of {type(module).__name__} has no such setting")
    module.sampling = replace(module.sampling, **sizes.sampling | named)


def random_batch(module: GenerativeModule, size: int, device: str) -> dict[str, torch.Tensor]:
    """Random images, with blank texts or maps where the module wants some; or where a frozen tokenizer makes the
    tokens, what a cache holds of such an image."""
    side = module.tokenizer.image_size
    label = torch.randint(0, module.num_classes, (size,), device=device)
    image = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, device=device)
    if not module.tokenizer.frozen:
        return module.blank_batch(size, device) | {"image": image, "label": label}
    module.tokenizer.loaded = True  # random weights will do
    raw = module.tokenizer.encode_image(image[:1])
    return {"raw": raw.repeat(size, *[1] * (raw.ndim - 1)), "label": label}


def excite(module: GenerativeModule) -> None:
    """Small random weights where a fresh network has zeros, so that nothing computes on zeros."""
    for parameter in module.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)


def our_step(module: GenerativeModule, batch: dict[str, torch.Tensor], decays: Sequence[float] = (0.9999,)) -> Any:
    """A training step as the trainer takes it: loss, backward, fused AdamW, averages."""
    groups = param_groups(module.named_parameters(), module.optim.weight_decay, no_weight_decay=module.no_weight_decay)
    optimizer, ema = adamw(groups, module.optim, 1e-4), EMA(decays)
    ema.start(module)
    generator, seeds = torch.Generator(module.device), itertools.count()

    def step() -> None:
        with autocast(module.device.type):
            loss = module.training_loss(batch, generator.manual_seed(next(seeds)))["loss"]  # as the trainer seeds it
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(module)

    return step


def plain_step(
    reference: Any, module: GenerativeModule, batch: dict[str, torch.Tensor], decays: Sequence[float]
) -> Any:
    """A training step as the official loops take it: the loss is read and the device waited for at every step."""
    weights = [p for p in module.parameters() if p.requires_grad]
    optimizer = reference.make_optimizer(weights)
    shadows = [[p.detach().clone() for p in weights] for _ in decays]

    def step() -> None:
        with autocast(module.device.type):
            loss = reference.loss(batch)
        loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        plain_average(shadows, weights, decays)

    return step


@torch.no_grad()
def plain_average(
    shadows: list[list[torch.Tensor]], weights: list[torch.nn.Parameter], decays: Sequence[float]
) -> None:
    """Each average, parameter by parameter, as the official loops update them."""
    for shadow, decay in zip(shadows, decays, strict=True):
        for average, weight in zip(shadow, weights, strict=True):
            average.mul_(decay).add_(weight, alpha=1 - decay)


def row(name: str, measured: Measured, images: int, flops_per_image: float, device: str) -> dict[str, Any]:
    rate = images / measured.median
    peak = peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None
    return {
        "what": name,
        "batch": images,
        "ms": measured.median * 1000,
        "ms_fastest": measured.fastest * 1000,
        "ms_slowest": measured.slowest * 1000,
        "images_per_s": rate,
        "tflops": rate * flops_per_image / 1e12,
        "mfu": rate * flops_per_image / peak if peak else None,
        "peak_gb": measured.peak_bytes / 1e9,
    }


def bench_training(options: argparse.Namespace, module: GenerativeModule, make_reference: Any) -> list[dict[str, Any]]:
    """Rows for our step and the plain one."""
    module.train()
    batch = random_batch(module, options.batch, options.device)
    with torch.no_grad():
        flops = 3 * count_flops(lambda: module.training_loss(batch)) / options.batch
    makers = (
        {} if options.no_reference else {"plain": lambda: plain_step(make_reference(), module, batch, options.decays)}
    )
    makers["ours"] = partial(our_compiled_step, options, module, batch)
    rows = []
    for names in turns(options, makers):
        steps = [makers[name]() for name in names]
        measured = measure(steps, device=options.device, repeats=options.repeats, warmup=options.warmup)
        for name, times in zip(names, measured, strict=True):
            rows.append(row(f"train, {name}", times, options.batch, flops, options.device))
        del steps
        free(options.device)
    return rows


def our_compiled_step(options: argparse.Namespace, module: GenerativeModule, batch: dict[str, torch.Tensor]) -> Any:
    """Our step, compiled as the trainer does unless the options say no."""
    if not options.no_compile:
        for part in module.compiled_modules():
            part.compile(dynamic=module.dynamic_shapes())
    return our_step(module, batch, options.decays)


def turns(options: argparse.Namespace, names: Iterable[str]) -> list[list[str]]:
    """What is timed together: all on the host, whose load changes; on CUDA one by one, alone in its memory."""
    return [list(names)] if options.device == "cpu" else [[name] for name in names]


def bench_sampling(options: argparse.Namespace, module: GenerativeModule, make_reference: Any) -> list[dict[str, Any]]:
    """Rows for our sampler and the plain one at each batch size; FLOPs are those that our sampler needs."""
    module.eval()
    labels = torch.arange(max(options.sample_batch)) % module.num_classes
    flops = sampling_flops(module)
    rows = []
    timing = {"device": options.device, "repeats": options.sample_repeats, "warmup": 0}
    warm = module.sampling
    if options.device == "cpu" and hasattr(warm, "num_steps"):  # elsewhere what is compiled must be met before
        warm = replace(warm, num_steps=min(WARMUP_STEPS, warm.num_steps))
    draws = {} if options.no_reference else {"plain": make_reference().sample}
    draws["ours"] = module.sample_tokens
    for names in turns(options, draws):
        if options.device == "cuda" and names == ["ours"]:
            module.prepare_sampling(compile=not options.no_compile)
        for size in options.sample_batch:
            chosen = labels[:size].to(options.device)
            with autocast(options.device), torch.no_grad():
                for name in names:
                    draws[name](chosen, warm)
                measured = measure([partial(draws[name], chosen, module.sampling) for name in names], **timing)
            for name, times in zip(names, measured, strict=True):
                rows.append(row(f"sample, {name}", times, size, flops, options.device))
    return rows


def bench_parts(options: argparse.Namespace, module: GenerativeModule, make_reference: Any) -> list[dict[str, Any]]:
    """Rows for the parts that the plain path offers."""
    module.eval()
    parts = make_reference().parts(options.sample_batch[0])
    with autocast(options.device):
        return time_parts(parts, device=options.device, repeats=options.repeats)


def sampling_flops(module: GenerativeModule) -> int:
    """FLOPs of one image by our sampler, counted on the meta device: nothing is computed."""
    meta = copy.deepcopy(module).to("meta")
    with torch.no_grad():
        return count_flops(lambda: meta.sample_tokens(torch.zeros(1, dtype=torch.int64, device="meta"), meta.sampling))


def free(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()


def environment(options: argparse.Namespace) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "precision": "bf16 autocast" if options.device == "cuda" else "float32",
        "compile": not options.no_compile and options.device == "cuda",
    }


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """The rows, each with its speed against the plain path of the same batch."""
    table = Table(title=title, title_justify="left")
    for column in ("what", "batch", "ms", "images/s", "TFLOP/s", "MFU", "peak GB", "ratio"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for r in rows:
        table.add_row(
            r["what"],
            str(r["batch"]),
            f"{r['ms']:.1f}",
            f"{r['images_per_s']:.2f}",
            f"{r['tflops']:.2f}",
            f"{r['mfu']:.1%}" if r["mfu"] else "-",
            f"{r['peak_gb']:.1f}" if r["peak_gb"] else "-",
            f"{r['ratio']:.2f}x" if r.get("ratio") else "-",
        )
    Console(width=110).print(table)


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Images/s of each "ours" row over the "plain" row of the same kind and batch."""
    plain = {(r["what"].split(",")[0], r["batch"]): r["images_per_s"] for r in rows if r["what"].endswith("plain")}
    for r in rows:
        key = (r["what"].split(",")[0], r["batch"])
        r["ratio"] = r["images_per_s"] / plain[key] if r["what"].endswith("ours") and key in plain else None


def run(options: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """All rows of one experiment."""
    config = load_config(options.exp, overrides)
    method = config["model"]["class_path"].split(".")[1]
    if importlib.util.find_spec(f"benchmarks.references.{method}") is None:
        raise ValueError(f"{options.exp} (EXP=) has no plain path to compare with: benchmarks/references/{method}.py")
    references = importlib.import_module(f"benchmarks.references.{method}")
    changes: list[str] = []
    if options.device == "cpu" and hasattr(references, "cpu_overrides"):
        changes = references.cpu_overrides(config["model"]["init_args"])
        config = load_config(options.exp, [*changes, *overrides])
    options.decays = config["ema"]["decays"]
    results: dict[str, list[dict[str, Any]]] = {}
    for kind, bench in chosen_benches(options, references).items():
        torch.manual_seed(0)
        module = instantiate(config["model"], "model").to(options.device)
        excite(module)
        fill_in(options, references.CUDA if options.device == "cuda" else references.CPU, module)
        described = describe(module, changes)
        compile_blocks = options.device == "cuda" and not options.no_compile
        make_reference = partial(references.Reference, module, compile_blocks=compile_blocks)
        results[kind] = bench(options, module, make_reference)
        del make_reference
        del module
        torch._dynamo.reset()
        free(options.device)
    rows = results.get("train", []) + results.get("sample", [])
    add_ratios(rows)
    result = {"experiment": options.exp, **environment(options), **described}
    return result | {"rows": rows, "parts": results.get("parts", [])}


def chosen_benches(options: argparse.Namespace, references: ModuleType) -> dict[str, Any]:
    """What is timed, by its name. Raises ValueError where --only names what the method does not have."""
    benches = {"train": bench_training, "sample": bench_sampling}
    if hasattr(references.Reference, "parts") and not options.no_reference:
        benches["parts"] = bench_parts
    if options.only is None:
        return benches
    if options.only not in benches:
        raise ValueError(f"--only {options.only}: nothing of that kind is compared here, use {' or '.join(benches)}")
    return {options.only: benches[options.only]}


def describe(module: GenerativeModule, changes: list[str]) -> dict[str, Any]:
    """What was timed: how the recipe was shrunken, trained parameters, sampler settings."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return {"shrunken": changes, "trained_parameters": trained, "sampling": asdict(module.sampling)}


@one_line_errors
def main() -> None:
    options, overrides = parse()
    if options.device == "cpu":
        options.no_compile = True  # the plain interpreter on both sides; no compiler is asked of the machine
    result = run(options, overrides)
    shrunken = " ".join(change.removeprefix("--model.init_args.") for change in result["shrunken"])
    title = (
        f"{options.exp}, {result['trained_parameters'] / 1e6:.1f} M parameters"
        f"{f' (shrunken for the host: {shrunken})' if shrunken else ''}, on {result['device']}, "
        f"torch {result['torch']}, {result['precision']}; sampling {result['sampling']}"
    )
    show(title, result["rows"])
    if result["parts"]:
        show_parts(result["parts"])
    path = options.json or Path("runs/bench") / f"{options.exp}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

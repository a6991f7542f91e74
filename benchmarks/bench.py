"""`make bench EXP=jit`: our training step and sampler against the plain, official-style path in the same run.

Prints milliseconds, images/s, TFLOP/s, MFU (where the device's peak is known), peak memory and the ratios; writes JSON.
Random data on the device, no loader. Both paths use the same weights, bf16 autocast on CUDA and float32 on the host.
"""

import argparse
import copy
import importlib
import json
import platform
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Measured, measure
from experiments.errors import one_line_errors
from experiments.load import load_module
from lightning_modules.base import GenerativeModule
from lightning_modules.callbacks.ema import EMA
from lightning_modules.callbacks.throughput import count_flops, peak_flops
from lightning_modules.optim import adamw, param_groups

EMA_DECAYS = [0.9999, 0.9996]
WARMUP_STEPS = 4  # enough to meet both batch shapes of a sampler with a guidance interval


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Options with sizes that suit the device, and overrides of the model."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--exp", required=True)
    parser.add_argument("--batch", type=int, default=128 if cuda else 2, help="images per training step")
    parser.add_argument("--sample_batch", type=int, nargs="+", default=[256, 1] if cuda else [1])
    parser.add_argument("--sample_steps", type=int, default=50 if cuda else 4)
    parser.add_argument("--repeats", type=int, default=50 if cuda else 5)
    parser.add_argument("--sample_repeats", type=int, default=3 if cuda else 2)
    parser.add_argument("--warmup", type=int, default=20 if cuda else 1)
    parser.add_argument("--only", choices=["train", "sample"], help="one of the two")
    parser.add_argument("--no-reference", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--json", type=Path, help="where to write (default: runs/bench/<exp>.json)")
    return parser.parse_known_args()


def autocast(device: str) -> Any:
    """The precision of the recipes: bf16 on CUDA, float32 on the host."""
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()


def random_batch(module: GenerativeModule, size: int, device: str) -> dict[str, torch.Tensor]:
    side = module.tokenizer.image_size
    image = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, device=device)
    return {"image": image, "label": torch.randint(0, module.num_classes, (size,), device=device)}


def excite(module: GenerativeModule) -> None:
    """Small random weights where a fresh network has zeros, so that nothing computes on zeros."""
    for parameter in module.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)


def our_step(module: GenerativeModule, batch: dict[str, torch.Tensor]) -> Any:
    """A training step as the trainer takes it: loss, backward, fused AdamW, averages."""
    groups = param_groups(module.named_parameters(), 0.0, no_weight_decay=module.no_weight_decay)
    optimizer, ema = adamw(groups, module.optim, 1e-4), EMA(EMA_DECAYS)
    ema.start(module)
    generator = torch.Generator(module.device).manual_seed(0)

    def step() -> None:
        with autocast(module.device.type):
            loss = module.training_loss(batch, generator)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(module)

    return step


def reference_step(reference: Any, module: GenerativeModule, batch: dict[str, torch.Tensor]) -> Any:
    """A training step as the official loops take it: the loss is read and the device waited for at every step."""
    optimizer = reference.make_optimizer(p for p in module.parameters() if p.requires_grad)
    shadows = [[p.detach().clone() for p in module.net.parameters()] for _ in EMA_DECAYS]

    def step() -> None:
        with autocast(module.device.type):
            loss = reference.loss(batch)
        loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if module.device.type == "cuda":
            torch.cuda.synchronize()
        reference.average(shadows, EMA_DECAYS)

    return step


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
    rows = []
    timing = {"device": options.device, "repeats": options.repeats, "warmup": options.warmup}
    if not options.no_reference:
        step = reference_step(make_reference(), module, batch)
        rows.append(row("train, plain", measure(step, **timing), options.batch, flops, options.device))
        del step
        free(options.device)
    if not options.no_compile:
        for part in module.compiled_modules():
            part.compile(dynamic=False)
    rows.append(row("train, ours", measure(our_step(module, batch), **timing), options.batch, flops, options.device))
    return rows


def bench_sampling(options: argparse.Namespace, module: GenerativeModule, make_reference: Any) -> list[dict[str, Any]]:
    """Rows for our sampler and the plain one at each batch size; FLOPs are those that our sampler needs."""
    module.eval()
    module.sampling.num_steps = options.sample_steps
    labels = torch.arange(max(options.sample_batch)) % module.num_classes
    flops = sampling_flops(module)
    rows = []
    timing = {"device": options.device, "repeats": options.sample_repeats, "warmup": 0}

    def timed(name: str, draw: Any) -> None:
        for size in options.sample_batch:
            chosen = labels[:size].to(options.device)
            with autocast(options.device):
                module.sampling.num_steps = WARMUP_STEPS
                draw(chosen)
                module.sampling.num_steps = options.sample_steps
                measured = measure(lambda chosen=chosen: draw(chosen), **timing)
            rows.append(row(f"sample, {name}", measured, size, flops, options.device))

    if not options.no_reference:
        reference = make_reference()
        timed("plain", lambda chosen: reference.sample(chosen, module.sampling))
    if options.device == "cuda":
        module.prepare_sampling(compile=not options.no_compile)
    timed("ours", module.sample)
    return rows


def sampling_flops(module: GenerativeModule) -> int:
    """FLOPs of one image by our sampler, counted on the meta device: nothing is computed."""
    meta = copy.deepcopy(module).to("meta")
    with torch.no_grad():
        return count_flops(lambda: meta.sample(torch.zeros(1, dtype=torch.int64)))


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
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for kind, bench in (("train", bench_training), ("sample", bench_sampling)):
        if options.only not in (None, kind):
            continue
        module = load_module(options.exp, overrides).to(options.device)
        excite(module)
        name = type(module).__module__.rsplit(".", 1)[-1]
        references = importlib.import_module(f"benchmarks.references.{name}")
        compile_blocks = options.device == "cuda" and not options.no_compile
        make_reference = partial(references.Reference, module, compile_blocks=compile_blocks)
        rows += bench(options, module, make_reference)
        del make_reference
        del module
        torch._dynamo.reset()
        free(options.device)
    add_ratios(rows)
    return {"experiment": options.exp, **environment(options), "sampling_steps": options.sample_steps, "rows": rows}


@one_line_errors
def main() -> None:
    options, overrides = parse()
    if options.device == "cpu":
        options.no_compile = True  # the plain interpreter on both sides; no compiler is asked of the machine
    result = run(options, overrides)
    show(f"{options.exp} on {result['device']}, torch {result['torch']}, {result['precision']}", result["rows"])
    path = options.json or Path("runs/bench") / f"{options.exp}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

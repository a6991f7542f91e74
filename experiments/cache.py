"""Latents of a set: `python -m experiments.cache --exp mar_l --split train`, which `make cache` calls.

The recipe's tokenizer encodes every image once (with ten_crop: five crops of it) and, where training mirrors, its
mirror image too. What is written says datamodules/latents.py, which reads it. An interrupted run goes on with the
shards that are missing, or that differ from their sha256. Processes share the shards of one folder; a shard is encoded
in the same batches by whichever of them, so that on one kind of device the bytes depend neither on their number nor on
interrupts.
"""

import argparse
import math
import shutil
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from datamodules.base import BatchData, RowDataset
from datamodules.latents import CROPS, DTYPES, LatentData, latent_key
from datamodules.sampler import RowKey
from datamodules.shards import ShardWriter, shard_batches
from datamodules.transforms import enlarged, five_crop
from experiments import results
from experiments.errors import one_line_errors
from experiments.evaluate import check_options, launch
from experiments.load import instantiate, load_config
from layers.tokenizers.base import Tokenizer
from lightning_modules.config import tokenizer_config
from lightning_modules.paths import shown
from lightning_modules.tokenizer_weights import load_tokenizer_weights
from lightning_modules.weights import state_sha256

TOKENIZER = "model.init_args.tokenizer"
# constructor arguments of a tokenizer that do not change what it encodes
NO_MATTER = {"weights", "frozen", "latent_scale", "latent_shift", "patch_size"}
PROBED = 32  # rows that are read in two epochs, to see that nothing about them is random
STORED = {"float16": torch.float16, "float32": torch.float32}
SMALL_VOCAB = 1 << 16  # ids that uint16 holds


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the rest: overrides of the data and of the tokenizer."""
    parser = argparse.ArgumentParser(prog="cache", description=__doc__, allow_abbrev=False)
    parser.add_argument("--exp", required=True, help="experiment, whose tokenizer encodes the images of its data")
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument("--out", type=Path, help="folder, which gets one per split (default: the root of its data)")
    parser.add_argument("--dtype", choices=STORED, default="float16", help="of what is no integer")
    parser.add_argument("--batch_size", type=int, default=64, help="images encoded at once by one process")
    parser.add_argument("--shard_rows", type=int, default=16_384, help="images of a shard, which is held in memory")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--devices", type=int, help="processes (default: every GPU, or one thread of the CPU)")
    return parser.parse_known_args(argv)


class Job(NamedTuple):
    """What is encoded by what, into which folder. `key`: what the images are, for `meta.json`."""

    images: BatchData
    tokenizer: Tokenizer
    folder: Path
    key: dict[str, Any]


def make_job(options: argparse.Namespace, overrides: Sequence[str]) -> Job:
    """The images and the tokenizer of a recipe, and the folder of the split.

    Raises ValueError for overrides of anything else, for sizes that differ, and for a tokenizer that is trained.
    """
    for text in overrides:
        if not text.startswith(("--data.", f"--{TOKENIZER}.")):
            raise ValueError(f"'{text}' changes nothing here: give --data.init_args.<key>= or --{TOKENIZER}.<key>=")
    config = load_config(options.exp, overrides)
    data = instantiate(config["data"], "data")
    images = data.images if isinstance(data, LatentData) else data
    root = options.out or (data.root if isinstance(data, LatentData) else None)
    if root is None:
        raise ValueError(f"{options.exp} reads images, not latents: say with OUT= where these are to be written")
    if getattr(images, "streaming", False):
        raise ValueError("a stream has no rows to share: set data.init_args.images.init_args.streaming=false")
    tokenizer = instantiate(config["model"]["init_args"]["tokenizer"], TOKENIZER)
    load_tokenizer_weights(tokenizer)
    if tokenizer.image_size != images.image_size:
        raise ValueError(
            f"images of {images.image_size} pixels do not fit a tokenizer for {tokenizer.image_size}: make image_size"
            f" of the data and --{TOKENIZER}.init_args.image_size equal"
        )
    if not tokenizer.frozen and next(tokenizer.parameters(), None) is not None:
        raise ValueError(f"{type(tokenizer).__name__} is trained along with the model: what it encodes does not last")
    ten_crop = options.split == "train" and getattr(data, "ten_crop", False)
    key = latent_key(images, options.split, ten_crop=ten_crop)
    if ten_crop:
        images.image_size = enlarged(images.image_size)
    return Job(images, tokenizer.eval().requires_grad_(False), root / options.split, key)


def exact_arithmetic() -> None:
    """float32 convolutions, one algorithm for each, and one thread: a cache is made once and used for years.

    On the CPU the last bits depend on the number of threads, which differs with that of processes.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    torch.set_num_threads(1)


@torch.inference_mode()
def encode(tokenizer: Tokenizer, images: Tensor, *, mirrored: bool) -> Tensor:
    """uint8 images (B, 3, H, W) -> raw (B, K, ...): of each image and, if `mirrored`, of its mirror image; five crops
    of both if they are larger than the tokenizer's images."""
    sides, size = [images, images.flip(-1)] if mirrored else [images], tokenizer.image_size
    views = [view for side in sides for view in (five_crop(side, size) if side.shape[-1] > size else [side])]
    return torch.stack([tokenizer.encode_image(view) for view in views], dim=1)


def stored(raw: Tensor, dtype: torch.dtype, vocab_size: int | None = None) -> Tensor:
    """As it is written, on the host: floats as `dtype`, ids of a vocabulary as uint16 where it is small enough, other
    int64 as int32, int32 and uint8 as they are.

    Raises ValueError for what is not finite then, for ids outside of the vocabulary or beyond int32, and for other
    types.
    """
    if raw.dtype not in DTYPES.values():
        raise ValueError(f"the tokenizer returns {raw.dtype}, which a cache cannot hold: only {', '.join(DTYPES)}")
    if vocab_size is not None and not 0 <= int(raw.min()) <= int(raw.max()) < vocab_size:
        raise ValueError(
            f"the tokenizer returns ids in {int(raw.min())}..{int(raw.max())}, but its vocabulary is"
            f" 0..{vocab_size - 1}: its weights are damaged, or it is of another size"
        )
    if vocab_size is not None and vocab_size <= SMALL_VOCAB and raw.dtype == torch.int64:
        return raw.cpu().to(torch.uint16)
    if raw.dtype == torch.int64:
        small = raw.to(torch.int32)
        if not torch.equal(small.long(), raw):
            raise ValueError(f"the tokenizer returns ids up to {int(raw.abs().max())}, beyond int32")
        return small.cpu()
    if not raw.is_floating_point():
        return raw.cpu()
    if not raw.isfinite().all():
        raise ValueError("the tokenizer returns values that are not finite: its weights are damaged")
    small = raw.to(dtype)
    if not small.isfinite().all():
        raise ValueError(f"values up to {raw.abs().max().item():.3g} do not fit {dtype}: give ARGS='--dtype float32'")
    return small.cpu()


def check_fixed(rows: RowDataset) -> None:
    """Raise ValueError if rows change from epoch to epoch: one draw would be kept for all of them."""
    probed = range(min(PROBED, len(rows)))
    first, second = (rows.__getitems__([RowKey(epoch, i) for i in probed]) for epoch in (0, 1))
    if not torch.equal(first["image"], second["image"]):
        raise ValueError("these images are drawn anew in each epoch, so a cache would keep one draw: use other data")


def check_space(writer: ShardWriter, numbers: Sequence[int]) -> None:
    """Raise ValueError if the disk is too full for these shards."""
    row_bytes = math.prod(writer.plan["shape"]) * getattr(torch, writer.plan["dtype"]).itemsize + 2 * 8
    needed = row_bytes * sum(len(writer.rows_of(number)) for number in numbers)
    free = shutil.disk_usage(writer.folder).free
    if needed > free:
        raise ValueError(
            f"the latents need {needed / 1e9:.2f} GB in '{writer.folder}', where {free / 1e9:.2f} GB are free: choose"
            f" another folder (OUT=)"
        )


def describe(job: Job, first: Tensor, options: argparse.Namespace, *, mirrored: bool) -> dict[str, Any]:
    """Entries of `meta.json` beside those of the shards. `first`: raw (1, K, ...) of a row."""
    kept = stored(first, STORED[options.dtype], job.tokenizer.vocab_size)
    cropped = job.images.image_size > job.tokenizer.image_size
    return {
        **job.key,
        "num_classes": job.images.num_classes,
        "class_names": job.images.class_names,
        "tokenizer": identity(job.tokenizer) | {"sha256": state_sha256(job.tokenizer.state_dict())},
        "flip": mirrored,
        "vocab_size": job.tokenizer.vocab_size,
        "encoded": str(first.dtype).removeprefix("torch."),
        "dtype": str(kept.dtype).removeprefix("torch."),
        "shape": list(kept.shape[1:]),
        "encode_batch": options.batch_size,  # the last bits of float arithmetic depend on it
        **({"crops": CROPS} if cropped else {}),
    }


def identity(tokenizer: Tokenizer) -> dict[str, Any]:
    """What of a tokenizer decides what it encodes: not where its file lies, nor how tokens are made of the latents."""
    config = tokenizer_config(tokenizer)
    kept = {name: value for name, value in config["init_args"].items() if name not in NO_MATTER}
    return config | {"init_args": kept}


def open_rows(images: BatchData, split: str) -> RowDataset:
    """The rows of a split, never mirrored. Raises ValueError if there is no such split, or its rows are random."""
    if hasattr(images, "flip"):
        images.flip = False
    images.setup()
    images.split_length(split)
    rows = images.train_set if split == "train" else images.val_set
    side = rows[0]["image"].shape[-1]
    if side != images.image_size:
        raise ValueError(
            f"ten crops are cut from images of {images.image_size} pixels, but {type(images).__name__} gives {side}:"
            f" set data.init_args.ten_crop=false"
        )
    check_fixed(rows)
    return rows


def start(job: Job, options: argparse.Namespace, device: torch.device) -> tuple[RowDataset, ShardWriter]:
    """Rows and writer of a job, whose tokenizer is moved to `device`."""
    mirrored = options.split == "train" and getattr(job.images, "flip", False)
    rows = open_rows(job.images, options.split)
    first = encode(job.tokenizer.to(device), rows[0]["image"].to(device), mirrored=mirrored)
    meta = describe(job, first, options, mirrored=mirrored)
    return rows, ShardWriter(job.folder, meta=meta, rows=len(rows), shard_rows=options.shard_rows)


def missing(writer: ShardWriter) -> list[int]:
    """Shards that are to be written, after a look at every byte of the others."""
    damaged = writer.forget_damaged()
    if damaged:
        print(f"shards {', '.join(map(str, damaged))} of '{writer.folder}' are damaged: encoding them again")
    todo = [number for number in writer.numbers() if not writer.is_written(number)]
    if len(todo) < len(writer.numbers()):
        print(f"{len(writer.numbers()) - len(todo)} of {len(writer.numbers())} shards are there and intact")
    return todo


def write_shards(
    job: Job,
    rows: RowDataset,
    writer: ShardWriter,
    numbers: Sequence[int],
    options: argparse.Namespace,
    *,
    device: torch.device,
    visible: bool = False,
) -> None:
    """Encodes and writes the shards `numbers`. `visible`: show the progress."""
    ranges = {number: writer.rows_of(number) for number in numbers}
    batches = shard_batches(rows, ranges, batch_rows=options.batch_size, num_workers=job.images.num_workers)
    total = sum(-(-len(covered) // options.batch_size) for covered in ranges.values())
    for number, group in groupby(results.progress(batches, total, visible), key=itemgetter(0)):
        raw, labels = [], []
        for _, batch in group:
            encoded = encode(job.tokenizer, batch["image"].to(device), mirrored=writer.plan["flip"])
            raw.append(stored(encoded, STORED[options.dtype], writer.plan["vocab_size"]))
            labels.append(batch["label"])
        covered = torch.arange(ranges[number].start, ranges[number].stop)
        writer.write(number, {"raw": torch.cat(raw), "label": torch.cat(labels), "index": covered})


def write_cache(job: Job, options: argparse.Namespace, fabric: Any) -> ShardWriter:
    """Writes what the folder lacks, with all processes: every one of them writes whole shards."""
    rows, writer = start(job, options, fabric.device)
    fabric.barrier()
    todo = fabric.broadcast(missing(writer) if fabric.is_global_zero else None)
    check_space(writer, todo)
    mine = todo[fabric.global_rank :: fabric.world_size]
    write_shards(job, rows, writer, mine, options, device=fabric.device, visible=fabric.is_global_zero)
    fabric.barrier()
    if fabric.is_global_zero:
        writer.finish()
    return writer


@one_line_errors
def main() -> None:
    options, overrides = parse()
    check_options(options)
    if options.shard_rows < 1:
        raise ValueError(f"--shard_rows is {options.shard_rows}: give 1 or more")
    job = make_job(options, overrides)
    fabric = launch(options)
    exact_arithmetic()
    if fabric.local_rank == 0:
        job.images.prepare_data()
    fabric.barrier()
    writer = write_cache(job, options, fabric)
    if fabric.is_global_zero:
        print(f"latents of {writer.rows} images ({options.split}) in {shown(job.folder)}")


if __name__ == "__main__":
    main()

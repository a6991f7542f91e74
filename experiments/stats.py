"""Reference statistics of a set: `python -m experiments.stats --exp jit --extractor inception --out stats/in256.npz`.

Every image of a split once, in the recipe's crop, never flipped (JiT's rule; ADM's file is of the same images in ADM's
own crop). The file holds mean, covariance, what they were made from, and features of up to `--features` images, evenly
spread over the split, for precision, recall, density, coverage and KID. `make stats` calls this.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments import results
from experiments.errors import one_line_errors
from experiments.evaluate import check_options, launch
from experiments.load import instantiate, load_config
from lightning_modules.extractors import make_extractor
from lightning_modules.metrics import KNN_IMAGES, GenerationMetric
from lightning_modules.paths import shown
from lightning_modules.reference import Reference, save_reference


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the rest: overrides such as --data.init_args.source=/my/folder."""
    parser = argparse.ArgumentParser(prog="stats", description=__doc__, allow_abbrev=False)
    parser.add_argument("--exp", required=True, help="experiment, whose data is read")
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument("--extractor", default="inception", help="inception, effnet_lite0 or randconv")
    parser.add_argument("--inception", help="the Inception weights file, if not in torch's cache folder")
    parser.add_argument("--features", type=int, default=KNN_IMAGES, help="images whose features are kept; 0: none")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--devices", type=int, help="processes (default: every GPU, or one on the CPU)")
    parser.add_argument("--out", type=Path, help="npz to write (default: stats/EXP_SPLIT_EXTRACTOR.npz)")
    return parser.parse_known_args(argv)


def make_data(options: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """The recipe's data module, ready and not mirroring. Raises ValueError for overrides of anything else."""
    for text in overrides:
        if not text.startswith("--data."):
            raise ValueError(f"'{text}' changes nothing here: give --data.init_args.<key>=<value>")
    config = load_config(options.exp, overrides)["data"]
    data = instantiate(config, "data")
    data = getattr(data, "images", data)  # of cached latents, what they were made from
    if getattr(data, "flip", False):
        data.flip = False
    return data


def numbered(data: Any, split: str, *, rank: int, world_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(index (B,), uint8 images (B, 3, H, W)) of this process's rows, every row of the split once over all of them."""
    start = 0
    for batch in data.ordered_loader(split, rank=rank, world_size=world_size):
        images = batch["image"]
        yield torch.arange(start, start + len(images)) * world_size + rank, images
        start += len(images)


def describe(data: Any, options: argparse.Namespace, overrides: Sequence[str]) -> str:
    config = load_config(options.exp, overrides)["data"]
    config = (config.get("init_args") or {}).get("images", config)
    source = (config.get("init_args") or {}).get("source")
    name = config["class_path"].rsplit(".", 1)[-1]
    return f"{name}{f' {source}' if source else ''}, split {options.split}, {data.image_size} pixels, not flipped"


@one_line_errors
def main() -> None:
    options, overrides = parse()
    out = options.out or Path("stats") / f"{options.exp}_{options.split}_{options.extractor}.npz"
    if out.suffix != ".npz":
        raise ValueError(f"OUT is '{out}': statistics are npz files")
    check_options(options)
    torch.backends.cudnn.allow_tf32 = False  # a reference is made once and used for years
    data = make_data(options, overrides)
    extractor = make_extractor(options.extractor, weights=options.inception)
    fabric = launch(options)
    if fabric.local_rank == 0:
        data.prepare_data()
    fabric.barrier()
    data.batch_size = options.batch_size * fabric.world_size  # a data module's batch is global
    data.setup()
    rows = data.split_length(options.split)
    metric = GenerationMetric(extractor, num_images=rows, keep_features=options.features).to(fabric.device)
    share = {"rank": fabric.global_rank, "world_size": fabric.world_size}
    batches = -(-rows // (options.batch_size * fabric.world_size))
    for index, images in results.progress(numbered(data, options.split, **share), batches, fabric.is_global_zero):
        metric.update(images.to(fabric.device), index)
    seen = metric.gathered()
    if not fabric.is_global_zero:
        return
    about = {
        "n": seen.n,
        "extractor": extractor.key,
        "weights_sha256": extractor.sha256,
        "resize": extractor.resize,
        "image_size": data.image_size,
        "images": describe(data, options, overrides),
        **results.code_version(),
    }
    save_reference(Reference(seen.mu, seen.sigma, features=seen.kept, about=about), out)
    kept = 0 if seen.kept is None else len(seen.kept)
    print(f"{seen.n} images ({about['images']}), features of {kept} kept, in {shown(out)}")


if __name__ == "__main__":
    main()

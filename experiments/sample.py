"""Draw images: `python -m experiments.sample --exp jit_digits --ckpt last --labels 0,1,2 --num 64 --out out/`.

Writes `grid.png`, one PNG per image, `samples.npz` (`arr_0` uint8 (N, H, W, 3), `labels` int64) and `settings.json`.
Image i depends on (seed, i) only, not on the batch that it was drawn in. Of an autoencoder, which draws nothing, what
comes back of validation images is written (experiments/reconstruct.py). With `--image in.png --mask mask.png` the white
part of the mask is drawn anew, as often as `--num` says. Models of captions draw `--text "red apple|green apple"`, in
turn: labels are then numbers of texts. `make sample` calls this.
"""

import argparse
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from datamodules.decode import FORMATS, decode
from experiments import recipes
from experiments.errors import one_line_errors
from experiments.load import (
    check_arguments,
    find_class,
    instantiate,
    load_config,
    merge,
    parse_override,
    split_overrides,
)
from experiments.reconstruct import reconstruct
from layers.random import row_generators
from lightning_modules.base import GenerativeModule, to_uint8
from lightning_modules.paths import shown
from lightning_modules.pictures import enlarge, labels_in_turn, make_grid, save_png
from lightning_modules.weights import read_checkpoint


def add_source(parser: argparse.ArgumentParser) -> None:
    """The options that say which weights."""
    parser.add_argument("--exp", required=True, help="experiment")
    parser.add_argument("--ckpt", help="'last' or a checkpoint of ours")
    parser.add_argument("--official", help="an official file, .pth or .safetensors")
    parser.add_argument("--ema", help="raw, or a decay (default: the first average); of an official file, its key")


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the rest: overrides such as --model.init_args.sampling.num_steps=10."""
    parser = argparse.ArgumentParser(prog="sample", description=__doc__, allow_abbrev=False)
    add_source(parser)
    parser.add_argument("--labels", help="classes, in turn: 0,1,2 (default: all)")
    parser.add_argument("--text", help="of a model of captions: what to draw, several in turn: 'red apple|dog face'")
    parser.add_argument("--num", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--image", help="an image to edit, of the model's size")
    parser.add_argument("--mask", help="what of it to draw anew: white in an image of the same size")
    parser.add_argument("--compile", action="store_true", help="CUDA graphs, which take a while: for many images")
    return parser.parse_known_args(argv)


def model_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Overrides of the model, merged. Raises ValueError for any other."""
    config: dict[str, Any] = {}
    for text in overrides:
        if not text.startswith("--model."):
            raise ValueError(f"'{text}' changes nothing here: give --model.init_args.<key>=<value>")
        config = merge(config, parse_override(text)["model"])
    return config


def text_overrides(options: argparse.Namespace) -> list[str]:
    """The texts of the line as an override, if there are any. Raises ValueError for a method that knows none."""
    if options.text is None:
        return []
    cls = find_class(load_config(options.exp)["model"]["class_path"], "model")
    if not hasattr(cls, "encode_text"):
        raise ValueError(f"TEXT is '{options.text}', but {cls.__name__} draws classes: give LABELS=")
    return [f"--model.init_args.sampling.prompts={json.dumps(split_texts(options.text))}"]


def split_texts(text: str) -> list[str]:
    """ "red apple|dog face" -> both, without blanks around them."""
    return [part.strip() for part in text.split("|")]


def load(options: argparse.Namespace, overrides: Sequence[str]) -> tuple[GenerativeModule, str]:
    """The module to sample from, in eval mode, and the file it came from.

    Sizes and sampler settings are those that a checkpoint was trained with; of an official file, the recipe's.
    Overrides come on top.
    """
    if bool(options.ckpt) == bool(options.official):
        raise ValueError("say which weights: CKPT=last, CKPT=path or OFFICIAL=path (one of them)")
    recipe, changes = load_config(options.exp)["model"], model_overrides(overrides)
    if options.official:
        module = instantiate(merge(recipe, changes), "model")
        module.load_official(options.official, key=options.ema)
        return module.eval(), options.official
    path = recipes.find_checkpoint(options.exp, options.ckpt)
    arguments, state = read_checkpoint(path, options.ema or "ema")
    cls, arguments = find_class(recipe["class_path"], "model"), merge(arguments, changes.get("init_args", {}))
    check_arguments(cls, arguments, "model")
    # a checkpoint comes from anywhere: it names no class but a tokenizer's
    return cls.made_for(arguments, state, origin=str(path)).eval(), str(path)


def parse_labels(text: str | None, num_classes: int, count: int) -> Tensor:
    """ "0,1,2" -> int64 (count,), going round. Raises ValueError for what is no class."""
    if count < 1:
        raise ValueError(f"NUM is {count}: give the number of images to draw")
    try:
        chosen = [int(part) for part in text.split(",")] if text else list(range(num_classes))
    except ValueError:
        raise ValueError(f"LABELS is '{text}': give class numbers such as 0,1,2") from None
    if bad := [label for label in chosen if not 0 <= label < num_classes]:
        raise ValueError(f"label {bad[0]} is out of range: this model has classes 0..{num_classes - 1} (LABELS=)")
    return labels_in_turn(chosen, count)


class Edit(NamedTuple):
    """An image uint8 (3, H, W), and mask bool (H, W) of what is to be drawn anew."""

    image: Tensor
    mask: Tensor


def check_opaque(path: str) -> None:
    """Raise ValueError for a mask with transparency: laid on white, as pictures are, all of it would be drawn anew."""
    try:
        with Image.open(path, formats=FORMATS) as mask:
            transparent = "A" in mask.getbands() or "transparency" in mask.info
    except Exception:  # no file, or no image: `decode`, which comes next, says so
        return
    if transparent:
        raise ValueError(f"'{path}' has transparency: give a mask of black (keep) and white (draw anew) (MASK=)")


def read_edit(options: argparse.Namespace) -> Edit | None:
    """The image and mask of the line, None without. Raises ValueError for all that is wrong without knowing a model's
    weights: one without the other, a method that cannot edit, no image, unlike sizes, nothing to draw."""
    if not options.image and not options.mask:
        return None
    if not (options.image and options.mask):
        given, other = ("image", "mask") if options.image else ("mask", "image")
        raise ValueError(f"--{given} was given without --{other}: editing needs both IMAGE= and MASK=")
    cls = find_class(load_config(options.exp)["model"]["class_path"], "model")
    if not hasattr(cls, "edit"):
        raise ValueError(f"{cls.__name__} cannot edit (MASK=): it has no tokens that could stay; MAR's recipes can")
    check_opaque(options.mask)
    image, mask = (np.array(decode(path, f"'{path}'")) for path in (options.image, options.mask))
    if image.shape != mask.shape:
        sizes = [f"'{path}' is {a.shape[1]}x{a.shape[0]}" for path, a in ((options.image, image), (options.mask, mask))]
        raise ValueError(f"image and mask differ in size: {' and '.join(sizes)}; give both the model's size")
    white = mask.mean(-1) > 127.5
    if not white.any():
        raise ValueError(f"the mask '{options.mask}' has nothing white: make white what is to be drawn anew")
    return Edit(torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(white))


def draw(
    module: GenerativeModule,
    labels: Tensor,
    *,
    seed: int,
    batch_size: int,
    compile: bool = False,
    edit: Edit | None = None,
) -> Tensor:
    """uint8 images (N, 3, H, W) for labels (N,), on the host; bf16 on CUDA, float32 elsewhere."""
    cuda = module.device.type == "cuda"
    if cuda:
        module.prepare_sampling(compile=compile)
    batches = []
    for indices in track(torch.arange(len(labels)).split(batch_size), description="sampling"):
        generators = row_generators(seed, indices.tolist(), device=module.device)
        with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
            if edit is None:
                images = module.sample(labels[indices], generator=generators)
            else:
                same = edit.image.expand(len(indices), -1, -1, -1)
                images = module.edit(same, edit.mask, labels[indices], generator=generators)
            batches.append(to_uint8(images).cpu())
    return torch.cat(batches)


def write(images: Tensor, labels: Tensor, settings: dict[str, Any], out: Path) -> None:
    """Grid, single PNGs, arrays and settings into a folder, which is made."""
    out.mkdir(parents=True, exist_ok=True)
    asked = len(labels.unique())
    columns = asked if 1 < asked <= 16 else min(10, len(images))  # asked for in turn: a column each
    save_png(enlarge(make_grid(images, columns=columns), size=images.shape[-1]), out / "grid.png")
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        save_png(image, out / f"{i:06d}_label{label}.png")
    np.savez(out / "samples.npz", arr_0=images.permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
    (out / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")


@one_line_errors
def main() -> None:
    options, overrides = parse()
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"OUT is '{options.out}', which is a file: give a folder")
    if options.batch_size < 1:
        raise ValueError(f"--batch_size is {options.batch_size}: give the images to draw at once")
    if hasattr(find_class(load_config(options.exp)["model"]["class_path"], "model"), "reconstruct"):
        if options.image or options.mask:
            raise ValueError(f"{options.exp} gives images back and edits none: leave out IMAGE= and MASK=")
        data, overrides = split_overrides(overrides)
        module, source = load(options, overrides)
        reconstruct(module, options, data, source)
        return
    edit = read_edit(options)
    module, source = load(options, [*overrides, *text_overrides(options)])
    labels = parse_labels(options.labels, module.num_classes, options.num)
    if options.compile and options.device == "cpu":
        raise ValueError("--compile makes CUDA graphs, and the device is the cpu: leave it out")
    module = module.to(options.device)
    images = draw(module, labels, seed=options.seed, batch_size=options.batch_size, compile=options.compile, edit=edit)
    settings = {
        "experiment": options.exp,
        "weights": source,
        "ema": options.ema or "first",
        "seed": options.seed,
        **({"image": options.image, "mask": options.mask} if edit else {}),
        "sampling": asdict(module.sampling),
    }
    write(images, labels, settings, options.out)
    print(f"{len(images)} images in {shown(options.out)}: grid.png, single PNGs, samples.npz, settings.json")


if __name__ == "__main__":
    main()

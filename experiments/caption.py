"""Say what images show: `python -m experiments.caption --exp jetformer_openmoji --ckpt last --image apple.png`.

Prints a caption for the image, or for each of a folder. With `--text "red apple|dog face"` it is asked instead which of
these texts is likeliest, and how likely beside the others: zero-shot classification. Images are cropped to squares of
the model's size, as in training. `make caption` calls this.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from datamodules.decode import SUFFIXES, decode
from datamodules.transforms import center_crop, to_uint8_chw
from experiments.errors import one_line_errors
from experiments.load import find_class, load_config
from experiments.sample import add_source, load, split_texts
from layers.random import row_generators
from lightning_modules.image_text import ImageText


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the rest: overrides of the model."""
    parser = argparse.ArgumentParser(prog="caption", description=__doc__, allow_abbrev=False)
    add_source(parser)
    parser.add_argument("--image", type=Path, required=True, help="an image, or a folder of images")
    parser.add_argument("--text", help="texts to choose from: 'red apple|dog face'")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest word")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_known_args(argv)


def find_images(path: Path) -> list[Path]:
    """The file, or all images of a folder by name. Raises FileNotFoundError if there are none."""
    if path.is_file():
        return [path]
    found = sorted(p for p in path.glob("*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise FileNotFoundError(f"no image at '{path}' (IMAGE=): give a file, or a folder of images")
    return found


def read_images(paths: Sequence[Path], size: int) -> Tensor:
    """uint8 (N, 3, size, size), cropped. Raises ValueError, naming the file, for one that is unreadable."""
    return torch.stack([to_uint8_chw(center_crop(decode(str(path), f"'{path}'"), size)) for path in paths])


def ranked(log_probs: Tensor, texts: Sequence[str]) -> str:
    """Texts by how likely they are beside each other, from log-probabilities (K,)."""
    shares = log_probs.softmax(0)
    return ", ".join(f"{texts[k]} {shares[k]:.3f}" for k in shares.argsort(descending=True).tolist())


def printable(text: str) -> str:
    """In one line, whatever an untrained model writes."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def describe(module: ImageText, images: Tensor, options: argparse.Namespace, start: int) -> list[str]:
    """A line for each image uint8 (B, 3, H, W), of which the first has this number: noise goes by it."""
    generator = row_generators(options.seed, range(start, start + len(images)), device=module.device)
    if options.text is None:
        return [
            printable(text) for text in module.caption(images, temperature=options.temperature, generator=generator)
        ]
    texts = split_texts(options.text)
    return [ranked(row, texts) for row in module.text_log_probs(images, texts, generator)]


@one_line_errors
def main() -> None:
    options, overrides = parse()
    cls = find_class(load_config(options.exp)["model"]["class_path"], "model")
    if not issubclass(cls, ImageText):
        raise ValueError(f"{cls.__name__} has no captions: it learns images alone; JetFormer's recipes of captions can")
    if options.batch_size < 1:
        raise ValueError(f"--batch_size is {options.batch_size}: give the images to look at at once")
    paths = find_images(options.image)
    module, _ = load(options, overrides)
    module = module.to(options.device)
    for start in range(0, len(paths), options.batch_size):
        part = paths[start : start + options.batch_size]
        lines = describe(module, read_images(part, module.tokenizer.image_size), options, start)
        for path, line in zip(part, lines, strict=True):
            print(f"{path.name}: {line}")


if __name__ == "__main__":
    main()

"""The latent_scale of a trained tokenizer: `python -m experiments.measure_latents --exp vae_digits --ckpt last`.

Prints mean and standard deviation of the latents of training images and what to paste into a recipe, and stores them
beside the weights. Training ends with the same figures; this is for another average, other data, or a file of others
(OFFICIAL=kl16.ckpt). Overrides: --data.* and --model.*. `make latents` calls this.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.errors import one_line_errors
from experiments.load import ready_data, split_overrides
from experiments.sample import add_source, load
from lightning_modules.callbacks.latents import write_stats


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and overrides."""
    parser = argparse.ArgumentParser(prog="measure_latents", description=__doc__, allow_abbrev=False)
    add_source(parser)
    parser.add_argument("--num", type=int, default=10_000, help="training images, evenly spread")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_known_args(argv)


@one_line_errors
def main() -> None:
    options, overrides = parse()
    if options.num < 1:
        raise ValueError(f"NUM is {options.num}: latents of at least one image have to be measured")
    data, overrides = split_overrides(overrides)
    module, source = load(options, overrides)
    if not hasattr(module, "measure_latents"):
        raise ValueError(f"{options.exp} trains no tokenizer: give a recipe of an autoencoder, such as EXP=vae")
    datamodule = ready_data(options.exp, data)
    measured = module.to(options.device).measure_latents(datamodule, options.num, seed=options.seed)
    write_stats(measured, Path(source), options.ema or "first average")


if __name__ == "__main__":
    main()

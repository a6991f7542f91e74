"""Write weights for others: `python -m experiments.export --exp jit_digits --ckpt last --out digits.pth`.

`.pth`: the layout of the official trainer, raw weights and every average, for the official code to load.
`.safetensors`: one set of weights (the first average, or --ema) under official names. `make export` calls this.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from experiments import recipes
from experiments.errors import one_line_errors
from experiments.sample import add_source, load
from lightning_modules.base import GenerativeModule
from lightning_modules.paths import shown
from lightning_modules.weights import checkpoint_weights, ema_state, read_torch


def official_sets(module: GenerativeModule, path: Path) -> dict[str, dict[str, Tensor]]:
    """{official key: weights under official names} for the raw weights and each average, in the order of the decays.

    Raises ValueError if the checkpoint keeps more averages than the official layout has places for.
    """
    checkpoint = read_torch(path)
    ema = ema_state(checkpoint)
    names = ["raw", *(str(decay) for decay in (ema["decays"] if ema else []))]
    keys = module.OFFICIAL_KEYS
    if len(names) > len(keys):
        raise ValueError(
            f"{path} keeps {len(names) - 1} averages, the official layout has {len(keys) - 1}: use .safetensors"
        )
    return {
        key: module.official_state_dict(checkpoint_weights(checkpoint, name))
        for key, name in zip(keys, names, strict=False)
    }


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(prog="export", description=__doc__, allow_abbrev=False)
    add_source(parser)
    parser.add_argument("--out", type=Path, required=True)
    options, overrides = parser.parse_known_args()
    if options.out.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"OUT is '{options.out}': give a file name that ends in .pth or .safetensors")
    module, source = load(options, overrides)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.out.suffix == ".safetensors":
        state = {name: tensor.contiguous() for name, tensor in module.official_state_dict().items()}
        save_file(state, options.out, metadata={"experiment": options.exp, "weights": options.ema or "first average"})
    else:
        if options.official:
            raise ValueError(f"{source} is in the official layout already: OUT=x.safetensors converts one set of it")
        torch.save(official_sets(module, recipes.find_checkpoint(options.exp, options.ckpt)), options.out)
    print(f"wrote {shown(options.out)}")


if __name__ == "__main__":
    main()

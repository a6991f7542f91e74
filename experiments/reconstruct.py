"""What `make sample` writes of an autoencoder: `--num` images of the validation set, and what comes back of them.

`grid.png` (images left, reconstructions right), one PNG per pair, `samples.npz` (`arr_0`: what came back, and
`originals`, uint8 (N, H, W, 3)) and `settings.json`. Of a model of label maps: images beside their maps, and the maps
that it predicts, all in colours.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.load import ready_data
from lightning_modules.base import GenerativeModule, to_uint8
from lightning_modules.callbacks.samples import shown_of, side_by_side
from lightning_modules.paths import shown
from lightning_modules.pictures import enlarge, make_grid, save_png

COLUMNS = 8


def reconstruct(module: GenerativeModule, options: argparse.Namespace, data: Sequence[str], source: str) -> None:
    """The whole of it, for the options of experiments/sample.py and overrides `data` of the recipe's data.

    Raises ValueError for options that say nothing here.
    """
    if options.labels:
        raise ValueError(f"LABELS is '{options.labels}', but an autoencoder draws nothing: it takes images of its data")
    if options.compile:
        raise ValueError("--compile is for samplers: leave it out")
    if options.num < 1:
        raise ValueError(f"NUM is {options.num}: give the number of images to show")
    datamodule = ready_data(options.exp, data)
    module.to(options.device)
    originals = module.originals(datamodule, options.num)
    images = torch.cat([to_uint8(module.reconstruct(part)) for part in originals.split(options.batch_size)]).cpu()
    settings = {"experiment": options.exp, "weights": source, "ema": options.ema or "first", "data": list(data)}
    before, figure = shown_of(module, originals).cpu(), ""
    if before.shape == images.shape:
        settings["psnr"] = decibels(before, images)
        figure = f", mean PSNR {settings['psnr']:.2f} dB"
    write_pairs(before, images, settings, options.out)
    print(
        f"{len(images)} images and their reconstructions{figure}, in {shown(options.out)}: grid.png, pairs, "
        f"samples.npz, settings.json"
    )


def write_pairs(originals: Tensor, images: Tensor, settings: dict[str, Any], out: Path) -> None:
    """uint8 images (N, 3, H, W) and their reconstructions into a folder, which is made."""
    out.mkdir(parents=True, exist_ok=True)
    size = images.shape[-1]
    grids = [make_grid(part, columns=min(COLUMNS, len(images))) for part in (originals, images)]
    save_png(enlarge(side_by_side(grids), size=size), out / "grid.png")
    for i, (before, after) in enumerate(zip(originals, images, strict=True)):
        save_png(torch.cat([before, after], dim=-1), out / f"{i:06d}.png")
    arrays = {"arr_0": images, "originals": originals}
    np.savez(out / "samples.npz", **{name: part.permute(0, 2, 3, 1).numpy() for name, part in arrays.items()})
    (out / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")


def decibels(originals: Tensor, images: Tensor) -> float:
    """Mean peak signal-to-noise ratio of uint8 images (N, 3, H, W)."""
    error = (originals.double() - images.double()).square().flatten(1).mean(1)
    return float((10 * torch.log10(255**2 / error.clamp_min(1e-6))).mean())

"""The scale of a trained tokenizer's latents, which every recipe that uses it has to state."""

import json
import math
from pathlib import Path
from typing import Any

import lightning as L

from lightning_modules.callbacks.checkpoint import latest_checkpoint
from lightning_modules.callbacks.ema import averages
from lightning_modules.paths import shown
from lightning_modules.sharding import gathered

FILE = "latent_stats.json"


class LatentStats(L.Callback):
    """At the end of training: mean and standard deviation of the latents of `num_images` training images, printed and
    stored beside the checkpoint. By the weights that a tokenizer reads from it: the first average. First process only.

    For modules with `measure_latents`; one whose tokens have no scale (ids) is left alone.
    """

    def __init__(self, num_images: int = 10_000) -> None:
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}: latents of at least one image have to be measured")
        self.num_images = num_images

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        latest = latest_checkpoint(trainer)
        if not latest or pl_module.tokenizer.vocab_size is not None:
            return
        latest.on_train_end(trainer, pl_module)  # what is measured lies beside the last checkpoint
        if not latest.newest:
            return
        ema = averages(trainer)
        with ema.weights(pl_module, ema.first), gathered(pl_module):
            if trainer.is_global_zero:
                measured = pl_module.measure_latents(trainer.datamodule, self.num_images)
                write_stats(measured, Path(latest.newest), ema.first)


def write_stats(measured: tuple[float, float, int], weights: Path, which: str) -> dict[str, Any]:
    """Prints what to paste into a recipe and stores it beside the file of the weights, `which` of them; returns it.

    `measured`: mean and standard deviation over so many latent values.

    Raises ValueError for latents that are all the same or not finite.
    """
    mean, std, count = measured
    if not 0 < std < math.inf:
        raise ValueError(f"the latents of {weights} have the standard deviation {std}: there is no scale")
    stats = {"weights": str(weights), "average": which, "mean": mean, "std": std, "count": count}
    stats["latent_scale"] = 1 / std
    (weights.parent / FILE).write_text(json.dumps(stats, indent=2) + "\n")
    print(
        f"latents by the weights {which}: mean {mean:.4f}, standard deviation {std:.4f} "
        f"({count:,} values); for a recipe's tokenizer:\n"
        f"  init_args: {{latent_scale: {stats['latent_scale']:.4g}, weights: {shown(weights)}}}\n"
        f"stored in {shown(weights.parent / FILE)}",
        flush=True,
    )
    return stats

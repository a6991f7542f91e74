"""Whether cached latents are those of a module's tokenizer: nothing else in a training run would notice."""

import json
from typing import Any

from torch import nn

from lightning_modules.config import tokenizer_config
from lightning_modules.weights import state_sha256


def check_cache(module: nn.Module, datamodule: Any) -> None:
    """Raises ValueError if `datamodule` reads latents (it has a `tokenizer_checksum`) of another tokenizer than
    `module.tokenizer`: of another class, with other weights, or for images of another size."""
    if not hasattr(datamodule, "tokenizer_checksum"):
        return
    tokenizer = module.tokenizer
    for what, cached, ours in (
        ("class", datamodule.tokenizer_class, tokenizer_config(tokenizer)["class_path"]),
        ("arch", datamodule.tokenizer_arch, as_stored(tokenizer_config(tokenizer)["init_args"].get("arch"))),
        ("image_size", datamodule.image_size, tokenizer.image_size),
        ("sha256 of the weights", datamodule.tokenizer_checksum, state_sha256(tokenizer.state_dict())),
    ):
        if cached != ours:
            raise ValueError(
                f"the latents in '{datamodule.root}' were made by a tokenizer with {what} {cached}, the model's has "
                f"{ours}: set the tokenizer that made them, or write others with make cache EXP=... and another "
                f"--data.init_args.root"
            )


def as_stored(value: Any) -> Any:
    """A plain value as a file of the cache gives it back: tuples are lists there."""
    return json.loads(json.dumps(value))

"""Settings that weights depend on and that no shape of theirs shows, kept in the checkpoint and compared on loading.

Where positions are computed, a network of 16 steps takes the weights of one of 8 without a word and draws nonsense.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

NAME = "trained_for"  # of the buffer that holds the facts, as bytes of JSON

Facts = dict[str, str | int]  # setting, as a recipe names it -> value


class TrainedFor(L.LightningModule):
    """Put before GenerativeModule. The module calls `keep_facts` once."""

    _facts: Facts

    def keep_facts(self, **facts: str | int) -> None:
        """State what the weights will be trained for; "__" in a name stands for a dot."""
        self._facts = {name.replace("__", "."): value for name, value in facts.items()}
        coded = list(json.dumps(self._facts).encode())
        self.register_buffer(NAME, torch.tensor(coded, dtype=torch.uint8))

    def check_facts(self, state: Mapping[str, Tensor], origin: str, *, but: Collection[str] = ()) -> None:
        """Raise ValueError for weights that were trained for anything else, `but` for these settings."""
        if NAME not in state:
            return  # the strict load says so
        theirs = _decoded(state[NAME], origin)
        for name, ours in self._facts.items():
            if name not in but and theirs.get(name) != ours:
                raise ValueError(
                    f"{origin} was trained with {name}={theirs.get(name)}, this model has {ours}: set it back"
                )

    def load_weights(self, state: Mapping[str, Tensor], *, origin: str) -> None:
        self.check_facts(state, origin)
        super().load_weights(state, origin=origin)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_facts(checkpoint["state_dict"], f"the checkpoint {self.trainer.ckpt_path} (CKPT=)")
        super().on_load_checkpoint(checkpoint)


def _decoded(coded: Tensor, origin: str) -> Facts:
    """The facts of a file, which may be a stranger's."""
    try:
        facts = json.loads(bytes(coded.tolist()))
    except (TypeError, ValueError):  # no bytes, or no JSON
        facts = None
    if not isinstance(facts, dict):
        raise ValueError(f"{origin} does not say what it was trained for: '{NAME}' in it is damaged")
    return facts

"""Weights from files for a GenerativeModule: our checkpoints, official checkpoints, and the official layout back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from layers.checkpoint import Rule, check_fit, to_official, to_ours
from layers.embed import LabelEmbedder, SplitLabelEmbedder
from layers.tokenizers.base import Tokenizer
from lightning_modules.config import made_of
from lightning_modules.flax_files import read_npz
from lightning_modules.tokenizer_weights import load_tokenizer_weights, with_frozen, without_frozen
from lightning_modules.weights import SMALL, read_checkpoint, read_official, read_own

# of one that is trained along; no official file of a method has it
TRAINED_TOKENIZER = Rule("tokenizer.*", "tokenizer.*")


class Pretrained(nn.Module):
    """Loading and exporting. A method states `official_rules` and `OFFICIAL_KEYS`; `init_classes` is the module's."""

    OFFICIAL_KEYS: ClassVar[tuple[str, ...]] = ("model", "model_ema")  # sets in an official file: raw first, then EMAs
    init_classes: Literal["keep", "new"]
    tokenizer: Tokenizer

    def official_rules(self) -> list[Rule]:
        """Official parameter names <-> ours."""
        raise NotImplementedError

    def unrolled(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """An official state in the form that `official_rules` names; flax files may hold all layers in one array."""
        return state

    @classmethod
    def load_from_checkpoint(cls, path: str | Path, *, weights: str = "ema", device: str = "cpu") -> Self:
        """A module from one of our checkpoints, in eval mode.

        `weights`: "ema" (first decay; raw weights where there is no EMA), "raw", or a decay such as "0.9999".
        Raises FileNotFoundError, or ValueError for a file that is damaged, of another method or without those weights.
        """
        arguments, state = read_checkpoint(path, weights)
        return cls.made_for(arguments, state, origin=str(path)).to(device).eval()

    @classmethod
    def made_for(cls, arguments: Mapping[str, Any], state: Mapping[str, Tensor], *, origin: str) -> Self:
        """A module of a checkpoint's arguments with its weights. Raises ValueError where the two do not go together.

        Arguments that ask for far more than the weights are found out on the meta device, where that costs no memory.
        """
        try:
            with torch.device("meta"):
                shapes = made_of(cls, arguments, cls.__name__)
        except ValueError as error:
            raise ValueError(f"{origin} is of another method, or cannot be used so: {error}") from error
        wanted = without_frozen(shapes.state_dict(), shapes.tokenizer)
        if _bytes(wanted) > _bytes(state) + SMALL:
            check_fit(state, wanted, origin=origin)
        module = made_of(cls, arguments, origin)
        module.load_weights(state, origin=origin)
        return module

    @classmethod
    def from_official(cls, experiment: str, path: str | Path, *, key: str | None = None, device: str = "cpu") -> Self:
        """The model of a recipe ("jit_b16") with the weights of an official file, in eval mode.

        `key` picks the weights in the file; by default its first EMA, which is what the papers evaluate.
        """
        from experiments.load import load_module  # the recipes are data of this package; only this line reads them here

        module = load_module(experiment)
        if not isinstance(module, cls):
            raise ValueError(f"experiment '{experiment}' is a {type(module).__name__}, not a {cls.__name__}")
        module.load_official(path, key=key)
        return module.to(device).eval()

    def load_official(self, path: str | Path, *, key: str | None = None) -> None:
        """Replace all weights by those of an official file; see `init_classes` for the class table.

        One of our own checkpoints serves too, so that a new run can start from it.
        """
        state = None if is_npz(path) else read_own(path, key)
        if state is None:
            state = self.ours_from_official(self._read_official(path, key))
        if self.init_classes == "new":
            state = self._with_new_classes(state)
        hint = "" if self.init_classes == "new" else " (for other classes set --model.init_args.init_classes=new)"
        self.load_weights(state, origin=f"{path}{hint}")

    def load_weights(self, state: Mapping[str, Tensor], *, origin: str) -> None:
        """Strict load; one ValueError names what does not fit. Nothing is changed if it fails.

        A frozen tokenizer's weights come from its own file.
        """
        load_tokenizer_weights(self.tokenizer)
        state = with_frozen(state, self.tokenizer)
        check_fit(state, self.state_dict(), origin=origin)
        self.load_state_dict(state)

    def official_state_dict(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """This module's weights (or `state`, of the same names) under official names and layouts."""
        state = self.state_dict() if state is None else state
        return to_official(without_frozen(state, self.tokenizer), self.official_rules())

    def ours_from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict from one under official names and layouts: the inverse of `official_state_dict`."""
        return to_ours(self.unrolled(state), self.official_rules())

    def _read_official(self, path: str | Path, key: str | None) -> dict[str, Tensor]:
        if not is_npz(path):
            return read_official(path, key, keys=self.OFFICIAL_KEYS)
        if key is not None:
            raise ValueError(f"{path} holds one set of weights, so '{key}' cannot be chosen in it: leave it out")
        return read_npz(path)

    def _with_new_classes(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fresh vectors for our classes; the file's 'no label' stays: guidance keeps its other branch."""
        for prefix, module in self.named_modules():
            if isinstance(module, LabelEmbedder):
                name, fresh = f"{prefix}.embedding_table.weight", module.embedding_table.weight.detach().cpu()
                if name in state and state[name].shape[1:] == fresh.shape[1:]:  # else the strict load reports it
                    state[name] = with_new_rows(module, fresh, state[name])
            elif isinstance(module, SplitLabelEmbedder):
                state[f"{prefix}.class_emb.weight"] = module.class_emb.weight.detach().cpu().clone()
        return state


def _bytes(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def is_npz(path: str | Path) -> bool:
    """Whether a file is one of numpy's, as big_vision writes them, by its name."""
    return Path(path).suffix == ".npz"


def with_new_rows(embedder: LabelEmbedder, fresh: Tensor, table: Tensor) -> Tensor:
    """A file's label table with the `fresh` one's classes: the special rows and the one without label are the file's.

    Raises ValueError where it cannot be told which those are: special rows are counted from the last, which is that
    without label.
    """
    if embedder.num_special and embedder.null_label is None:
        raise ValueError(
            "init_classes=new needs the file's row for 'no label', which a model with objective.label_drop_prob=0 has "
            "not: set it above 0"
        )
    kept = len(fresh) - embedder.num_classes
    return torch.cat([fresh[: embedder.num_classes], table[len(table) - kept :]])

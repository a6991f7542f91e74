"""Tokenizers with weights of their own: frozen ones stay in eval mode, and refuse to run before the weights are there.

Nothing here opens files: `lightning_modules/tokenizer_weights.py` reads the one that `weights` names.
"""

from collections.abc import Mapping
from typing import Self

from torch import Tensor, nn

from layers.checkpoint import check_fit
from layers.tokenizers.base import KEYS, Tokenizer


class LearnedTokenizer(Tokenizer):
    """A tokenizer around the network `vae`; `weights` names its file, `loaded` says whether that was read."""

    def __init__(self, vae: nn.Module, *, weights: str | None, frozen: bool) -> None:
        super().__init__()
        self.vae, self.weights, self.frozen, self.loaded = vae, weights, frozen, False
        self.requires_grad_(not frozen).train()

    def train(self, mode: bool = True) -> Self:
        """Frozen tokenizers stay in eval mode, whatever their owner does."""
        return super().train(mode and not self.frozen)

    def load_weights(self, state: Mapping[str, Tensor], *, origin: str) -> None:
        """The network's weights; `origin` names their file in errors.

        Raises ValueError that names what is missing, unknown or of another shape; nothing is changed then.
        """
        check_fit(state, self.vae.state_dict(), origin=origin)
        self.vae.load_state_dict(state)
        self.loaded = True

    def require_weights(self) -> None:
        """Raise ValueError rather than compute with random weights that nobody trains."""
        if self.frozen and not self.loaded:
            source = f"the file '{self.weights}' was not read" if self.weights else "it was given no file"
            raise ValueError(
                f"{type(self).__name__} is frozen and has no weights yet ({source}): set {KEYS}.weights and call "
                f"lightning_modules.tokenizer_weights.load_tokenizer_weights, or train it (frozen=false)"
            )

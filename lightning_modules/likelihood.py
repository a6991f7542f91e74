"""How good a density model is, by one definition for all methods that have a likelihood."""

from typing import Any

from torch import Tensor

from layers.likelihood import bits_per_dim
from layers.tokenizers.base import Tokens


def likelihood_terms(nats: Tensor, tokens: Tokens, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Figures to log, from -log p of each image's tokens, (B,) in nats.

    "nats_per_token" always. "bpd", bits per dimension, where the tokenizer's map from pixels has a density; a bound
    from above on those of the pixels, since noise fills their levels. "nats_above_entropy", per token, where the rows
    come from a known process (`true_nats` (B,), datamodules/synthetic.py): what the model wastes, and 0 at best.
    """
    seq_len, dims = tokens.x.shape[1], tokens.x[0].numel()
    terms = {"nats_per_token": nats.mean() / seq_len}
    if "true_nats" in batch:
        return terms | {"nats_above_entropy": (nats - batch["true_nats"]).mean() / seq_len}
    if tokens.logdet is not None:
        terms["bpd"] = bits_per_dim(-nats, tokens.logdet, dims).mean()
    return terms

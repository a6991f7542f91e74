"""The Transformer of RAR (Yu et al., arXiv 2411.00776; official `modeling/rar.py`): ids -> logits of the next ids.

A causal Transformer over cls, class, and the tokens in some order. Unusual: each input says by a second table where the
token lies that comes next; class and place in the sequence modulate every block anew at each place, by a third of the
weights. Parameter names are the official ones. In: ids (B, K), orders (B, L), labels (B,). Out: logits (B, K + 1, V).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers.attention import NormedAttention
from layers.checks import check_positive
from layers.kv_cache import KVCache
from layers.mlp import Mlp

NORM_EPS = 1e-6
INIT_STD = 0.02
PREFIX = 2  # cls and class come before the tokens
# rows of the official tables beyond one per token; the prefix takes two of them, nothing ever reads the others
MORE_POSITIONS, MORE_STEPS = 1024, 100
MODULATION_BYTES = 2**30  # that decoding computes at once, in float32

recomputed = partial(checkpoint, use_reentrant=False)


@dataclass
class RARConfig:
    """Sizes; the defaults are RAR-B. Official `configs/training/generator/rar.yaml`."""

    width: int = 768
    depth: int = 24
    num_heads: int = 16
    mlp_hidden: int = 3072
    attn_dropout: float = 0.1
    proj_dropout: float = 0.1  # after attention, and in both places of the MLP
    # what the backward pass computes again instead of keeping it: modulations with their norms, or whole blocks
    grad_checkpointing: Literal["none", "modulation", "blocks"] = "none"

    def __post_init__(self) -> None:
        check_positive("net", self, "width", "depth", "num_heads", "mlp_hidden")
        for name in ("attn_dropout", "proj_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"net.{name} is {getattr(self, name)}: it is the share that is dropped, 0 to below 1")
        if self.width % self.num_heads:
            raise ValueError(f"net.width {self.width} is not divisible by net.num_heads {self.num_heads}")


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, a vector for each place: all (B, L, E). In this form bf16 does not round 1 + scale."""
    return torch.addcmul(x + shift, x, scale)


def entered(norm: nn.Module, x: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The norm of x (B, L, E), modulated by a linear map of c (B, L, E)."""
    return modulated(norm(x), *F.linear(c, weight, bias).chunk(2, dim=-1))


def gated(x: Tensor, added: Tensor, c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x plus a share of `added`, all (B, L, E), by a linear map of c."""
    return torch.addcmul(x, F.linear(c, weight, bias), added)


class Modulated(nn.Module):
    """Something that `parts` vectors modulate, which a linear map makes of the condition; 0 at first (adaLN-zero)."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))

    def modulation(self, c: Tensor) -> Tensor:
        """(..., E) -> (..., parts E). c has passed the SiLU, once for all blocks."""
        return self.adaLN_modulation[1](c)


class RARBlock(Modulated):
    """Pre-norm causal attention and MLP, modulated and gated at every place. Its norms have weights, unlike DiT's."""

    def __init__(self, config: RARConfig) -> None:
        width, dropouts = config.width, {"attn_dropout": config.attn_dropout, "proj_dropout": config.proj_dropout}
        super().__init__(width, 6)
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = NormedAttention(width, config.num_heads, norm_eps=NORM_EPS, **dropouts)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, config.mlp_hidden, dropout=config.proj_dropout)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x and c (B, L, E) -> (B, L, E)."""
        return self.run(x, self.modulation(c))

    def run(self, x: Tensor, modulation: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """x (B, L, E), modulation (B, L, 6E) -> (B, L, E); with a cache, after the places that it holds."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attn.causal(modulated(self.norm1(x), shift1, scale1), cache, layer))
        return torch.addcmul(x, gate2, self.mlp(modulated(self.norm2(x), shift2, scale2)))

    def thrifty(self, x: Tensor, c: Tensor) -> Tensor:
        """`forward`, but the backward pass computes modulations and norms again instead of finding them."""
        linear, sizes = self.adaLN_modulation[1], [parts * x.shape[-1] for parts in (2, 1, 2, 1)]
        into1, gate1, into2, gate2 = zip(linear.weight.split(sizes), linear.bias.split(sizes), strict=True)
        x = recomputed(gated, x, self.attn.causal(recomputed(entered, self.norm1, x, c, *into1)), c, *gate1)
        return recomputed(gated, x, self.mlp(recomputed(entered, self.norm2, x, c, *into2)), c, *gate2)


class FinalNorm(Modulated):
    """The norm before the logits, without weights. Here the scale comes before the shift, in the blocks after it."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 2)
        self.norm_final = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x (B, L, E), modulation (B, L, 2E) -> (B, L, E)."""
        scale, shift = modulation.chunk(2, dim=-1)
        return modulated(self.norm_final(x), shift, scale)


class Modulations:
    """The modulations of rows with these labels (B,) at `length` places, which nothing else decides.

    Each class is computed once: rows without a class, half of them under guidance, share one. And many places are
    computed at once, so that decoding does not read a third of the weights for every token.
    """

    def __init__(
        self,
        layers: Sequence[Modulated],
        condition: Callable[[Tensor, int], Tensor],
        labels: Tensor,
        *,
        length: int,
    ) -> None:
        self.layers, self.condition, self.length = layers, condition, length
        self.classes, self.rows = distinct(labels)
        numbers = len(self.classes) * sum(layer.adaLN_modulation[1].out_features for layer in layers)
        self.span = max(PREFIX, MODULATION_BYTES // (4 * numbers))  # places at once
        self.start, self.stop, self.tables = 0, 0, list[Tensor]()

    def at(self, place: int, count: int) -> list[Tensor]:
        """Those of each layer (B, count, parts E), at `count` places from `place` on."""
        if not self.start <= place <= place + count <= self.stop:
            self._compute(place)
        places = slice(place - self.start, place - self.start + count)
        return [table[:, places].index_select(0, self.rows) for table in self.tables]

    def _compute(self, start: int) -> None:
        self.start, self.stop = start, min(start + self.span, self.length)
        c = F.silu(self.condition(self.classes, self.stop)[:, start:])
        self.tables = [layer.modulation(c) for layer in self.layers]  # (U, span, parts E) each


def distinct(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labels that occur (U,), and which of them each row has (B,). It waits for the device, once per batch."""
    if labels.is_meta:  # where costs are counted, nobody knows which are equal
        return labels, torch.arange(len(labels), device=labels.device)
    return labels.unique(return_inverse=True)


@dataclass
class RARCache:
    """What decoding keeps: keys and values so far; what each place adds, (L + 1, E), and how it modulates."""

    own: KVCache
    positions: Tensor
    modulations: Modulations


class RAR(nn.Module):
    """Ids (B, K) in the order of generation -> logits (B, K + 1, V). Rows of `embeddings`: the V ids, an unused one for
    the official mask token, the classes, and last "no class", which is label `num_classes`."""

    def __init__(self, config: RARConfig, *, seq_len: int, vocab_size: int, num_classes: int) -> None:
        super().__init__()
        self.config, self.seq_len, self.vocab_size = config, seq_len, vocab_size
        self.first_class, width = vocab_size + 1, config.width
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.embeddings = nn.Embedding(self.first_class + num_classes + 1, width)
        self.pos_embed = nn.Parameter(torch.empty(1, seq_len + MORE_POSITIONS, width))
        self.target_aware_pos_embed = nn.Parameter(torch.empty(1, seq_len + MORE_POSITIONS, width))
        self.timesteps_embeddings = nn.Parameter(torch.empty(1, seq_len + MORE_STEPS, width))
        self.blocks = nn.ModuleList(RARBlock(config) for _ in range(config.depth))
        self.adaln_before_head = FinalNorm(width)
        self.lm_head = nn.Linear(width, vocab_size)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Tables and linear maps N(0, 0.02), biases, cls and modulations 0, so that a block is the identity at first.

        The official normal distribution is cut at +-2, which is a hundred sigmas.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for table in (self.pos_embed, self.target_aware_pos_embed, self.timesteps_embeddings):
            nn.init.normal_(table, std=INIT_STD)
        nn.init.zeros_(self.cls_token)
        for layer in (*self.blocks, self.adaln_before_head):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)

    def forward(self, ids: Tensor, orders: Tensor, labels: Tensor) -> Tensor:
        """Logits of the first K + 1 tokens of each order, from the ids (B, K) of K tokens.

        orders (B, K + 1 or more): raster places in the order of generation. labels (B,): 0..num_classes.
        """
        x = self.embed(ids, orders, labels)
        c = F.silu(self.condition(labels, x.shape[1]))
        for block in self.blocks:
            x = self._run(block, x, c)
        x, c = x[:, 1:], c[:, 1:]  # cls predicts nothing
        return self.lm_head(self.adaln_before_head(x, self.adaln_before_head.modulation(c)))

    def _run(self, block: RARBlock, x: Tensor, c: Tensor) -> Tensor:
        mode = self.config.grad_checkpointing if self.training else "none"
        if mode == "blocks":
            return recomputed(block, x, c)
        return block.thrifty(x, c) if mode == "modulation" else block(x, c)

    def embed(self, ids: Tensor, orders: Tensor, labels: Tensor) -> Tensor:
        """The first block's input: cls, class, K tokens, (B, K + 2, E). All but cls say where the next token lies."""
        count = ids.shape[1]
        tokens = self.embeddings(torch.cat([labels[:, None] + self.first_class, ids], dim=1))  # (B, K + 1, E)
        own = F.pad(orders[:, :count] + PREFIX, (1, 0), value=1)  # row 1 is the class's place, (B, K + 1)
        target = orders[:, : count + 1] + PREFIX
        tokens = tokens + F.embedding(own, self.pos_embed[0]) + F.embedding(target, self.target_aware_pos_embed[0])
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(ids), -1, -1)
        return torch.cat([cls, tokens], dim=1)

    def condition(self, labels: Tensor, length: int) -> Tensor:
        """Class plus place in the sequence, whichever token is there: (B,) -> (B, length, E), before the SiLU."""
        return self.embeddings(labels + self.first_class)[:, None] + self.timesteps_embeddings[:, :length]

    # Decoding, one token at a time, all rows in the same order

    def init_cache(self, labels: Tensor, scan: Tensor, *, dtype: torch.dtype) -> RARCache:
        """An empty cache for rows with these labels (B,), whose tokens come in the order `scan` (L,)."""
        length, heads = self.seq_len + 1, self.config.num_heads  # the last token is never an input
        sizes = {"num_heads": heads, "head_dim": self.config.width // heads, "length": length}
        own = KVCache(self.config.depth, len(labels), **sizes, dtype=dtype, device=labels.device)
        layers = [*self.blocks, self.adaln_before_head]
        return RARCache(own, self.positions(scan), Modulations(layers, self.condition, labels, length=length))

    def positions(self, scan: Tensor) -> Tensor:
        """What both tables add at each place of the sequence: scan (L,) -> (L + 1, E)."""
        own, target = self.pos_embed[0], self.target_aware_pos_embed[0, PREFIX:]
        tokens = own[PREFIX:][scan[:-1]] + target[scan[1:]]
        return torch.cat([own[:1], own[1:PREFIX] + target[scan[:1]], tokens])

    def prefill(self, labels: Tensor, cache: RARCache) -> Tensor:
        """Logits (B, V) of the first token; labels as those of the cache."""
        first = self.embeddings(labels + self.first_class)[:, None]
        return self._decode(torch.cat([self.cls_token.expand(len(labels), -1, -1), first], dim=1), 0, cache)

    def step(self, ids: Tensor, index: int, cache: RARCache) -> Tensor:
        """Logits (B, V) of token index + 1, from ids (B,), the tokens with number `index`."""
        return self._decode(self.embeddings(ids)[:, None], index + PREFIX, cache)

    def _decode(self, x: Tensor, place: int, cache: RARCache) -> Tensor:
        count = x.shape[1]
        *modulations, last = cache.modulations.at(place, count)
        x, cache.own.filled = x + cache.positions[place : place + count], place
        for layer, (block, modulation) in enumerate(zip(self.blocks, modulations, strict=True)):
            x = block.run(x, modulation, cache.own, layer)
        cache.own.advance(count)
        return self.lm_head(self.adaln_before_head(x[:, -1:], last[:, -1:]))[:, 0]

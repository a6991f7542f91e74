"""The trunk of GIVT (Tschannen et al., arXiv 2312.02116; official `givt.py`): continuous tokens -> one vector each.

A pre-norm Transformer on linearly projected tokens after one label token: causal with a KV cache, or bidirectional with
masked tokens; for UViM every block also attends to a memory. Unusual: neither attention nor the norms inside a block
have biases, and the label table also holds the rows that stand for masked tokens. In: tokens (B, L, D), labels (B,).
Out: h (B, L, E); the head makes distributions of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers.attention import PlainAttention
from layers.checkpoint import Rule
from layers.checks import check_positive
from layers.embed import LabelEmbedder
from layers.flax_layout import (
    State,
    cross_attention_rules,
    linear_rules,
    norm_rules,
    self_attention_rules,
    unstack,
)
from layers.init import lecun_normal_
from layers.kv_cache import KVCache
from layers.mlp import TanhMlp

NORM_EPS = 1e-6
# rows of the label table between the classes and "no label", in the official order
SPECIAL_ROWS = {"concat": ("mask", "nomask", "replace"), "replace": ("mask",)}

KeysValues = tuple[Tensor, Tensor]  # (B, N, M, d) each


@dataclass
class GIVTConfig:
    """Sizes of the trunk; the defaults are those of the 304 M parameter model. Official `givt_imagenet2012.py`."""

    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_hidden: int = 4096
    dropout: float = 0.2  # on attention weights, after attention, and inside the MLP
    attention: Literal["causal", "bidirectional"] = "causal"  # GIVT-Causal, GIVT-MaskGIT
    mask_style: Literal["concat", "replace"] = "concat"  # bidirectional: how a token says that it is masked
    grad_checkpointing: bool = False  # recompute blocks in the backward pass

    def __post_init__(self) -> None:
        check_positive("net", self, "width", "depth", "num_heads", "mlp_hidden")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"net.dropout is {self.dropout}: it is the share of what is dropped, so use 0 to below 1")
        if self.width % self.num_heads:
            raise ValueError(f"net.width {self.width} is not divisible by net.num_heads {self.num_heads}")
        if self.mask_style == "concat" and self.width % 2:
            raise ValueError(f"net.width is {self.width}: net.mask_style=concat gives each of two parts half, use even")

    @property
    def causal(self) -> bool:
        return self.attention == "causal"

    @property
    def special_rows(self) -> tuple[str, ...]:
        """Names of the label table's rows for masked tokens."""
        return () if self.causal else SPECIAL_ROWS[self.mask_style]


class SelfAttention(PlainAttention):
    """PlainAttention without biases."""

    def __init__(self, width: int, num_heads: int, *, dropout: float) -> None:
        super().__init__(width, num_heads, attn_dropout=dropout, proj_dropout=dropout)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)


class CrossAttention(nn.Module):
    """Attention to a memory, without biases. Its keys and values are made apart, once for a whole decode."""

    def __init__(self, width: int, num_heads: int, *, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.attn_dropout = num_heads, dropout
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.proj_dropout = nn.Dropout(dropout)

    def keys_values(self, memory: Tensor) -> KeysValues:
        """(B, M, E) -> (B, N, M, d) twice."""
        keys, values = rearrange(self.kv(memory), "b m (two n d) -> two b n m d", two=2, n=self.num_heads)
        return keys, values

    def forward(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        """(B, L, E) -> (B, L, E)."""
        q = rearrange(self.q(x), "b l (n d) -> b n l d", n=self.num_heads)
        dropout = self.attn_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, *keys_values, dropout_p=dropout)
        return self.proj_dropout(self.proj(rearrange(out, "b n l d -> b l (n d)")))


class GIVTCache:
    """What decoding keeps: keys and values of the sequence so far, and those of the memory, which stay as they are."""

    def __init__(self, own: KVCache) -> None:
        self.own, self.memory = own, list[KeysValues]()

    def reorder(self, index: Tensor) -> None:
        """Row r becomes what row index[r] was, index (B,); rows may only change places among those of one memory."""
        self.own.store = self.own.store[:, :, index]

    def rewind(self, place: int) -> None:
        """The next token is written at `place`."""
        self.own.filled = place


class GIVTBlock(nn.Module):
    """Pre-norm self-attention, with `cross` attention to a memory, MLP. Official `EncoderDecoderBlock`."""

    def __init__(self, config: GIVTConfig, *, cross: bool) -> None:
        super().__init__()
        self.causal = config.causal
        sizes = {"width": config.width, "num_heads": config.num_heads, "dropout": config.dropout}
        self.norm1 = nn.LayerNorm(config.width, eps=NORM_EPS, bias=False)
        self.attn = SelfAttention(**sizes)
        if cross:
            self.norm2 = nn.LayerNorm(config.width, eps=NORM_EPS, bias=False)
            self.cross = CrossAttention(**sizes)
        self.norm3 = nn.LayerNorm(config.width, eps=NORM_EPS, bias=False)
        self.mlp = TanhMlp(config.width, config.mlp_hidden, dropout=config.dropout)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """(B, L, E) -> (B, L, E), memory (B, M, E)."""
        normed = self.norm1(x)
        x = x + (self.attn.causal(normed) if self.causal else self.attn(normed))
        return self._rest(x, None if memory is None else self.cross.keys_values(memory))

    def decode(self, x: Tensor, cache: GIVTCache, layer: int) -> Tensor:
        """The positions that follow what the cache holds: (B, L, E) -> (B, L, E)."""
        x = x + self.attn.causal(self.norm1(x), cache.own, layer)
        return self._rest(x, cache.memory[layer] if cache.memory else None)

    def _rest(self, x: Tensor, keys_values: KeysValues | None) -> Tensor:
        if keys_values is not None:
            x = x + self.cross(self.norm2(x), keys_values)
        return x + self.mlp(self.norm3(x))


class GIVT(nn.Module):
    """Tokens (B, L, D) -> h (B, L, E). Rows of the label table: classes, special rows, and last, with `null_label`, the
    one for "no label", whose index is then the attribute `null_label` (else None). Where nothing is conditioned on a
    class, num_classes is 1 and its row begins the sequence."""

    def __init__(
        self,
        config: GIVTConfig,
        *,
        seq_len: int,
        token_dim: int,
        num_classes: int,
        null_label: bool = True,
        cross: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.seq_len, self.num_classes = config, seq_len, num_classes
        special = len(config.special_rows)
        self.label_embed = LabelEmbedder(num_classes, config.width, num_special=special, null=null_label)
        self.null_label = self.label_embed.null_label
        self.token_embed = nn.Linear(token_dim, config.width)
        places = seq_len if config.causal else seq_len + 1  # causal: the last token is no input
        self.pos_embed = nn.Parameter(torch.empty(1, places, config.width))
        self.blocks = nn.ModuleList(GIVTBlock(config, cross=cross) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Flax's defaults, but MLPs Xavier uniform with biases N(0, 1e-6), positions N(0, 1/E). Official `givt.py`."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                lecun_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            for linear in (block.mlp.fc1, block.mlp.fc2):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.normal_(linear.bias, std=1e-6)
        nn.init.normal_(self.label_embed.embedding_table.weight)
        nn.init.normal_(self.pos_embed, std=self.config.width**-0.5)

    def forward(self, x: Tensor, labels: Tensor, mask: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        """h (B, L, E) of all tokens x (B, L, D), labels (B,), memory (B, M, E).

        Causal: h of a token depends on those before it. Bidirectional: on the tokens where mask (B, L) is False; the
        values of masked ones are not looked at.
        """
        h = self.embed(x, labels, mask)
        for block in self.blocks:
            h = self._run(block, h, memory)
        h = self.norm(h)
        return h if self.config.causal else h[:, 1:]

    def embed(self, x: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The input of the first block: label, then tokens (B, 1 + L, E); causal without the last one (B, L, E)."""
        label = self.label_embed(labels)[:, None]
        tokens = self.token_embed(x[:, :-1]) if self.config.causal else self._masked(x, mask)
        return torch.cat([label, tokens], dim=1) + self.pos_embed

    def _masked(self, x: Tensor, mask: Tensor) -> Tensor:
        """Tokens with rows of the table where masked. "concat": even channels of "is masked" and of the token."""
        rows, unknown = dict(zip(self.config.special_rows, self._special_rows(), strict=True)), mask[..., None]
        if self.config.mask_style == "replace":
            return torch.where(unknown, rows["mask"], self.token_embed(x))
        tokens = F.linear(x, self.token_embed.weight[::2], self.token_embed.bias[::2])  # (B, L, E/2)
        flag = torch.where(unknown, rows["mask"][::2], rows["nomask"][::2])
        return torch.cat([flag, torch.where(unknown, rows["replace"][::2], tokens)], dim=-1)

    def _special_rows(self) -> Tensor:
        table, first = self.label_embed.embedding_table.weight, self.num_classes
        return table[first : first + len(self.config.special_rows)]

    def _run(self, block: GIVTBlock, h: Tensor, memory: Tensor | None) -> Tensor:
        if self.config.grad_checkpointing and self.training:
            return checkpoint(block, h, memory, use_reentrant=False)
        return block(h, memory)

    # Causal decoding, one token at a time

    def init_cache(
        self, batch: int, *, dtype: torch.dtype, device: torch.device | str, length: int | None = None
    ) -> GIVTCache:
        """An empty cache for `batch` sequences of `length` tokens, the full length by default."""
        heads = self.config.num_heads
        sizes = {"num_heads": heads, "head_dim": self.config.width // heads, "length": length or self.seq_len}
        return GIVTCache(KVCache(self.config.depth, batch, **sizes, dtype=dtype, device=device))

    def prefill(self, labels: Tensor, cache: GIVTCache, memory: Tensor | None = None) -> Tensor:
        """h (B, E) of the first token, from labels (B,). The memory's keys and values are made here and stay."""
        if memory is not None:
            cache.memory = [block.cross.keys_values(memory) for block in self.blocks]
        return self._decode(self.label_embed(labels), 0, cache)

    def step(self, token: Tensor, index: int, cache: GIVTCache) -> Tensor:
        """h (B, E) of token index + 1, from `token` (B, D), the one with number `index`; h of token 0 is prefill's.

        The last token has no successor: asked for one, it is written over the place of the token before. The official
        loop takes this step, which ranks its beams.
        """
        return self._decode(self.token_embed(token), min(index + 1, self.seq_len - 1), cache)

    def _decode(self, h: Tensor, place: int, cache: GIVTCache) -> Tensor:
        h = (h + self.pos_embed[0, place])[:, None]  # (B, 1, E)
        cache.rewind(place)
        for layer, block in enumerate(self.blocks):
            h = block.decode(h, cache, layer)
        cache.own.advance(1)
        return self.norm(h)[:, 0]

    @torch.no_grad()
    def representations(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Features for probes, (B, E) each: "block{l}_rep", the mean of block l over places, and "pre_logits", that of
        the last norm. Official `Model.__call__` with return_reps."""
        h, features = self.embed(x, labels), {}
        for i, block in enumerate(self.blocks):
            h = block(h)
            features[f"block{i}_rep"] = h.mean(1)
        return features | {"pre_logits": self.norm(h).mean(1)}


# Official checkpoints


def trunk_rules(num_heads: int) -> list[Rule]:
    """Official names <-> those of a module whose `net` is a GIVT and whose `head` has the linear map `linear`."""
    official, ours = "decoder/EncDecBlock*", "net.blocks.*"
    return [
        Rule("EmbedLabels/embedding", "net.label_embed.embedding_table.weight"),
        *linear_rules("EmbedTargets", "net.token_embed"),
        Rule("decoder/pos_emb", "net.pos_embed"),
        *norm_rules(f"{official}/LayerNorm*", f"{ours}.norm*"),
        *self_attention_rules(f"{official}/SelfAttn", f"{ours}.attn", num_heads=num_heads),
        *cross_attention_rules(f"{official}/CrossAttn", f"{ours}.cross", num_heads=num_heads),
        *linear_rules(f"{official}/MLP/Dense_0", f"{ours}.mlp.fc1"),
        *linear_rules(f"{official}/MLP/Dense_1", f"{ours}.mlp.fc2"),
        *norm_rules("decoder/LayerNorm", "net.norm"),
        *linear_rules("decoder/LogitsDense", "head.linear"),
    ]


def unrolled(state: Mapping[str, Tensor]) -> State:
    """An official state with one set of names per block. Files of scanned models hold all blocks along axis 1."""
    return unstack(state, "decoder/EncDecBlock", "decoder/EncDecBlock{}", axis=1)

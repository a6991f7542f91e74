"""Gemma's Transformer block, version 1 (Gemma Team, arXiv 2403.08295; big_vision `ppp/gemma.py`), as JetFormer uses it.

Pre-norm attention and GeGLU, no biases. Unusual: query heads share heads of keys and values (multi-query attention,
Shazeer, arXiv 1911.02150), and the caller gives rotary table and mask, so that positions may differ between rows and
skip tokens. In and out: (B, L, E).
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from layers.checkpoint import Rule
from layers.init import lecun_normal_
from layers.kv_cache import KVCache
from layers.mlp import GeGLU
from layers.norm import OffsetRMSNorm
from layers.rope import rotate_halves


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(d)) v: q (B, N, L, d), k and v (B, K, S, d) -> (B, N, L, d). Head n has keys n // (N/K).

    mask (B or 1, 1, L, S), True where a query may look; without it place i sees 0..i, and a single query everything.
    """
    group = q.shape[1] // k.shape[1]
    if q.shape[2] == 1:  # query heads of one group are so many queries of one head: its keys are read once
        rows = q[:, :, 0].unflatten(1, (-1, group))  # (B, K, N/K, d)
        return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).flatten(1, 2).unsqueeze(2)
    assert mask is not None or q.shape[2] == k.shape[2], "several queries behind a cache need a mask"
    k, v = (repeat(t, "b k s d -> b (k g) s d", g=group) for t in (k, v))  # of one head a view, no copy
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


class MultiQueryAttention(nn.Module):
    """Self-attention with `num_heads` heads of queries and `num_kv_heads` of keys and values, and rotary positions.

    Rows of `qkv`: queries head by head, keys, values. Raises ValueError unless num_kv_heads divides num_heads.
    """

    def __init__(self, width: int, num_heads: int, *, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads {num_heads} is not divisible by num_kv_heads {num_kv_heads}")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.qkv = nn.Linear(width, (num_heads + 2 * num_kv_heads) * head_dim, bias=False)
        self.proj = nn.Linear(num_heads * head_dim, width, bias=False)

    def forward(
        self, x: Tensor, rope: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        """x (B, L, E), rope of `rotary_table` -> (B, L, E). With a cache: x stands behind what the layer stored there.

        mask: see `grouped_attention`; keys are cached after the rotation.
        """
        heads = rearrange(self.qkv(x), "b l (n d) -> b n l d", d=self.head_dim)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        q, k = rotate_halves(q, rope), rotate_halves(k, rope)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        return self.proj(rearrange(grouped_attention(q, k, v, mask), "b n l d -> b l (n d)"))


class GemmaBlock(nn.Module):
    """Norm, attention, norm, GeGLU; dropout on what each of the two adds, and nowhere else."""

    def __init__(
        self, width: int, num_heads: int, *, num_kv_heads: int, head_dim: int, mlp_hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.norm1 = OffsetRMSNorm(width)
        self.attn = MultiQueryAttention(width, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
        self.norm2 = OffsetRMSNorm(width)
        self.mlp = GeGLU(width, mlp_hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, rope: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        """(B, L, E) -> (B, L, E); see `MultiQueryAttention`."""
        x = x + self.dropout(self.attn(self.norm1(x), rope, mask, cache, layer))
        return x + self.dropout(self.mlp(self.norm2(x)))

    def init_weights(self) -> None:
        """Every linear map from a truncated normal distribution of variance 1 / fan-in."""
        for linear in (self.attn.qkv, self.attn.proj, self.mlp.w12, self.mlp.w3):
            lecun_normal_(linear.weight)


# Official checkpoints


def block_rules(official: str, ours: str, *, num_heads: int, num_kv_heads: int) -> list[Rule]:
    """A GemmaBlock called `ours` is the flax module `official`, apart from the others of its stack.

    Applying them raises ValueError for kernels of other numbers of heads, which once flattened nobody could tell.
    """
    return [
        Rule(f"{official}/pre_attention_norm/scale", f"{ours}.norm1.scale"),
        _qkv_rule(f"{official}/attn", f"{ours}.attn.qkv.weight", num_heads, num_kv_heads),
        Rule(
            f"{official}/attn/attn_vec_einsum/w",
            f"{ours}.attn.proj.weight",
            lambda w: w.flatten(0, 1).T.contiguous(),  # [N, d, E]
            lambda w: w.T.unflatten(0, (num_heads, -1)).contiguous(),
        ),
        Rule(f"{official}/pre_ffw_norm/scale", f"{ours}.norm2.scale"),
        Rule(f"{official}/mlp/gating_einsum", f"{ours}.mlp.w12.weight", _rows, lambda w: _kernels(w, 2)),
        Rule(f"{official}/mlp/linear", f"{ours}.mlp.w3.weight", lambda w: w.T.contiguous(), lambda w: w.T.contiguous()),
    ]


def _qkv_rule(official: str, ours: str, num_heads: int, num_kv_heads: int) -> Rule:
    """Two kernels, or one of all three where every query head has its own keys."""
    expected = (num_heads,), (2, num_kv_heads)
    names = f"{official}/q_einsum/w", f"{official}/kv_einsum/w"
    if num_heads == num_kv_heads:
        expected, names = ((3, num_heads),), (f"{official}/qkv_einsum/w",)

    def forth(*kernels: Tensor) -> Tensor:
        found = tuple(tuple(kernel.shape[:-2]) for kernel in kernels)
        if found != expected:
            raise ValueError(
                f"the checkpoint's attention has kernels of {found} heads, this model of {expected}: set "
                f"--model.init_args.net.num_heads and num_kv_heads"
            )
        return torch.cat([_rows(kernel) for kernel in kernels])

    def back(weight: Tensor) -> list[Tensor]:
        head_dim = len(weight) // (num_heads + 2 * num_kv_heads)
        parts = weight.split([math.prod(heads) * head_dim for heads in expected])
        return [_kernels(part, *heads) for part, heads in zip(parts, expected, strict=True)]

    return Rule(names, ours, forth, back)


def _rows(kernels: Tensor) -> Tensor:
    """Kernels [..., in, out] side by side -> weight (all their outs, in)."""
    return kernels.mT.flatten(0, -2)


def _kernels(weight: Tensor, *count: int) -> Tensor:
    """The inverse of `_rows`."""
    return weight.unflatten(0, (*count, -1)).mT.contiguous()

"""Multi-head self-attention on F.scaled_dot_product_attention."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from layers.kv_cache import KVCache
from layers.norm import RMSNorm
from layers.rope import apply_rope


class Attention(nn.Module):
    """Full self-attention with q/k RMSNorm over the head dim (one weight shared by all heads) and rotary positions.

    `attn_dropout` acts on the softmax weights, `proj_dropout` on the output. q and k are normalised and rotated in
    float32, then cast back, so that the fused kernels serve under bf16 autocast.
    Raises ValueError if `width` is no multiple of `num_heads`.
    """

    def __init__(self, width: int, num_heads: int, *, attn_dropout: float = 0.0, proj_dropout: float = 0.0) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.attn_dropout = attn_dropout
        self.q_norm = RMSNorm(width // num_heads)
        self.k_norm = RMSNorm(width // num_heads)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_dropout = nn.Dropout(proj_dropout)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """x (B, L, E), rope (2, L, E/N) -> (B, L, E)."""
        q, k, v = rearrange(self.qkv(x), "b l (three n d) -> three b n l d", three=3, n=self.num_heads)
        q, k = (apply_rope(norm(y), rope) for norm, y in ((self.q_norm, q), (self.k_norm, k)))  # (B, N, L, d)
        dropout = self.attn_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.proj_dropout(self.proj(rearrange(out, "b n l d -> b l (n d)")))


class PlainAttention(nn.Module):
    """Self-attention as in ViT (Dosovitskiy et al. 2020): no norm on q and k, no rotation; full or causal.

    Dropouts as in `Attention`. Raises ValueError if `width` is no multiple of `num_heads`.
    """

    def __init__(self, width: int, num_heads: int, *, attn_dropout: float = 0.0, proj_dropout: float = 0.0) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.attn_dropout = attn_dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_dropout = nn.Dropout(proj_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, E) -> (B, L, E), every position sees every other."""
        return self._attend(*self._normed(*self._heads(self.qkv(x), 3)))

    def query(self, x: Tensor, rows: Tensor) -> Tensor:
        """The output of `forward` for some rows only: x (B, L, E), rows (B, R, E) of it -> (B, R, E)."""
        width = self.proj.in_features
        weight, bias = self.qkv.weight, self.qkv.bias
        (q,) = self._heads(F.linear(rows, weight[:width], bias[:width]), 1)  # (B, N, R, d)
        k, v = self._heads(F.linear(x, weight[width:], bias[width:]), 2)  # (B, N, L, d)
        return self._attend(*self._normed(q, k, v))

    def causal(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """x (B, L, E) -> (B, L, E), a position sees itself and earlier ones; with a cache, also those stored in it."""
        q, k, v = self._normed(*self._heads(self.qkv(x), 3))
        if cache is None:
            return self._attend(q, k, v, is_causal=True)
        k, v = cache.extend(layer, k, v)
        if q.shape[2] == 1:
            return self._attend(q, k, v)  # the newest position sees everything
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - q.shape[2])
        return self._attend(q, k, v, attn_mask=mask)

    def _normed(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v

    def _heads(self, y: Tensor, parts: int) -> tuple[Tensor, ...]:
        return rearrange(y, "b l (p n d) -> p b n l d", p=parts, n=self.num_heads).unbind(0)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, attn_mask: Tensor | None = None
    ) -> Tensor:
        dropout = self.attn_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal)
        return self.proj_dropout(self.proj(rearrange(out, "b n l d -> b l (n d)")))


class NormedAttention(PlainAttention):
    """PlainAttention with LayerNorm over each head's queries and keys, one for all heads each (timm's `qk_norm`)."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        norm_eps: float = 1e-6,
        attn_dropout: float = 0.0,
        proj_dropout: float = 0.0,
    ) -> None:
        super().__init__(width, num_heads, attn_dropout=attn_dropout, proj_dropout=proj_dropout)
        self.q_norm = nn.LayerNorm(width // num_heads, eps=norm_eps)
        self.k_norm = nn.LayerNorm(width // num_heads, eps=norm_eps)

    def _normed(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_norm(q), self.k_norm(k), v

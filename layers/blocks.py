"""Transformer blocks."""

from torch import Tensor, nn

from layers.attention import Attention, PlainAttention
from layers.gather import take
from layers.kv_cache import KVCache
from layers.mlp import Mlp, SwiGLU
from layers.norm import RMSNorm, modulate


class AdaLNBlock(nn.Module):
    """Pre-norm attention and SwiGLU, each modulated and gated by the condition (DiT's adaLN, Peebles & Xie 2023).

    The six vectors come in the order shift, scale, gate of the attention, then of the MLP.
    """

    def __init__(
        self, width: int, num_heads: int, *, mlp_hidden: int, attn_dropout: float = 0.0, proj_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, num_heads, attn_dropout=attn_dropout, proj_dropout=proj_dropout)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, mlp_hidden, dropout=proj_dropout)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, rope: Tensor) -> Tensor:
        """x (B, L, E), condition c (B, E), rope (2, L, E/N) -> (B, L, E)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)  # (B, E) each
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class ViTBlock(nn.Module):
    """Pre-norm attention and MLP (ViT, Dosovitskiy et al. 2020), with timm's parameter names.

    Three forms of one function: full (`forward`), full but for some rows only (`rows`), and causal.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        attn_dropout: float = 0.0,
        proj_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = PlainAttention(width, num_heads, attn_dropout=attn_dropout, proj_dropout=proj_dropout)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, int(width * mlp_ratio), dropout=proj_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, E) -> (B, L, E)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def rows(self, x: Tensor, index: Tensor) -> Tensor:
        """Rows `index` (B, R) of `forward`'s output, at their cost: (B, L, E) -> (B, R, E)."""
        normed = self.norm1(x)
        x = take(x, index) + self.attn.query(normed, take(normed, index))  # (B, R, E)
        return x + self.mlp(self.norm2(x))

    def causal(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """(B, L, E) -> (B, L, E), no position sees a later one; see `PlainAttention.causal`."""
        x = x + self.attn.causal(self.norm1(x), cache, layer)
        return x + self.mlp(self.norm2(x))

"""Transformer blocks."""

from torch import Tensor, nn

from layers.attention import Attention
from layers.mlp import SwiGLU
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

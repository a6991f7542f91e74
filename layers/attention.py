"""Multi-head self-attention on F.scaled_dot_product_attention."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

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

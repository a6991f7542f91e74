"""Normalisation and modulation.

RMSNorm (Zhang & Sennrich 2019) with statistics and product in float32; adaptive shift and scale as in DiT
(Peebles & Xie 2023, section 3.2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis. float32 island: the weight multiplies before the cast back."""

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), same dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class OffsetRMSNorm(nn.Module):
    """x / rms(x) * (1 + scale) over the last axis, scale 0 at first: Gemma's (`ppp/gemma.py`). float32 island."""

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), same dtype."""
        return F.rms_norm(x.float(), self.scale.shape, 1 + self.scale.float(), self.eps).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, one vector per image: x (B, L, D), shift and scale (B, D) -> (B, L, D)."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))

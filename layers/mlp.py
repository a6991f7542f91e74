"""Feed-forward layers: the plain MLP of ViT, and the gated SwiGLU and GeGLU (Shazeer 2020)."""

import torch.nn.functional as F
from torch import Tensor, nn


def swiglu_hidden(width: int, mlp_ratio: float) -> int:
    """Hidden size that keeps the parameters of a plain MLP of `mlp_ratio`: two thirds of it, truncated."""
    return int(int(width * mlp_ratio) * 2 / 3)


class SwiGLU(nn.Module):
    """w3(silu(gate) * value) with (gate, value) = w12(x); dropout before w3. Biases everywhere."""

    def __init__(self, width: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., E)."""
        gate, value = self.w12(x).chunk(2, dim=-1)  # (..., hidden) twice
        return self.w3(self.dropout(F.silu(gate) * value))


class GeGLU(nn.Module):
    """w3(gelu(gate) * value) with (gate, value) = w12(x) and GELU's tanh approximation. No biases, no dropout.

    Gemma's, big_vision `ppp/gemma.py` FeedForward.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden, bias=False)
        self.w3 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., E)."""
        gate, value = self.w12(x).chunk(2, dim=-1)  # (..., hidden) twice
        return self.w3(F.gelu(gate, approximate="tanh") * value)


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))) with the exact GELU; dropout after the GELU and after fc2, as in timm."""

    def __init__(self, width: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., E)."""
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class TanhMlp(nn.Module):
    """fc2(dropout(gelu(fc1(x)))) with GELU's tanh approximation; none of the dropout after fc2. Official `MlpBlock`."""

    def __init__(self, width: int, hidden: int, *, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., E)."""
        return self.fc2(self.dropout(F.gelu(self.fc1(x), approximate="tanh")))

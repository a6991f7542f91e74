"""Embeddings of time, labels and grid positions, in DiT's form (Peebles & Xie 2023)."""

import math

import torch
from torch import Tensor, nn


def timestep_features(t: Tensor, dim: int, *, max_period: float = 10000.0) -> Tensor:
    """[cos(t w_k), sin(t w_k)] with w_k = max_period^(-k / (dim/2)). t (B,), used as it is -> (B, dim), float32."""
    half = dim // 2
    freqs = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(max_period) / half))
    angles = t.float()[:, None] * freqs  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """Time -> sinusoid -> Linear, SiLU, Linear. The sinusoid is a float32 island."""

    def __init__(self, width: int, *, num_features: int = 256) -> None:
        super().__init__()
        self.num_features = num_features
        self.mlp = nn.Sequential(nn.Linear(num_features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, E)."""
        return self.mlp(timestep_features(t, self.num_features))


class LabelEmbedder(nn.Module):
    """Class table with one more row, the last, for 'no label' (`null_label`; None if there is none).

    `num_special` rows between the classes and that one are a method's own (GIVT: masked tokens).
    """

    def __init__(self, num_classes: int, width: int, *, num_special: int = 0, null: bool = True) -> None:
        super().__init__()
        self.num_classes, self.num_special = num_classes, num_special
        self.null_label = num_classes + num_special if null else None
        self.embedding_table = nn.Embedding(num_classes + num_special + null, width)

    def forward(self, labels: Tensor) -> Tensor:
        """Rows of the table: int64 (B,) -> (B, E)."""
        return self.embedding_table(labels)


class SplitLabelEmbedder(nn.Module):
    """Class table, and apart from it one learned vector for 'no label', as MAR and MAGE keep them.

    Both enter every batch, so that neither is ever without a gradient (DDP waits for all of them).
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.null_label = num_classes
        self.class_emb = nn.Embedding(num_classes, width)
        self.fake_latent = nn.Parameter(torch.zeros(1, width))

    def forward(self, labels: Tensor) -> Tensor:
        """int64 (B,) in 0..num_classes -> (B, E)."""
        known = self.class_emb(labels.clamp(max=self.null_label - 1))
        return torch.where((labels == self.null_label)[:, None], self.fake_latent, known)


def sincos_2d(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed sine-cosine positions of a raster grid (MAE, He et al. 2021): (h*w, width), float32.

    The first half of the width encodes the column, the second half the row (the opposite of `axial_rope`).
    Raises ValueError if `width` is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width divisible by 4, not {width}")
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, cols = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = [axis.reshape(-1, 1).double() * omega for axis in (cols, rows)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()

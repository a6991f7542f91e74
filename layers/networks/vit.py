"""The Vision Transformer of big_vision (Dosovitskiy et al., arXiv 2010.11929; official `models/vit.py`), no head.

Image encoder of UViM, and both halves of its label maps' autoencoder. Learned positions, no class token, biases
everywhere, GELU's tanh approximation. In: images or one-hot maps (B, C, H, W). Out: one vector per patch (B, L, E).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers.attention import PlainAttention
from layers.checkpoint import Rule
from layers.checks import check_positive
from layers.flax_layout import linear_rules, norm_rules, self_attention_rules
from layers.init import lecun_normal_
from layers.mlp import TanhMlp

NORM_EPS = 1e-6  # flax's default


@dataclass
class ViTConfig:
    """Sizes; the defaults are ViT-L/16."""

    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_hidden: int = 4096
    patch_size: int = 16
    grad_checkpointing: bool = False  # recompute blocks in the backward pass

    def __post_init__(self) -> None:
        check_positive("encoder", self, "width", "depth", "num_heads", "mlp_hidden", "patch_size")


class ViTLayer(nn.Module):
    """Pre-norm attention and MLP. Official `Encoder1DBlock`."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.attn = PlainAttention(config.width, config.num_heads)
        self.norm2 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.mlp = TanhMlp(config.width, config.mlp_hidden, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, E) -> (B, L, E)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def init_weights(self) -> None:
        """Query, key, value, output and MLP Xavier uniform each; biases of the MLP N(0, 1e-6), others zero."""
        for weight in [*self.attn.qkv.weight.chunk(3), self.attn.proj.weight, self.mlp.fc1.weight, self.mlp.fc2.weight]:
            nn.init.xavier_uniform_(weight)
        for linear in (self.attn.qkv, self.attn.proj):
            nn.init.zeros_(linear.bias)
        for linear in (self.mlp.fc1, self.mlp.fc2):
            nn.init.normal_(linear.bias, std=1e-6)


class ViTTrunk(nn.Module):
    """Learned positions, blocks and a norm: (B, L, E) -> (B, L, E). Official `get_posemb` and `Encoder`."""

    def __init__(self, config: ViTConfig, *, seq_len: int) -> None:
        super().__init__()
        self.grad_checkpointing = config.grad_checkpointing
        self.pos_embed = nn.Parameter(torch.empty(1, seq_len, config.width))
        self.blocks = nn.ModuleList(ViTLayer(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Positions N(0, 1/E), blocks as they say."""
        nn.init.normal_(self.pos_embed, std=self.pos_embed.shape[-1] ** -0.5)
        for block in self.blocks:
            block.init_weights()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed
        for block in self.blocks:
            recompute = self.grad_checkpointing and self.training
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return self.norm(x)


class ViT(nn.Module):
    """Patches of `size` (H, W) pixels of `channels` channels, and a trunk: (B, C, H, W) -> (B, L, E), in raster order.

    Raises ValueError if a side is no multiple of the patch size.
    """

    def __init__(self, config: ViTConfig, *, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        patch = config.patch_size
        self.grid = patch_grid(size, patch)
        self.patch_embed = nn.Conv2d(channels, config.width, patch, stride=patch)
        self.trunk = ViTTrunk(config, seq_len=self.grid[0] * self.grid[1])
        lecun_normal_(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.trunk(self.patch_embed(images).flatten(2).transpose(1, 2))


def patch_grid(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Patches in a column and in a row. Raises ValueError if a side is no multiple of the patch size."""
    if patch_size < 1 or any(side < 1 or side % patch_size for side in size):
        raise ValueError(f"{size[0]}x{size[1]} pixels cannot be cut into patches of {patch_size}: change one of them")
    return size[0] // patch_size, size[1] // patch_size


def resample_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions (1, n*n, E) of a square grid -> (1, h*w, E), linear between them, corner to corner.

    Official `resample_posemb`, by scipy's `zoom`. Raises ValueError for positions of no square grid.
    """
    side = round(positions.shape[1] ** 0.5)
    if side**2 != positions.shape[1]:
        raise ValueError(f"{positions.shape[1]} positions are of no square grid of patches: they cannot be resampled")
    if (side, side) == grid:
        return positions
    square = positions.transpose(1, 2).unflatten(2, (side, side))  # (1, E, n, n)
    return F.interpolate(square, grid, mode="bilinear", align_corners=True).flatten(2).transpose(1, 2)


def trunk_rules(official: str, positions: str, ours: str, *, num_heads: int) -> list[Rule]:
    """A ViTTrunk called `ours` is the flax module `official` (an `Encoder`) and the array `positions` beside it."""
    block, our_block = f"{official}/encoderblock_*", f"{ours}.blocks.*"
    attention = f"{block}/MultiHeadDotProductAttention_0"
    return [
        Rule(positions, f"{ours}.pos_embed"),
        *norm_rules(f"{block}/LayerNorm_0", f"{our_block}.norm1"),
        *self_attention_rules(attention, f"{our_block}.attn", num_heads=num_heads),
        *norm_rules(f"{block}/LayerNorm_1", f"{our_block}.norm2"),
        *linear_rules(f"{block}/MlpBlock_0/Dense_0", f"{our_block}.mlp.fc1"),
        *linear_rules(f"{block}/MlpBlock_0/Dense_1", f"{our_block}.mlp.fc2"),
        *norm_rules(f"{official}/encoder_norm", f"{ours}.norm"),
    ]

"""GIVT's flow adapter: a small invertible network between the latents and the Transformer (official `adaptor.py`).

Additive couplings in the form of i-RevNet (Jacobsen et al., arXiv 1802.07088): volume is preserved, so that the density
of latents is that of the network's outputs. Unusual: trained jointly with the Transformer, whose input and target are
both its output. In and out: tokens (B, h*w, C).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from layers.checkpoint import Rule
from layers.checks import check_positive
from layers.flax_layout import conv_rules, norm_rules
from layers.init import lecun_normal_
from layers.precision import without_autocast

NORM_EPS = 1e-6
MAX_GROUPS = 32


@dataclass
class AdapterConfig:
    """Sizes. Official `adaptor.py`."""

    num_blocks: int = 0  # 0: no adapter; official: 8
    bottleneck: int = (
        64  # num_channels_bottleneck, twice the width of the convolutions; official: 4 C, at 512 pixels 8 C
    )

    def __post_init__(self) -> None:
        check_positive("adapter", self, "bottleneck")
        if self.num_blocks < 0:
            raise ValueError(f"adapter.num_blocks is {self.num_blocks}: use 0 for no adapter")


class Residual(nn.Module):
    """F of a coupling: three 3x3 convolutions without biases, each after a group norm and ReLU; the first block of the
    flow has none before its first convolution."""

    def __init__(self, channels: int, hidden: int, *, first: bool) -> None:
        super().__init__()
        groups = min(MAX_GROUPS, channels)
        if not hidden or hidden % groups:
            raise ValueError(
                f"adapter.bottleneck is {2 * hidden}: half of it must be a multiple of its {groups} groups"
            )
        sizes = (channels, hidden, hidden, channels)
        self.norms = nn.ModuleDict(
            {str(i): nn.GroupNorm(groups, sizes[i], eps=NORM_EPS) for i in range(3) if i or not first}
        )
        self.convs = nn.ModuleList(nn.Conv2d(sizes[i], sizes[i + 1], 3, padding=1, bias=False) for i in range(3))
        for conv in self.convs:
            lecun_normal_(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C/2, h, w) -> (B, C/2, h, w)."""
        for i, conv in enumerate(self.convs):
            x = conv(F.relu(self.norms[str(i)](x)) if str(i) in self.norms else x)
        return x


class FlowAdapter(nn.Module):
    """`num_blocks` couplings (a, b) -> (b, a + F(b)) of the two halves of the channels, on a grid of tokens (h, w).

    float32 whatever autocast says, so that `inverse` gives back what went in. Raises ValueError for an odd number of
    channels or a width that the groups of its norms do not divide.
    """

    def __init__(self, config: AdapterConfig, channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        if channels % 2:
            raise ValueError(
                f"tokens have {channels} numbers: the adapter couples two halves, so it needs an even number"
            )
        self.grid = grid
        sizes = channels // 2, config.bottleneck // 2
        self.blocks = nn.ModuleList(Residual(*sizes, first=i == 0) for i in range(config.num_blocks))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, C) -> the same shape, and log |det| of the map per image, (B,): zeros."""
        with without_autocast(x.device):
            a, b = self._maps(x)
            for block in self.blocks:
                a, b = b, a + block(b)
            return self._tokens(a, b), x.new_zeros(len(x), dtype=torch.float32)

    def inverse(self, y: Tensor) -> Tensor:
        """What `forward` maps to y: (B, L, C) -> (B, L, C)."""
        with without_autocast(y.device):
            a, b = self._maps(y)
            for block in reversed(self.blocks):
                a, b = b - block(a), a
            return self._tokens(a, b)

    def _maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, w = self.grid
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        first, second = rearrange(x, "b (h w) (half c) -> half b c h w", h=h, w=w, half=2)
        return first, second

    def _tokens(self, a: Tensor, b: Tensor) -> Tensor:
        return rearrange(torch.cat([a, b], dim=1), "b c h w -> b (h w) c")


def adapter_rules() -> list[Rule]:
    """Official names <-> those of a module whose `adapter` this is."""
    official, ours = "params_adaptor/modules_*", "adapter.blocks.*"
    return [*conv_rules(f"{official}/Conv_*", f"{ours}.convs.*"), *norm_rules(f"{official}/gn_*", f"{ours}.norms.*")]

"""Jet: a normalizing flow of couplings (Kolesnikov et al., arXiv 2412.15129; official `models/proj/jet/jet.py`).

In each coupling half of the numbers stay, and a ViT that sees them says how the other half is shifted and scaled.
Unusual: the shift comes before the scale, the scale is twice a sigmoid, and which half stays is a permutation that is
drawn once and undone after each coupling. The identity at first. In and out: tokens (B, N, C), log |det| (B,) in nats.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers.checkpoint import Rule
from layers.flax_layout import State, linear_rules, stack, unstack
from layers.flows.reversible import chain, reversible_chain
from layers.init import lecun_normal_
from layers.networks.vit import ViTConfig, ViTTrunk, trunk_rules
from layers.precision import cast_linear_, without_autocast
from layers.random import mix_seed

KINDS = ("channels", "spatial")
SPATIAL_ORDERS = ("checkerboard", "checkerboard-inv", "vstripes", "vstripes-inv", "hstripes", "hstripes-inv")
MLP_RATIO = 4


@dataclass
class JetConfig:
    """Sizes; the defaults are the smaller model of 64x64 images. Official `configs/proj/jet/imagenet64.py`."""

    depth: int = 32  # couplings
    block_depth: int = 2  # ViT blocks in each
    width: int = 512
    num_heads: int = 8
    # in turn over the couplings; JetFormer has ["channels"] alone
    kinds: list[str] = field(default_factory=lambda: ["channels"] * 4 + ["spatial"])
    spatial: list[str] = field(default_factory=lambda: list(SPATIAL_ORDERS))  # in turn over the spatial couplings
    scale_factor: float = 2.0  # scales lie between 0 and this
    permutation_seed: int = 0  # of the channels' permutations, which are the same in all processes
    # what the backward pass has at hand: everything; each coupling's input (official); the flow's output
    backward: Literal["plain", "recompute", "reversible"] = "plain"

    def __post_init__(self) -> None:
        if self.depth < 1 or self.scale_factor <= 0:
            raise ValueError(f"net.depth is {self.depth}, net.scale_factor {self.scale_factor}: both must be positive")
        for name, values, known in (("kinds", self.kinds, KINDS), ("spatial", self.spatial, SPATIAL_ORDERS)):
            if not values or not set(values) <= set(known):
                raise ValueError(f"net.{name} is {values}: name one or more of {', '.join(known)}")


class CouplingNet(nn.Module):
    """Half the numbers (B, N, D) -> bias and raw scale of the other half, twice; zeros at first. Official `DNN`.

    The last projection is float32 under autocast: what a scale loses in rounding, the inverse cannot give back.
    """

    def __init__(self, config: JetConfig, *, seq_len: int, dim: int) -> None:
        super().__init__()
        sizes = {"width": config.width, "depth": config.block_depth, "num_heads": config.num_heads}
        self.init_proj = nn.Linear(dim, config.width)
        self.trunk = ViTTrunk(ViTConfig(**sizes, mlp_hidden=MLP_RATIO * config.width), seq_len=seq_len)
        self.final_proj = nn.Linear(config.width, 2 * dim)
        lecun_normal_(self.init_proj.weight)
        for tensor in (self.init_proj.bias, self.final_proj.weight, self.final_proj.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(self.init_proj(x))
        with without_autocast(x.device):
            bias, raw = self.final_proj(h.to(self.final_proj.weight.dtype)).chunk(2, dim=-1)
        return bias, raw


class Coupling(nn.Module):
    """(kept, moved) -> (kept, (moved + bias) * scale); subclasses say which half is moved. Official `Coupling`."""

    def __init__(self, config: JetConfig, *, seq_len: int, token_dim: int) -> None:
        super().__init__()
        self.scale_factor = config.scale_factor
        self.net = CouplingNet(config, seq_len=seq_len, dim=token_dim // 2)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, C) -> kept and moved (B, N, C/2)."""
        raise NotImplementedError

    def merge(self, x: Tensor, moved: Tensor) -> Tensor:
        """x (B, N, C) with its moved half replaced: the permutation is undone, and what is kept is not touched."""
        raise NotImplementedError

    def scale(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """raw (B, N, C/2) -> factors, and the sum of their logarithms (B,)."""
        log_scale = F.logsigmoid(raw) + math.log(self.scale_factor)
        return self.scale_factor * raw.sigmoid(), log_scale.sum(dim=(1, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = self.split(x)
        bias, raw = self.net(kept)
        scale, logdet = self.scale(raw)
        return self.merge(x, (moved + bias) * scale), logdet

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """At the cost of `forward`, since what the network sees is in y as well."""
        kept, moved = self.split(y)
        bias, raw = self.net(kept)
        scale, logdet = self.scale(raw)
        return self.merge(y, moved / scale - bias), -logdet


class ChannelCoupling(Coupling):
    """Keeps the channels that come first in `order` (C,), in all tokens."""

    def __init__(self, config: JetConfig, order: list[int], *, seq_len: int, token_dim: int) -> None:
        super().__init__(config, seq_len=seq_len, token_dim=token_dim)
        self.register_buffer("channel_order", torch.tensor(order))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = x.index_select(2, self.channel_order).chunk(2, dim=2)
        return kept, moved

    def merge(self, x: Tensor, moved: Tensor) -> Tensor:
        return x.index_copy(2, self.channel_order.chunk(2)[1], moved)


class SpatialCoupling(Coupling):
    """Keeps the tokens that come first in `order` (N,). Each token is cut in two, so that the network sees as many
    tokens of as many numbers as that of a channel coupling."""

    def __init__(self, config: JetConfig, order: list[int], *, seq_len: int, token_dim: int) -> None:
        super().__init__(config, seq_len=seq_len, token_dim=token_dim)
        self.register_buffer("token_order", torch.tensor(order))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        halves = x.index_select(1, self.token_order).chunk(2, dim=1)  # (B, N/2, C) each
        kept, moved = (rearrange(half, "b n (s c) -> b (n s) c", s=2) for half in halves)
        return kept, moved

    def merge(self, x: Tensor, moved: Tensor) -> Tensor:
        moved = rearrange(moved, "b (n s) c -> b n (s c)", s=2)
        return x.index_copy(1, self.token_order.chunk(2)[1], moved)


class Jet(nn.Module):
    """`config.depth` couplings on a grid (h, w) of tokens of `token_dim` numbers; float32 at the least, in and out.

    Raises ValueError for an odd token_dim, or a grid that a spatial coupling cannot halve.
    """

    def __init__(self, config: JetConfig, *, grid: tuple[int, int], token_dim: int) -> None:
        super().__init__()
        if token_dim % 2:
            raise ValueError(f"tokens have {token_dim} numbers: couplings halve them, so use an even number")
        self.config = config
        kinds = [config.kinds[i % len(config.kinds)] for i in range(config.depth)]
        self.couplings = nn.ModuleList()
        for i, kind in enumerate(kinds):
            if kind == "channels":
                cls, order = ChannelCoupling, channel_order(config.permutation_seed, i, token_dim)
            else:
                turn = kinds[:i].count("spatial") % len(config.spatial)
                cls, order = SpatialCoupling, token_order(config.spatial[turn], grid)
            self.couplings.append(cls(config, order, seq_len=grid[0] * grid[1], token_dim=token_dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, C) -> latents (B, N, C), and log |det| of the map per image (B,)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.config.backward == "reversible":
            return reversible_chain(self.couplings, x)
        if self.config.backward == "recompute":
            # nothing is random in a coupling
            return chain(
                [partial(checkpoint, c, use_reentrant=False, preserve_rng_state=False) for c in self.couplings], x
            )
        return chain(self.couplings, x)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, N, C) -> tokens (B, N, C), and log |det| of the map in this direction (B,)."""
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        return chain([coupling.inverse for coupling in reversed(self.couplings)], y)

    def prepare_sampling(self, *, compile: bool) -> None:
        """Cast weights to bfloat16 for good, but those of the last projection of each network, which stays float32.

        `compile` makes CUDA graphs of the networks.
        """
        for coupling in self.couplings:
            cast_linear_(coupling.net.init_proj, torch.bfloat16)
            cast_linear_(coupling.net.trunk, torch.bfloat16)
            if compile:
                coupling.net.compile(mode="reduce-overhead", dynamic=False)


def normal_nats(z: Tensor) -> Tensor:
    """-log p of latents under a standard normal prior, per image: (B, ...) -> (B,)."""
    return (0.5 * z.float().square() + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


# Which half is kept: indices, those that are kept first


def channel_order(seed: int, coupling: int, channels: int) -> list[int]:
    """A permutation of the channels, drawn from (seed, coupling) without torch's random numbers."""
    return sorted(range(channels), key=lambda channel: mix_seed(seed, coupling, channel))


def token_order(name: str, grid: tuple[int, int]) -> list[int]:
    """Raster indices of a grid (h, w), halved by the parity of column ("vstripes"), row ("hstripes") or their sum
    ("checkerboard"); "-inv" keeps the other half. Official `get_spatial_coupling_init`, which takes the index for the
    column: with an odd width stripes are of the index.

    Raises ValueError where the halves are not equal.
    """
    h, w = grid
    shape = name.removesuffix("-inv")
    parities = {"vstripes": lambda i: i, "hstripes": lambda i: i // w, "checkerboard": lambda i: i + i // w}
    halves = [[i for i in range(h * w) if parities[shape](i) % 2 == parity] for parity in (0, 1)]
    if len(halves[0]) != len(halves[1]):
        raise ValueError(f"{h}x{w} tokens cannot be halved by {name}: use even numbers, or net.kinds=[channels]")
    first, second = reversed(halves) if name.endswith("-inv") else halves
    return [*first, *second]


# Official names and layouts

# buffers here -> arrays there, of a one-hot matrix for each coupling, zeros for those of the other kind
MASKS = {"channel_order": "channel_coupling_masks-FREEZE_ME", "token_order": "spatial_coupling_masks-FREEZE_ME"}


def jet_rules(ours: str, *, num_heads: int, official: str = "") -> list[Rule]:
    """A Jet called `ours` is what is below the prefix `official`, couplings apart (`unrolled`)."""
    coupling, net = f"{official}couplings_*", f"{ours}.couplings.*.net"
    return [
        *(Rule(f"{coupling}/{order}", f"{ours}.couplings.*.{order}") for order in MASKS),
        *linear_rules(f"{coupling}/dnn/init_proj", f"{net}.init_proj"),
        *trunk_rules(f"{coupling}/dnn/vit", f"{coupling}/dnn/posemb", f"{net}.trunk", num_heads=num_heads),
        *linear_rules(f"{coupling}/dnn/final_proj", f"{net}.final_proj"),
    ]


def unrolled(state: Mapping[str, Tensor], official: str = "") -> State:
    """An official state with one set of names per coupling, and indices for the masks.

    Raises ValueError for a mask that is no permutation.
    """
    apart = unstack(state, f"{official}couplings", f"{official}couplings_{{}}", axis=0)
    for order, name in MASKS.items():
        for i, mask in enumerate(apart.pop(f"{official}{name}", ())):
            if mask.any():
                apart[f"{official}couplings_{i}/{order}"] = _order(mask, f"{official}{name}[{i}]")
    return apart


def stacked(state: Mapping[str, Tensor], official: str = "") -> State:
    """The inverse of `unrolled`. A state without indices, such as one of gradients, gets no masks."""
    orders = {name: tensor for name, tensor in state.items() if name.rpartition("/")[2] in MASKS}
    rest = {name: tensor for name, tensor in state.items() if name not in orders}
    result = stack(rest, f"{official}couplings", f"{official}couplings_{{}}", axis=0)
    if not orders:
        return result
    kernel, positions = (result[f"{official}couplings/dnn/{name}"] for name in ("init_proj/kernel", "posemb"))
    sizes = {"channel_order": 2 * kernel.shape[1], "token_order": positions.shape[2]}
    for order, name in MASKS.items():
        nothing = kernel.new_zeros(sizes[order], sizes[order])
        found = (orders.get(f"{official}couplings_{i}/{order}") for i in range(len(kernel)))
        result[f"{official}{name}"] = torch.stack([nothing if index is None else _mask(index) for index in found])
    return result


def _order(mask: Tensor, name: str) -> Tensor:
    """p (n,) of the matrix W (n, n) with W[p[j], j] = 1: y = x W is y_j = x_{p[j]}."""
    order = mask.argmax(0)
    if not torch.equal(order.sort().values, torch.arange(len(mask))) or not torch.equal(_mask(order).to(mask), mask):
        raise ValueError(f"{name} is no permutation matrix: the file is damaged, or of another model")
    return order


def _mask(order: Tensor) -> Tensor:
    return torch.eye(len(order), device=order.device)[:, order]

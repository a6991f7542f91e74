"""The small MLP that MAR's heads run on each token (Li et al. 2024, arXiv 2406.11838; official `SimpleMLPAdaLN`).

Residual blocks on one noisy token, modulated by time plus condition (DiT's AdaLN). Unusual: what depends on time and
condition only, three fifths of the work, can be done for many sampling steps at once (`modulations`); `step` is what
is left, and the plain `forward` its oracle. In: tokens (..., D), times (...), conditions (..., E). Out: (..., out_dim).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.embed import TimestepEmbedder
from layers.init import xavier_linears_

# elements of modulations held at once: 128 MiB in float32, on the host what a cache holds
MAX_MODULATIONS = 2**25
MAX_MODULATIONS_HOST = 2**21


class ResidualBlock(nn.Module):
    """h + gate * mlp(LayerNorm(h) * (1 + scale) + shift); vectors in the order shift, scale, gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        """h and condition y, both (..., W) and broadcastable -> (..., W)."""
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return self.modulated(h, shift, 1 + scale, gate)

    def modulated(self, h: Tensor, shift: Tensor, factor: Tensor, gate: Tensor) -> Tensor:
        """The block with its vectors given; factor is 1 + scale."""
        return torch.addcmul(h, gate, self.mlp(torch.addcmul(shift, self.in_ln(h), factor)))


class FinalLayer(nn.Module):
    """linear(LayerNorm(h) * (1 + scale) + shift); the norm has no weights of its own."""

    def __init__(self, width: int, out_dim: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        """h and condition y, both (..., W) and broadcastable -> (..., out_dim)."""
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.modulated(h, shift, 1 + scale)

    def modulated(self, h: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
        """The layer with its vectors given; factor is 1 + scale."""
        return self.linear(torch.addcmul(shift, self.norm_final(h), factor))


class Denoiser(nn.Module):
    """The network; parameter names are the official ones. A fresh one returns exactly 0."""

    def __init__(self, token_dim: int, cond_dim: int, *, width: int, depth: int, out_dim: int) -> None:
        super().__init__()
        self.width, self.depth = width, depth
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(cond_dim, width)
        self.input_proj = nn.Linear(token_dim, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, out_dim)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Official `initialize_weights`."""
        xavier_linears_(self)
        for layer in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (*(b.adaLN_modulation[1] for b in self.layers()), self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def layers(self) -> list[nn.Module]:
        """The modulated layers, the final one last."""
        return [*self.res_blocks, self.final_layer]

    def forward(self, x: Tensor, time: Tensor, z: Tensor) -> Tensor:
        """x (..., D), time (...) as the sinusoid takes it, z (..., E) -> (..., out_dim)."""
        return self.denoise(x, self.embed_time(time) + self.cond_embed(z))

    def embed_time(self, time: Tensor) -> Tensor:
        """(...) -> (..., W)."""
        return self.time_embed(time.flatten()).view(*time.shape, -1)

    def embed_timesteps(self, timesteps: Tensor, num_timesteps: int) -> Tensor:
        """`embed_time` of int64 timesteps in 0..num_timesteps-1; each is embedded once where there are more rows."""
        if timesteps.numel() <= num_timesteps:
            return self.embed_time(timesteps)
        table = self.embed_time(torch.arange(num_timesteps, device=timesteps.device))
        # under autocast the gradients of many rows meet in one row of the table: they are added in float32
        exact = table.to(torch.promote_types(table.dtype, torch.float32))
        return F.embedding(timesteps, exact).to(table.dtype)

    def denoise(self, x: Tensor, y: Tensor) -> Tensor:
        """x (..., D) under the embedded condition y (..., W) -> (..., out_dim)."""
        h = self.input_proj(x)
        for layer in self.layers():
            h = layer(h, y)
        return h

    def runs(self, num_steps: int, rows: int) -> list[slice]:
        """Equal runs of steps, the last may be shorter, whose modulations of `rows` rows fit into the limit."""
        per_step = rows * (3 * self.depth + 2) * self.width
        on_host = self.input_proj.weight.device.type == "cpu"
        limit = min(MAX_MODULATIONS, MAX_MODULATIONS_HOST) if on_host else MAX_MODULATIONS
        most = max(1, limit // per_step)
        size = -(-num_steps // -(-num_steps // most))
        return [slice(i, min(i + size, num_steps)) for i in range(0, num_steps, size)]

    def modulations(self, y: Tensor) -> list[Tensor]:
        """Vectors of every layer: y (..., W) -> d of (..., 3W) and one of (..., 2W), with 1 added to the scales."""
        activated, made = F.silu(y), []
        for layer in self.layers():
            linear = layer.adaLN_modulation[1]
            bias = linear.bias.clone()
            bias[self.width : 2 * self.width] += 1  # here, not in the results, which are S R times as many
            made.append(F.linear(activated, linear.weight, bias))
        return made

    def step(self, x: Tensor, modulations: list[Tensor]) -> Tensor:
        """`denoise` with the modulations of one step: x (R, D), vectors (R, ...) -> (R, out_dim).

        Vectors (2, R, ...), of two kinds of conditions per row, give (2, R, out_dim); x is projected once.
        """
        h = self.input_proj(x)
        for layer, vectors in zip(self.layers(), modulations, strict=True):
            h = layer.modulated(h, *vectors.split(self.width, dim=-1))
        return h

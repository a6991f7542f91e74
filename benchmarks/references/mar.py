"""MAR the plain way, as the official code runs it: what `make bench` compares with, and the oracle of the fast path.

It uses the same parameters as the module. Encoder and decoder run on both guidance branches with every row of every
block, and rows are found by boolean masks; the head's sampler looks constants up on the host at each step, embeds the
time of every row, and carries all rows twice under guidance; a training step draws orders image by image and computes
the head on all tokens, four times over, before it masks them.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measure import Sizes
from layers.diffusion.gaussian import Coefficients, GaussianProcess, hybrid_terms, q_sample, reverse_step
from layers.heads.diffusion import DiffusionHead
from layers.samplers.masked import mask_rate
from lightning_modules.base import Batch
from lightning_modules.mar import MARModule, MARSampling

CPU = Sizes(train_batch=4, sample_batch=(4,), sampling={"num_iter": 16, "num_steps": 25})
CUDA = Sizes(train_batch=128, sample_batch=(1, 32, 256), sampling={"num_iter": 64, "num_steps": 100})

# A sixth of MAR-B in every size of trunk and head; 256 tokens and 64 buffers stay. Half a minute instead of an hour,
# but of two decoder blocks one is the last, which the fast path computes in part: larger models gain less from that
SHRUNKEN = ("net.width=128", "net.depth=2", "net.num_heads=2", "head.width=176", "head.depth=1")

# Constants of a reverse step: 7 look-ups, of which the official code has 8
REVERSE = (
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "log_betas",
    "posterior_log_variance_clipped",
    "adds_noise",
)

Draw = Callable[[int, int], Tensor]  # (rows, D) -> standard normal


def cpu_overrides(arguments: dict[str, Any]) -> list[str]:
    """How a recipe is shrunken for the host: none where it is small already."""
    if arguments["net"]["width"] <= 128:
        return []
    return [f"--model.init_args.{change}" for change in SHRUNKEN]


class PlainMAR(nn.Module):
    """The trunk's forward, plainly. `compile_blocks` compiles block by block."""

    def __init__(self, net: nn.Module, *, compile_blocks: bool = False) -> None:
        super().__init__()
        self.net = net
        self.block = torch.compile(run_block) if compile_blocks else run_block

    def forward(self, x: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """z (B, L, E) of every position, given tokens x (B, L, D) where the mask (B, L) is 0."""
        with_buffer = torch.cat([torch.zeros(len(x), self.net.buffer, device=x.device), mask], dim=1)  # (B, M + L)
        return self.decode(self.encode(x, with_buffer, labels), with_buffer)

    def encode(self, x: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """All tokens are embedded, then the known ones picked: -> (B, M + K, E)."""
        net = self.net
        h = net.z_proj(x)
        h = torch.cat([torch.zeros(len(h), net.buffer, h.shape[-1], device=h.device), h], dim=1)
        h[:, : net.buffer] = net.y_embedder(labels)[:, None]
        h = net.z_proj_ln(h + net.encoder_pos_embed_learned)
        h = h[(1 - mask).nonzero(as_tuple=True)].reshape(len(h), -1, h.shape[-1])
        for layer in net.encoder_blocks:
            h = self.block(layer, h)
        return net.encoder_norm(h)

    def decode(self, h: Tensor, mask: Tensor) -> Tensor:
        """(B, M + K, E) -> (B, L, E), every block on every row."""
        net = self.net
        h = net.decoder_embed(h)
        padded = net.mask_token.repeat(*mask.shape, 1).to(h.dtype)
        padded[(1 - mask).nonzero(as_tuple=True)] = h.reshape(-1, h.shape[-1])
        h = padded + net.decoder_pos_embed_learned
        for layer in net.decoder_blocks:
            h = self.block(layer, h)
        return net.decoder_norm(h)[:, net.buffer :] + net.diffusion_pos_embed_learned


def run_block(layer: nn.Module, h: Tensor) -> Tensor:
    """A block as it is: timm's has the same kernels."""
    return layer(h)


def lookup(table: np.ndarray, timesteps: Tensor) -> Tensor:
    """Constants of timesteps (R,), each table taken to the device anew: (R, 1)."""
    return torch.from_numpy(table).to(timesteps.device)[timesteps].float()[:, None]


def constants(process: GaussianProcess, timesteps: Tensor, *, names: Sequence[str]) -> Coefficients:
    """The named constants of timesteps (R,), None for the others."""
    found = {name: lookup(getattr(process, name), timesteps) for name in names}
    return Coefficients(*(found.get(name) for name in Coefficients._fields))


class PlainHead:
    """Loss and sampler of the Diffusion Loss, row by row."""

    def __init__(self, head: DiffusionHead) -> None:
        self.net, self.process, self.clip = head.net, head.process, head.clip_denoised

    def loss(self, x: Tensor, z: Tensor, mask: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Masked mean over rows: x (R, D), z (R, E), mask and t (R,), noise (R, D)."""
        c = constants(self.process, t, names=Coefficients._fields)
        x_t = q_sample(x, noise, c)
        eps, v = self.net(x_t, t, z).float().chunk(2, dim=-1)
        mse, vb = hybrid_terms(x, x_t, noise, eps, v, c)
        return ((mse + vb) * mask).sum() / mask.sum()

    def sample(self, z: Tensor, draw: Draw, scale: float, temperature: float, num_steps: int) -> Tensor:
        """Tokens (R, D) for z (R, E), or (2R, E) under guidance: then both halves carry everything."""
        process, guided, dim = self.process.respaced(num_steps), scale != 1, self.net.input_proj.in_features
        rows = len(z) // 2 if guided else len(z)
        x = draw(rows, dim)
        if guided:
            x = torch.cat([x, x])
        for i in reversed(range(num_steps)):
            t = torch.tensor([i] * len(x), device=x.device)
            original = torch.tensor(process.timestep_map, device=x.device)[t]
            c = constants(process, t, names=REVERSE)
            eps, v = self.predict(x, original, z, scale if guided else None)
            step, noise = reverse_step(x, eps, v, c, clip=self.clip), draw(len(x), dim)
            x = step.mean + c.adds_noise * torch.exp(0.5 * step.log_variance) * noise * temperature
        return x[:rows]

    def predict(self, x: Tensor, t: Tensor, z: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        """Noise and variance logits; guidance gives both halves the same noise."""
        if scale is None:
            return self.net(x, t, z).float().chunk(2, dim=-1)
        half = x[: len(x) // 2]
        eps, v = self.net(torch.cat([half, half]), t, z).float().chunk(2, dim=-1)
        cond, uncond = eps.chunk(2)
        mixed = uncond + scale * (cond - uncond)
        return torch.cat([mixed, mixed]), v


class Reference:
    """Training step and sampler of one module, plainly. Raises ValueError for what the official code has not."""

    def __init__(self, module: MARModule, *, compile_blocks: bool = False) -> None:
        if module.causal or not isinstance(module.head, DiffusionHead):
            raise ValueError("the plain path is the official code's: a bidirectional trunk and head.kind=diffusion")
        self.module, self.length = module, module.net.seq_len
        self.net = PlainMAR(module.net, compile_blocks=compile_blocks)
        self.head = PlainHead(module.head)

    def orders(self, batch: int) -> Tensor:
        """Shuffled on the host, image by image: (B, L)."""
        orders = [np.random.permutation(self.length) for _ in range(batch)]
        return torch.tensor(np.array(orders), device=self.module.device)

    def mask(self, orders: Tensor, count: int) -> Tensor:
        """(B, L), 1 at the first `count` positions of each order."""
        empty = torch.zeros(orders.shape, device=orders.device)
        ones = torch.ones(orders.shape, device=orders.device)
        return empty.scatter(1, orders[:, :count], ones[:, :count])

    def loss(self, batch: Batch) -> Tensor:
        """Scalar loss with draws of its own."""
        module, label = self.module, batch["label"]
        x = module.tokens(batch, None).x
        count = math.ceil(self.length * mask_rate(np.random.rand(), module.objective.mask_ratio_min))
        dropped = torch.rand(len(x)).to(x.device) < module.objective.label_drop_prob
        repeat = (module.head_config.repeat, *x.shape[:2])
        t = torch.randint(0, len(module.head.process.betas), repeat, device=x.device)
        noise = torch.randn(*repeat, x.shape[-1], device=x.device)
        mask = self.mask(self.orders(len(x)), count)
        return self.masked_loss(x, torch.where(dropped, module.num_classes, label), mask, t, noise)

    def masked_loss(self, x: Tensor, labels: Tensor, mask: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """For given draws: mask (B, L), t (M, B, L), noise (M, B, L, D). All tokens meet the head M times."""
        z, repeat = self.net(x, mask, labels), len(t)
        rows = (y.flatten(0, 1).repeat(repeat, *[1] * (y.ndim - 2)) for y in (x, z, mask))
        return self.head.loss(*rows, t.flatten(), noise.flatten(0, 2))

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW with its default kernels."""
        return torch.optim.AdamW(list(parameters), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.02)

    @torch.no_grad()
    def sample(self, labels: Tensor, sampling: MARSampling) -> Tensor:
        """Tokens for labels, with draws of its own."""
        return self.generate(labels, self.orders(len(labels)), self._draw, sampling)

    def _draw(self, rows: int, dim: int) -> Tensor:
        return torch.randn(rows, dim, device=self.module.device)

    def generate(self, labels: Tensor, orders: Tensor, draw: Draw, sampling: MARSampling) -> Tensor:
        """For given orders (B, L) and draws: per iteration the start of R rows, then a draw of all rows per step."""
        guided = sampling.cfg_scale != 1
        mask = torch.ones(orders.shape, device=orders.device)
        x = torch.zeros(*orders.shape, self.module.tokenizer.token_dim, device=orders.device)
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self.module.num_classes)])
        for k in range(sampling.num_iter):
            both = (torch.cat([y, y]) if guided else y for y in (x, mask))
            z = self.net(*both, labels)
            share = math.cos(math.pi / 2 * (k + 1) / sampling.num_iter)
            left = torch.tensor([math.floor(self.length * share)], device=x.device)
            left = torch.maximum(torch.ones_like(left), torch.minimum(mask[0].sum() - 1, left)).long()
            following = self.mask(orders, int(left))
            new = mask.bool() if k == sampling.num_iter - 1 else torch.logical_xor(mask.bool(), following.bool())
            z = z[(torch.cat([new, new]) if guided else new).nonzero(as_tuple=True)]
            rows = self.head.sample(z, draw, self.scale(sampling, int(left)), sampling.temperature, sampling.num_steps)
            x[new.nonzero(as_tuple=True)] = rows
            mask = following
        return x

    def scale(self, sampling: MARSampling, left: int) -> float:
        """Guidance of an iteration after which `left` tokens are unknown."""
        if sampling.cfg_schedule == "constant":
            return sampling.cfg_scale
        return 1 + (sampling.cfg_scale - 1) * (self.length - left) / self.length

"""JiT the plain way, as the official code runs it: what `make bench` compares with, and the oracle of the fast path.

It uses the same parameters as the network. Attention is written out in float32 with the whole score matrix in memory;
guidance makes two passes at every evaluation, inside the interval or not; a training step waits for the device to read
its loss, averages parameter by parameter and takes AdamW's default kernels.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Sizes
from layers.attention import Attention
from layers.blocks import AdaLNBlock
from layers.diffusion.flow_matching import convert, interpolate, logit_normal, target
from layers.samplers.ode import uniform_times
from lightning_modules.base import Batch
from lightning_modules.jit import JiT, JiTModule, JiTSampling

CPU = Sizes(train_batch=2, sample_batch=(1,), sampling={"num_steps": 4})
CUDA = Sizes(train_batch=128, sample_batch=(256, 1), sampling={"num_steps": 50})


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Step by step in float32."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (y * weight).to(x.dtype)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Adjacent pairs, promoted to the tables' float32."""
    u, v = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * rope[0] + torch.stack([-v, u], dim=-1).flatten(-2) * rope[1]


def attention(layer: Attention, x: Tensor, rope: Tensor) -> Tensor:
    """(B, L, E) -> (B, L, E) with float32 scores (B, N, L, L), autocast off."""
    b, length, width = x.shape
    qkv = layer.qkv(x).reshape(b, length, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q = rotate(rms_norm(q, layer.q_norm.weight, layer.q_norm.eps), rope)
    k = rotate(rms_norm(k, layer.k_norm.weight, layer.k_norm.eps), rope)
    with torch.autocast(x.device.type, enabled=False):
        scores = q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.shape[-1])
        weights = F.dropout(scores.softmax(-1), layer.attn_dropout, training=layer.training)
    out = weights.to(v.dtype) @ v
    return layer.proj_dropout(layer.proj(out.transpose(1, 2).reshape(b, length, width)))


def block(layer: AdaLNBlock, x: Tensor, c: Tensor, rope: Tensor) -> Tensor:
    """One block, its parts in turn."""
    shift1, scale1, gate1, shift2, scale2, gate2 = layer.adaLN_modulation(c).chunk(6, dim=-1)
    y = rms_norm(x, layer.norm1.weight, layer.norm1.eps) * (1 + scale1[:, None]) + shift1[:, None]
    x = x + gate1[:, None] * attention(layer.attn, y, rope)
    y = rms_norm(x, layer.norm2.weight, layer.norm2.eps) * (1 + scale2[:, None]) + shift2[:, None]
    return x + gate2[:, None] * layer.mlp(y)


class PlainJiT(nn.Module):
    """A JiT's forward, plainly. `compile_blocks` compiles block by block, as the official code does."""

    def __init__(self, net: JiT, *, compile_blocks: bool = False) -> None:
        super().__init__()
        self.net = net
        self.block = torch.compile(block, dynamic=False) if compile_blocks else block

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """As JiT.forward, t (B,)."""
        net, context = self.net, self.net.config.in_context_len
        y = net.y_embedder(labels)
        c = net.t_embedder(t) + y
        x = net.x_embedder(x) + net.pos_embed
        for i, layer in enumerate(net.blocks):
            if context and i == net.config.in_context_start:
                x = torch.cat([y[:, None] + net.in_context_posemb, x], dim=1)
            x = self.block(layer, x, c, net.rope[:, context - (x.shape[1] - len(net.pos_embed[0])) :])
        x = x[:, context:]
        shift, scale = net.final_layer.adaLN_modulation(c).chunk(2, dim=-1)
        norm = net.final_layer.norm_final
        return net.final_layer.linear(rms_norm(x, norm.weight, norm.eps) * (1 + scale[:, None]) + shift[:, None])


class Reference:
    """Training step and sampler of one module, plainly."""

    def __init__(self, module: JiTModule, *, compile_blocks: bool = False) -> None:
        self.module, self.net = module, PlainJiT(module.net, compile_blocks=compile_blocks)

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        """Scalar loss with the module's objective."""
        o, x = self.module.objective, self.module.tokenizer(batch).x
        drop = torch.rand(len(x), generator=generator, device=x.device) < o.label_drop_prob
        t = logit_normal(torch.randn(len(x), generator=generator, device=x.device), mean=o.p_mean, std=o.p_std)
        noise = torch.randn(x.shape, generator=generator, device=x.device) * o.noise_scale
        t, labels = t.view(-1, 1, 1), torch.where(drop, self.module.num_classes, batch["label"])
        z = interpolate(x, noise, t)
        output = self.net(z, t.flatten(), labels).float()
        pair = (
            convert(value, z, t, source=o.prediction, to=o.loss, t_eps=o.t_eps)
            for value in (output, target(o.prediction, x, noise))
        )
        return (next(pair) - next(pair)).square().mean()

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW with its default kernels."""
        return torch.optim.AdamW(list(parameters), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)

    @torch.no_grad()
    def sample(self, labels: Tensor, sampling: JiTSampling, generator: torch.Generator | None = None) -> Tensor:
        """Tokens for labels by Heun's or Euler's method, both guidance branches one after the other throughout."""
        module, low, high = self.module, *sampling.cfg_interval
        shape = (len(labels), module.tokenizer.seq_len, module.tokenizer.token_dim)
        z = torch.randn(shape, generator=generator, device=labels.device) * module.objective.noise_scale
        times = uniform_times(sampling.num_steps).to(z.device)
        null = torch.full_like(labels, module.num_classes)

        def velocity(z: Tensor, t: Tensor) -> Tensor:
            each = t.expand(len(z))
            cond, uncond = (
                convert(
                    self.net(z, each, y).float(),
                    z,
                    t,
                    source=module.objective.prediction,
                    to="v",
                    t_eps=module.objective.t_eps,
                )
                for y in (labels, null)
            )
            inside = (t < high) & ((t > low) | (low == 0))
            return uncond + torch.where(inside, sampling.cfg_scale, 1.0) * (cond - uncond)

        for i in range(sampling.num_steps):
            step, slope = times[i + 1] - times[i], velocity(z, times[i])
            if sampling.method == "heun" and i < sampling.num_steps - 1:
                slope = (slope + velocity(z + step * slope, times[i + 1])) / 2
            z = z + step * slope
        return z

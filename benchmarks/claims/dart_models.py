"""Small DARTs for claims: on scikit-learn's digits, and on two points.

Digits are 8x8 grey pixels in 4x4 patches, dequantised at their own 17 levels: copies of 4 tokens of 16 numbers. A
network without memory is the same with attention inside a copy only: the diagonal of DART's block-causal pattern. Two
points are -1 and 1 on a line, one token of one number, for which the best prediction is known.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Generator, Tensor

from benchmarks.claims import digits
from benchmarks.claims.digits import VALIDATION
from benchmarks.claims.ledger import Cell, Settings
from datamodules.digits import SIDE
from layers.diffusion.nomad import Nomad, nomad_tables
from layers.kv_cache import KVCache
from layers.networks.dart import DARTAttention, DARTConfig, Layout
from layers.random import mix_seed
from layers.rope_axes import rotate_axes
from layers.samplers.nomad import Prediction, denoise
from layers.tokenizers.base import Tokenizer
from layers.tokenizers.vectors import VectorTokenizer
from lightning_modules.base import Batch, eval_mode
from lightning_modules.callbacks.ema import EMA
from lightning_modules.dart import DARTModule, DARTObjective, DARTSampling, FlowConfig
from lightning_modules.optim import OptimConfig

PATCH = 4  # pixels
TOKENS = (SIDE // PATCH) ** 2
DRAWN = "samples"  # group of figures
NEAR = 0.5  # distance at which a draw counts as one of the points: half-way to the middle
DIGITS, POINTS = "digits", "two points"


class Model(NamedTuple):
    """What distinguishes the trained models."""

    num_steps: int
    rows: str = DIGITS
    history: bool = True  # attention to all noisier copies; False: to the copy itself
    flow: bool = False  # whether a head moves what is drawn: DART-FM

    def key(self, seed: int) -> str:
        return f"{self.rows} T={self.num_steps} history={self.history} flow={self.flow} seed={seed}"


class CopyAttention(DARTAttention):
    """Attention inside each copy. A cache is not looked at."""

    def forward(self, x: Tensor, rope: Tensor, layout: Layout, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b l (three n d) -> three b n l d", three=3, n=self.num_heads)
        q, k = (rotate_axes(norm(y), rope, self.slices) for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        q, k, v = (rearrange(y, "b n (t k) d -> b t n k d", t=len(layout.blocks)) for y in (q, k, v))
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b t n k d -> b (t k) (n d)"))


def build(model: Model, settings: Settings, seed: int) -> DARTModule:
    """A fresh model, whose weights depend on the seed, with or without memory: its sizes on `settings`."""
    heads = settings["num_heads"]
    net = DARTConfig(settings["width"], settings["depth"], heads, mlp_hidden=settings["mlp_hidden"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = DARTModule(
            make_tokenizer(model.rows),
            digits.CLASSES if model.rows == DIGITS else 1,
            "dart_fm" if model.flow else "dart",
            net=net,
            head=FlowConfig(settings["head_width"], settings["head_depth"]),
            objective=DARTObjective(model.num_steps, label_drop_prob=0.0),
            sampling=DARTSampling(cfg_scale=1.0),
            optim=OptimConfig(lr=settings["lr"]),
        )
        if not model.history:
            for block in module.net.blocks:
                block.attn = _without_memory(block.attn, net)
    return module


def _without_memory(attention: DARTAttention, net: DARTConfig) -> CopyAttention:
    """The same weights."""
    found = CopyAttention(net.width, net.num_heads)
    found.load_state_dict(attention.state_dict())
    return found


def make_tokenizer(rows: str) -> Tokenizer:
    return digits.dequantised(PATCH) if rows == DIGITS else VectorTokenizer(1, 1)


# Digits


def compute(model: Model, settings: Settings, seed: int) -> Cell:
    """Train on digits; the error of x_0 at each step on validation rows; figures of samples, ten as "points"."""
    module = build(model, settings, seed)
    average = digits.train(module, settings, seed, reseed=True, clip=settings["clip"])
    batch, draws = digits.whole(SIDE, "val"), settings["noise_draws"]
    validation = digits.validate(module, average, batch, draws) | errors(module, average, batch, draws)
    images, labels = digits.draw_samples(module, average, settings["samples"], seed)
    points = {DRAWN: images[: digits.CLASSES].tolist()}
    return {VALIDATION: validation, DRAWN: digits.measure(images, labels), "points": points}


@torch.no_grad()
def errors(module: DARTModule, average: EMA, batch: Batch, noise_draws: int) -> Cell:
    """Mean squared error of x_0 as predicted at each step, by `step_name`, means over draws of all noise."""
    process, found = module.processes[0], []
    with eval_mode(module), average.weights(module, average.names[0]):
        condition = module.condition(batch, torch.zeros(len(batch["label"]), dtype=torch.bool))
        for i in range(noise_draws):
            generator = Generator().manual_seed(i)
            x = module.images(batch, generator)[0]  # (B, K, D)
            x_t = process.noised(x, torch.randn(len(x), process.num_steps, *x.shape[1:], generator=generator))
            v = module.net.linear(module.net(x_t.flatten(1, 2), condition)).view_as(x_t)
            found.append((process.clean(x_t, v) - x[:, None]).square().mean((0, 2, 3)))
    means = torch.stack(found).mean(0).tolist()
    return {step_name(process.num_steps - i): value for i, value in enumerate(means)}


def step_name(t: int) -> str:
    return f"error at t = {t}"


# Two points


def compute_points(model: Model, settings: Settings, seed: int) -> Cell:
    """Train on two points and draw: figures of the draws, and a thousand as "points"."""
    module, rows = build(model, settings, seed), two_points(settings["rows"])
    average = digits.train(module, settings, seed, reseed=True, data=rows, clip=settings["clip"])
    labels = torch.zeros(settings["draws"], dtype=torch.int64)
    with eval_mode(module), torch.no_grad(), average.weights(module, average.names[0]):
        drawn = module.sample_tokens(labels, module.sampling, Generator().manual_seed(seed)).flatten()
    return measured(drawn)


def two_points(count: int) -> Batch:
    """-1 and 1 in turn, (count, 1, 1), of one class."""
    raw = (torch.arange(count) % 2 * 2.0 - 1).view(-1, 1, 1)
    return {"raw": raw, "label": torch.zeros(count, dtype=torch.int64)}


def measured(drawn: Tensor) -> Cell:
    """Of draws (N,): how many are near one of the points, how many positive."""
    near = (drawn.abs() - 1).abs() <= NEAR
    figures = {"near": near.float().mean().item(), "positive": (drawn > 0).float().mean().item()}
    return {DRAWN: figures, "points": {DRAWN: drawn[:1000].tolist()}}


def compute_exact(num_steps: int, settings: Settings, seed: int) -> Cell:
    """Plain draws by the best prediction there is, E[x_0 | x_T..x_t] = tanh(sum of sqrt(gamma) x / (1 - gamma))."""
    process = Nomad(num_steps)
    noise = torch.randn(settings["draws"], num_steps, 1, 1, generator=Generator().manual_seed(mix_seed(seed, 1)))
    known = torch.zeros_like(noise[:, 0])

    def predict(x_t: Tensor, i: int) -> Prediction:
        known.add_(x_t, alpha=process.gammas[i] ** 0.5 / (1 - process.gammas[i]))
        return Prediction(known.tanh())

    return measured(denoise(predict, noise, process.gammas).flatten())


def reachable(num_steps: int) -> float:
    """Share of the best last predictions that are near one of the points where all copies are true ones: the sum in
    `compute_exact` is then normal, of mean and variance S_1."""
    snr = nomad_tables(num_steps, "direct").cumulative[0]
    edge = math.atanh(1 - NEAR)
    tails = ((sign * snr - edge) / math.sqrt(2 * snr) for sign in (1, -1))
    return sum(0.5 * (1 + math.erf(tail)) for tail in tails)

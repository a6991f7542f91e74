"""RAR the plain way, as the official code runs it: what `make bench` compares with, and the oracle of the fast path.

It uses the same parameters as the module. Both position tables are copied for each image and shuffled; attention gets
its causal mask as numbers to add; training also computes the place of the last token, whose output it drops, and draws
orders image by image on the host. Decoding builds the inputs of the whole sequence so far at every token, caches grow
by concatenation, and every row modulates every block anew, though the class and the place alone decide how.
"""

import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from benchmarks.measure import Sizes
from layers.attention import NormedAttention
from layers.networks.rar import PREFIX, RAR, RARBlock
from lightning_modules.base import Batch
from lightning_modules.rar import RARModule, RARSampling

CPU = Sizes(train_batch=4, sample_batch=(4,))
CUDA = Sizes(train_batch=64, sample_batch=(32, 1, 256))

# Half of RAR-B in width and depth, so an eighth of its weights; 256 tokens of 1024 codes stay. The tables, which are
# copied at every token, weigh four times as much beside the weights, which favours the fast path. The full size takes
# minutes: ARGS="--model.init_args.net.width=768 --model.init_args.net.depth=24 --model.init_args.net.num_heads=16
# --model.init_args.net.mlp_hidden=3072"
SHRUNKEN = ("net.width=384", "net.depth=12", "net.num_heads=8", "net.mlp_hidden=1536")

Store = list[Tensor]  # keys and values (B, N, l, d), or nothing yet
Choose = Callable[[Tensor, int], Tensor]  # (probabilities (B, V), number of the token) -> ids (B, 1)


def cpu_overrides(arguments: dict[str, Any]) -> list[str]:
    """How a recipe is shrunken for the host: none where it is small already."""
    if arguments["net"]["width"] <= 384:
        return []
    return [f"--model.init_args.{change}" for change in SHRUNKEN]


def attention(layer: NormedAttention, x: Tensor, mask: Tensor | None, store: Store | None) -> Tensor:
    """(B, l, E) -> (B, l, E); `mask` (l, l) is added to the scores, a store grows by what is new."""
    q, k, v = rearrange(layer.qkv(x), "b l (three n d) -> three b n l d", three=3, n=layer.num_heads)
    q, k = layer.q_norm(q), layer.k_norm(k)
    if store is not None:
        store[:] = [torch.cat([old, new], dim=2) for old, new in zip(store, (k, v), strict=True)] if store else [k, v]
        k, v = store
    dropout = layer.attn_dropout if layer.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return layer.proj_dropout(layer.proj(rearrange(out, "b n l d -> b l (n d)")))


def block(layer: RARBlock, x: Tensor, c: Tensor, mask: Tensor | None = None, store: Store | None = None) -> Tensor:
    """One block, which computes its modulation of the condition c (B, l, E) itself, SiLU included."""
    shift1, scale1, gate1, shift2, scale2, gate2 = layer.adaLN_modulation(c).chunk(6, dim=-1)
    x = x + gate1 * attention(layer.attn, layer.norm1(x) * (1 + scale1) + shift1, mask, store)
    return x + gate2 * layer.mlp(layer.norm2(x) * (1 + scale2) + shift2)


def shuffled(x: Tensor, orders: Tensor) -> Tensor:
    """Rows of x (B, L, ...) in the orders (B, L)."""
    return x[torch.arange(len(x))[:, None].expand(-1, x.shape[1]), orders]


class PlainRAR(nn.Module):
    """The network, plainly. `compile_blocks` compiles block by block."""

    def __init__(self, net: RAR, *, compile_blocks: bool = False) -> None:
        super().__init__()
        self.net = net
        self.block = torch.compile(block) if compile_blocks else block
        size = net.pos_embed.shape[1]
        mask = torch.full((size, size), -torch.inf, device=net.pos_embed.device).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, ids: Tensor, labels: Tensor, orders: Tensor, stores: list[Store] | None = None) -> Tensor:
        """Logits of what follows class and each of the ids (B, l), which are in their orders (B, L) already.

        With stores, of the newest place alone, or of the first two.
        """
        net, mask = self.net, self.mask
        x, c = self.embed(ids, labels, orders)
        mask = mask[: x.shape[1], : x.shape[1]]
        if stores and stores[0]:
            x, c, mask = x[:, -1:], c[:, -1:], None
        for layer, store in zip(net.blocks, stores or [None] * len(net.blocks), strict=True):
            x = self.block(layer, x, c, mask, store)
        if stores is None:
            x, c = x[:, 1:], c[:, 1:]
        scale, shift = net.adaln_before_head.adaLN_modulation(c).chunk(2, dim=-1)
        return net.lm_head(net.adaln_before_head.norm_final(x) * (1 + scale) + shift)

    def embed(self, ids: Tensor, labels: Tensor, orders: Tensor) -> tuple[Tensor, Tensor]:
        """Input and condition of all places (B, l + 2, E), each from tables of which every image has a copy."""
        net, size, seq_len = self.net, len(ids), self.net.seq_len
        tokens = net.embeddings(torch.cat([labels[:, None] + net.first_class, ids], dim=1))
        x = torch.cat([net.cls_token.expand(size, -1, -1), tokens], dim=1)
        length, places = x.shape[1], slice(PREFIX, PREFIX + seq_len)
        own, target = (table.repeat(size, 1, 1) for table in (net.pos_embed, net.target_aware_pos_embed))
        x = x + torch.cat([own[:, :PREFIX], shuffled(own[:, places], orders)], dim=1)[:, :length]
        nothing = torch.zeros_like(x[:, :1])
        x = x + torch.cat([nothing, shuffled(target[:, places], orders), nothing], dim=1)[:, :length]
        return x, tokens[:, :1] + net.timesteps_embeddings[:, :length]


class Reference:
    """Training step and sampler of one module, plainly. Raises ValueError for what the official code has not."""

    def __init__(self, module: RARModule, *, compile_blocks: bool = False) -> None:
        if module.objective.scan != "raster":
            raise ValueError(f"the plain path draws in raster order, not objective.scan={module.objective.scan}")
        self.module, self.length = module, module.net.seq_len
        self.net = PlainRAR(module.net, compile_blocks=compile_blocks)

    # Training

    def loss(self, batch: Batch) -> Tensor:
        """Scalar loss with draws of its own."""
        module, ids = self.module, self.module.tokens(batch, None).x
        dropped = torch.rand(len(ids), device=ids.device) < module.objective.label_drop_prob
        return self.order_loss(ids, torch.where(dropped, module.num_classes, batch["label"]), self.orders(ids))

    def orders(self, ids: Tensor) -> Tensor:
        """One image after another: (B, L)."""
        ratio, device = self.module.random_ratio(), ids.device
        draws = (
            torch.randperm(self.length, device=device)
            if random.random() < ratio
            else torch.arange(self.length, device=device)
            for _ in range(len(ids))
        )
        return torch.stack(list(draws))

    def order_loss(self, ids: Tensor, labels: Tensor, orders: Tensor) -> Tensor:
        """For given draws: ids (B, L) in raster order, labels (B,), orders (B, L)."""
        ids = shuffled(ids, orders)
        logits = self.net(ids, labels, orders)[:, :-1]
        return F.cross_entropy(logits.float().flatten(0, 1), ids.flatten())

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW with its default kernels."""
        return torch.optim.AdamW(list(parameters), lr=4e-4, betas=(0.9, 0.96), weight_decay=0.03)

    # Sampling

    @torch.no_grad()
    def sample(self, labels: Tensor, sampling: RARSampling) -> Tensor:
        """Ids (B, L) for labels, with draws of its own."""
        return self.generate(labels, lambda probs, _: torch.multinomial(probs, num_samples=1), sampling)

    def generate(self, labels: Tensor, choose: Choose, sampling: RARSampling) -> Tensor:
        """For given draws; guidance off is one branch, as officially with guidance 0."""
        rows = self.module.branches(labels, sampling)
        ids = torch.zeros(len(labels), 0, dtype=torch.int64, device=labels.device)
        stores: list[Store] = [[] for _ in self.net.net.blocks]
        orders = torch.stack([torch.arange(self.length, device=labels.device) for _ in rows])
        for index in range(self.length):
            both = ids if len(rows) == len(labels) else torch.cat([ids, ids])
            logits = self.net(both, rows, orders, stores)[:, -1]
            if len(rows) != len(labels):
                cond, uncond = logits.split(len(labels))
                logits = uncond + (cond - uncond) * self.scale(index, sampling)
            probs = F.softmax(logits / sampling.temperature, dim=-1)
            ids = torch.cat([ids, choose(probs, index)], dim=1)
        return ids

    def scale(self, index: int, sampling: RARSampling) -> Tensor:
        """Guidance of a token, a tensor (1,)."""
        power = torch.ones(1, device=self.module.device) * sampling.cfg_power
        return (sampling.cfg_scale - 1) * (1 - torch.cos((index / self.length) ** power * torch.pi)) / 2 + 1

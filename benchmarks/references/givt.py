"""GIVT the plain way, as the official code runs it: what `make bench` compares with, and the oracle of the fast path.

It uses the same parameters as the module. Attention has all scores in memory; masked tokens are embedded at full width
and half of it is thrown away. Decoding runs the two guidance branches one after the other, each with a cache of its own
to which every step attends at full length, and takes one step more than there are tokens. MaskGIT computes heads and
draws of known tokens too, and keeps the mixtures of all iterations. For the head see gmm.py.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import Sizes
from benchmarks.parts import Part
from benchmarks.references.gmm import HEADS, Draws, Mixture, draw, head_parts
from layers.guidance import for_branches
from layers.networks.givt import GIVT, GIVTBlock, SelfAttention
from layers.precision import compute_dtype
from layers.random import Generators
from layers.samplers.maskgit import choice_temperatures, official_counts, random_masks
from lightning_modules.base import Batch
from lightning_modules.givt import GIVTModule, GIVTSampling

CPU = Sizes(train_batch=4, sample_batch=(4,))
CUDA = Sizes(train_batch=64, sample_batch=(32, 1, 256))

# An eighth of the 304 M parameter model in every size of the trunk; tokens, mixtures and the number of tokens stay
SHRUNKEN = ("net.width=128", "net.depth=3", "net.num_heads=2", "net.mlp_hidden=512")


def cpu_overrides(arguments: dict[str, Any]) -> list[str]:
    """How a recipe is shrunken for the host: none where it is small already."""
    if arguments["net"]["width"] <= 192:
        return []
    return [f"--model.init_args.{change}" for change in SHRUNKEN]


def attention(
    layer: SelfAttention, x: Tensor, visible: Tensor | None, store: Tensor | None, place: Tensor | None
) -> Tensor:
    """(B, L, E) -> (B, L, E) with all scores (B, N, L, M), of which those not `visible` (L, M) are masked.

    With a store (2, B, N, M, d) keys and values are put into it at `place` (L,), and all of it is looked at.
    """
    q, k, v = rearrange(layer.qkv(x), "b l (three n d) -> three b n l d", three=3, n=layer.num_heads)
    if store is not None:
        k, v = store.index_copy_(3, place, torch.stack([k, v]).to(store.dtype))
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = F.dropout(scores.softmax(-1), layer.attn_dropout, training=layer.training)
    return layer.proj_dropout(layer.proj(rearrange(weights.to(v.dtype) @ v, "b n l d -> b l (n d)")))


def block(
    layer: GIVTBlock,
    x: Tensor,
    visible: Tensor | None = None,
    store: Tensor | None = None,
    place: Tensor | None = None,
) -> Tensor:
    """One block, its parts in turn."""
    x = x + attention(layer.attn, layer.norm1(x), visible, store, place)
    return x + layer.mlp(layer.norm3(x))


class PlainGIVT(nn.Module):
    """The trunk, plainly. `compile_blocks` compiles block by block."""

    def __init__(self, net: GIVT, *, compile_blocks: bool = False) -> None:
        super().__init__()
        self.net = net
        self.block = torch.compile(block) if compile_blocks else block

    def forward(self, x: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """As GIVT.forward: h (B, L, E)."""
        net = self.net
        h = self.embed(x[:, :-1] if net.config.causal else x, labels, mask)
        visible = None
        if net.config.causal:
            visible = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool, device=h.device).tril()
        for layer in net.blocks:
            h = self.run(layer, h, visible)
        h = net.norm(h)
        return h if net.config.causal else h[:, 1:]

    def run(self, layer: GIVTBlock, h: Tensor, visible: Tensor | None) -> Tensor:
        if self.net.config.grad_checkpointing and self.net.training:
            return checkpoint(self.block, layer, h, visible, use_reentrant=False)
        return self.block(layer, h, visible)

    def embed(self, x: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The label and l tokens x (B, l, D), with positions: (B, 1 + l, E)."""
        tokens = self.net.token_embed(x)
        if mask is not None:
            tokens = self.masked(tokens, mask[..., None])
        h = torch.cat([self.net.label_embed(labels)[:, None], tokens], dim=1)
        return h + self.net.pos_embed[:, : h.shape[1]]

    def masked(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Embedded tokens (B, L, E), with the table's rows for masked ones; "concat" takes the even channels of two."""
        special = self.net.config.special_rows
        first = self.net.label_embed.embedding_table.weight[self.net.num_classes :]
        rows = dict(zip(special, first[: len(special)], strict=True))
        if self.net.config.mask_style == "replace":
            return torch.where(mask, rows["mask"], tokens)
        flag = torch.where(mask, rows["mask"], rows["nomask"])
        tokens = torch.where(mask, rows["replace"], tokens)
        return torch.cat([flag[..., ::2], tokens[..., ::2]], dim=-1)

    def stores(self, batch: int) -> list[Tensor]:
        """An empty store for each block."""
        config, device = self.net.config, self.net.pos_embed.device
        shape = (2, batch, config.num_heads, self.net.seq_len, config.width // config.num_heads)
        return [torch.zeros(shape, dtype=compute_dtype(device), device=device) for _ in self.net.blocks]

    def step(self, h: Tensor, place: int, stores: list[Tensor]) -> Tensor:
        """An embedded label or token (B, E) at its place -> what follows from it, (B, E)."""
        h = (h + self.net.pos_embed[0, place])[:, None]
        at = torch.tensor([place], device=h.device)
        visible = torch.arange(self.net.seq_len, device=h.device) <= at
        for layer, store in zip(self.net.blocks, stores, strict=True):
            h = self.block(layer, h, visible, store, at)
        return self.net.norm(h)[:, 0]


class Filled(NamedTuple):
    """Tokens (B, L, D), and of each iteration which were unknown (B, L) and all tokens' mixtures in each branch."""

    tokens: Tensor
    unknown: list[Tensor]
    kept: list[list[Mixture]]


class Reference:
    """Training step, sampler and parts of one module, plainly. Raises ValueError for what is not done plainly here."""

    def __init__(self, module: GIVTModule, *, compile_blocks: bool = False) -> None:
        if module.head.kind == "full":
            raise ValueError("the plain path has no head.kind=full: use diagonal or per_channel")
        self.module, self.length = module, module.net.seq_len
        self.net = PlainGIVT(module.net, compile_blocks=compile_blocks)

    # Training

    def loss(self, batch: Batch) -> Tensor:
        """Scalar loss with draws of its own."""
        module, x = self.module, self.module.tokens(batch, None).x
        labels = module.dropped(batch["label"], torch.rand(len(x), device=x.device))
        if module.causal:
            return self.likelihood_loss(x, labels)
        settings = {"min_rate": module.objective.mask_rate_min, "schedule": module.objective.mask_schedule}
        u, keys = torch.rand(len(x), device=x.device), torch.rand(x.shape[:2], device=x.device)
        return self.likelihood_loss(x, labels, random_masks(u, keys, **settings))

    def likelihood_loss(self, x: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean over the masked tokens of the batch (B, L), or all; per channel where the mixtures are."""
        if self.module.adapter:
            x, _ = self.module.adapter(x)
        nll = -self.module.head.log_prob(self.net(x, labels, mask), x)
        if self.module.head.kind == "per_channel":
            nll = nll / x.shape[-1]
        return nll.mean() if mask is None else (nll * mask).sum() / mask.sum()

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW with its default kernels."""
        return torch.optim.AdamW(list(parameters), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)

    # Sampling

    @torch.no_grad()
    def sample(self, labels: Tensor, sampling: GIVTSampling) -> Tensor:
        """Tokens (B, L, D) for labels, with draws of its own."""
        if sampling.beams or sampling.top_p is not None or sampling.clip_sigmas is not None:
            raise ValueError(
                "the plain path has neither beams nor truncated mixtures: set sampling.num_beams and num_fans to 1, "
                "top_p and clip_sigmas to null"
            )
        draws, adapter = Draws(labels.device), self.module.adapter
        x = self.generate(labels, sampling, draws) if self.module.causal else self.fill(labels, sampling, draws).tokens
        return adapter.inverse(x) if adapter else x

    def generate(self, labels: Tensor, sampling: GIVTSampling, draws: Draws) -> Tensor:
        """Causal: (B, L, D), given draws; the token of the last step is one too many."""
        branches = self.module.branches(labels, sampling).split(len(labels))
        stores = [self.net.stores(len(labels)) for _ in branches]
        h = [self.net.step(self.net.net.label_embed(y), 0, own) for y, own in zip(branches, stores, strict=True)]
        tokens = [self.draw(h, sampling, draws)[0]]
        for j in range(1, self.length + 1):
            token, place = self.net.net.token_embed(tokens[-1]), min(j, self.length - 1)
            h = [self.net.step(token, place, own) for own in stores]
            tokens.append(self.draw(h, sampling, draws)[0])
        return torch.stack(tokens[:-1], dim=1)

    def fill(self, labels: Tensor, sampling: GIVTSampling, draws: Draws) -> Filled:
        """Bidirectional, given draws."""
        branches = self.module.branches(labels, sampling).split(len(labels))
        x = torch.zeros(len(labels), self.length, self.module.tokenizer.token_dim, device=labels.device)
        unknown, masks, kept = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), [], []
        counts = official_counts(self.length, sampling.num_iter, sampling.schedule)
        temperatures = choice_temperatures(sampling.choice_temperature, sampling.num_iter, anneal=sampling.anneal)
        for count, temperature in zip(counts, temperatures, strict=True):
            mixtures = self.mixtures([self.net(x, y, unknown).flatten(0, 1) for y in branches], sampling)
            masks, kept = [*masks, unknown], [*kept, mixtures]
            tokens, log_prob = draw(mixtures, sampling.cfg_scale - 1, draws)
            tokens = torch.where(unknown[..., None], tokens.view(x.shape), x)
            sure = torch.where(unknown, log_prob.view(x.shape[:2]), torch.inf)
            order = (sure + temperature * draws.gumbel(*sure.shape)).argsort(dim=1, stable=True)
            unknown = torch.zeros_like(unknown).scatter(1, order[:, :count], True)
            x = torch.where(unknown[..., None], 0, tokens)
        return Filled(x, masks, kept)

    def draw(self, h: list[Tensor], sampling: GIVTSampling, draws: Draws) -> tuple[Tensor, Tensor]:
        return draw(self.mixtures(h, sampling), sampling.cfg_scale - 1, draws)

    def mixtures(self, h: list[Tensor], sampling: GIVTSampling) -> list[Mixture]:
        """Whole mixtures of each branch's rows (R, E), under the temperatures."""
        temperatures = {"temperature": sampling.temperature, "inv_temperature": sampling.inv_temperature}
        return [self.module.head.distribution(rows).tempered(**temperatures) for rows in h]

    # Parts

    def parts(self, batch: int) -> Iterator[Part]:
        """Decoding `batch` images with a cache and without, where there is one; then what mixture heads do."""
        if self.module.causal:
            labels = torch.arange(batch, device=self.module.device) % self.module.num_classes
            yield self.cache_part(labels, self.module.sampling)
        yield from head_parts(HEADS[self.module.device.type], self.module.device.type)

    def cache_part(self, labels: Tensor, sampling: GIVTSampling) -> Part:
        def ours() -> Tensor:
            with torch.no_grad():
                return self.module.generate(labels, sampling)

        return Part(f"decoding with a cache, {len(labels)} images", lambda: self.uncached(labels, sampling), ours)

    @torch.no_grad()
    def uncached(self, labels: Tensor, sampling: GIVTSampling, generator: Generators = None) -> Tensor:
        """As `GIVTModule.generate`, blocks and draws included, but each token runs the network on all before it."""
        module = self.module
        rows, noise = module.branches(labels, sampling), module.noise_source(len(labels), sampling, generator)
        x = torch.zeros(len(labels), 0, module.tokenizer.token_dim, device=labels.device)
        for _ in range(self.length):
            h = self.net.embed(for_branches(x, rows), rows)
            for layer in module.net.blocks:
                h = layer(h)
            last = module.net.norm(h[:, -1])
            token = module.head.sample(**module._draw_arguments(last, noise(1), sampling))
            x = torch.cat([x, token[:, None]], dim=1)
        return x

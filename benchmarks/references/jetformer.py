"""JetFormer the plain way, as the official code runs it: what `make bench` compares with, the oracle of the fast path.

It uses the same parameters as the module. The flow's permutations are products with one-hot matrices, there and back,
and couplings are computed again in the backward pass. Attention has all scores in memory, and the likelihood the
mixtures of all tokens, whole. Decoding attends to stores of full length at every step and computes every component in
both branches, which guidance meets with 1000 proposals per number. For the head see gmm.py.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import Sizes
from benchmarks.parts import Part
from benchmarks.references.gmm import HEADS, Draws, draw, head_parts, memory_part
from layers.flows.factored import Latents
from layers.flows.jet import ChannelCoupling, Jet, normal_nats
from layers.gemma import GemmaBlock, MultiQueryAttention
from layers.guidance import for_branches
from layers.networks.jetformer import Hidden, JetFormerDecoder
from layers.precision import compute_dtype, without_autocast
from layers.random import Generators, randn
from layers.rope import rotary_table, rotate_halves
from layers.text.batches import label_batch
from layers.text_image import Inputs, attention_mask, output_places
from lightning_modules.base import Batch
from lightning_modules.jetformer import JetFormerModule, JetFormerSampling

CPU = Sizes(train_batch=4, sample_batch=(4,))
CUDA = Sizes(train_batch=16, sample_batch=(32, 1, 256))

# An eighth of the 350M model in every size of decoder, flow and head; tokens, their 768 numbers and their order stay
SHRUNKEN = (
    *("net.width=128", "net.depth=3", "net.num_heads=2", "net.mlp_hidden=512", "head.num_mixtures=128"),
    *("head.dtype=float32", "flow.depth=4", "flow.block_depth=1", "flow.width=64", "flow.num_heads=1", "factor.dim=16"),
)


def cpu_overrides(arguments: dict[str, Any]) -> list[str]:
    """How a recipe is shrunken for the host: none where it is small already."""
    if arguments["net"]["width"] <= 256:
        return []
    return [f"--model.init_args.{change}" for change in SHRUNKEN]


# Decoder


def attention(
    layer: MultiQueryAttention,
    x: Tensor,
    rope: Tensor,
    visible: Tensor,
    store: Tensor | None = None,
    place: Tensor | None = None,
) -> Tensor:
    """(B, L, E) -> (B, L, E) with all scores (B, N, L, M), of which those not `visible` (B or 1, L, M) are masked.

    With a store (2, B, K, M, d) keys and values are put into it at `place` (L,), and all of it is looked at.
    """
    heads = rearrange(layer.qkv(x), "b l (n d) -> b n l d", d=layer.head_dim)
    q, k, v = heads.split([layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], dim=1)
    q, k = rotate_halves(q, rope), rotate_halves(k, rope)
    if store is not None:
        k, v = store.index_copy_(3, place, torch.stack([k, v]).to(store.dtype))
    q = rearrange(q, "b (k g) l d -> b k g l d", k=layer.num_kv_heads)
    scores = einsum(q, k, "b k g l d, b k m d -> b k g l m").float() / math.sqrt(layer.head_dim)
    weights = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1).to(v.dtype)
    return layer.proj(rearrange(einsum(weights, v, "b k g l m, b k m d -> b k g l d"), "b k g l d -> b l (k g d)"))


def block(
    layer: GemmaBlock,
    x: Tensor,
    rope: Tensor,
    visible: Tensor,
    store: Tensor | None = None,
    place: Tensor | None = None,
) -> Tensor:
    """One block, its parts in turn."""
    x = x + layer.dropout(attention(layer.attn, layer.norm1(x), rope, visible, store, place))
    return x + layer.dropout(layer.mlp(layer.norm2(x)))


class PlainDecoder(nn.Module):
    """The decoder, plainly. `compile_blocks` compiles block by block."""

    def __init__(self, net: JetFormerDecoder, *, compile_blocks: bool = False) -> None:
        super().__init__()
        self.net = net
        self.block = torch.compile(block) if compile_blocks else block

    def forward(
        self, image: Tensor, texts: Batch, text_first: Tensor, *, masked: bool, dropped: Tensor | None
    ) -> Hidden:
        """As JetFormerDecoder.forward, of texts with their masks or without."""
        net, text = self.net, texts["text"]
        mask = texts["text_mask"] if masked else None
        inputs = net.embed(image, text, text_first, text_mask=mask, drop_prefix=dropped).without_last()
        x, rope, visible = inputs.x, rotary_table(inputs.positions(), net.config.head_dim), seen(inputs)
        for layer in net.blocks:
            x = self.run(layer, x, rope, visible)
        lengths = {"text_len": text.shape[1], "image_len": image.shape[1]}
        places = output_places(text_first, text_tables=net.config.text_tables, **lengths)
        rows = torch.arange(len(x), device=x.device)[:, None]
        return Hidden(*(net.norm(x)[rows, index] for index in places))

    def run(self, layer: GemmaBlock, x: Tensor, rope: Tensor, visible: Tensor) -> Tensor:
        if self.net.config.grad_checkpointing and self.net.training:
            return checkpoint(self.block, layer, x, rope, visible, use_reentrant=False)
        return self.block(layer, x, rope, visible)

    def stores(self, batch: int, length: int) -> list[Tensor]:
        """An empty store for each block."""
        config, device = self.net.config, self.net.norm.scale.device
        shape = (2, batch, config.num_kv_heads, length, config.head_dim)
        return [torch.zeros(shape, dtype=compute_dtype(device), device=device) for _ in self.net.blocks]

    def step(self, x: Tensor, start: int, stores: list[Tensor]) -> Tensor:
        """Embedded tokens (B, L, E) at places from `start` on -> what follows the last one, (B, E)."""
        place = torch.arange(start, start + x.shape[1], device=x.device)
        rope = rotary_table(place[None], self.net.config.head_dim)
        visible = (torch.arange(stores[0].shape[3], device=x.device) <= place[:, None])[None]
        for layer, store in zip(self.net.blocks, stores, strict=True):
            x = self.block(layer, x, rope, visible, store, place)
        return self.net.norm(x[:, -1])


def seen(inputs: Inputs) -> Tensor:
    """Who sees whom (B, L, L), also where that is nothing but the order."""
    valid = inputs.x.new_ones(inputs.x.shape[:2], dtype=torch.bool) if inputs.valid is None else inputs.valid
    return attention_mask(valid, inputs.prefix)


# Flow


class PlainFlow(nn.Module):
    """A flow of channel couplings, with one-hot matrices (C, C) for their permutations."""

    def __init__(self, jet: Jet) -> None:
        super().__init__()
        self.jet = jet
        eye = torch.eye(len(jet.couplings[0].channel_order), device=jet.couplings[0].channel_order.device)
        self.matrices = [eye[:, coupling.channel_order] for coupling in jet.couplings]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As Jet.forward."""
        logdet = x.new_zeros(len(x))
        for coupling, matrix in zip(self.jet.couplings, self.matrices, strict=True):
            if self.jet.config.backward == "plain" or not torch.is_grad_enabled():
                x, change = self.there(coupling, matrix, x)
            else:
                x, change = checkpoint(self.there, coupling, matrix, x, use_reentrant=False)
            logdet = logdet + change
        return x, logdet

    def there(self, coupling: ChannelCoupling, matrix: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = permuted(x, matrix).chunk(2, dim=-1)
        bias, raw = coupling.net(kept)
        scale, logdet = coupling.scale(raw)
        return permuted(torch.cat([kept, (moved + bias) * scale], dim=-1), matrix.T), logdet

    def inverse(self, y: Tensor) -> Tensor:
        """As the first of Jet.inverse."""
        for coupling, matrix in reversed(list(zip(self.jet.couplings, self.matrices, strict=True))):
            kept, moved = permuted(y, matrix).chunk(2, dim=-1)
            bias, raw = coupling.net(kept)
            y = permuted(torch.cat([kept, moved / coupling.scale(raw)[0] - bias], dim=-1), matrix.T)
        return y


def permuted(x: Tensor, matrix: Tensor) -> Tensor:
    """x (B, N, C) times (C, C), in float32 whatever autocast says: numbers only change their places."""
    with without_autocast(x.device):
        return x @ matrix


class Reference:
    """Training step, sampler and parts of one module, plainly. Raises ValueError for what is not done plainly here."""

    def __init__(self, module: JetFormerModule, *, compile_blocks: bool = False) -> None:
        if module.front.linear is not None or not all(
            isinstance(c, ChannelCoupling) for c in module.front.jet.couplings
        ):
            raise ValueError("the plain path has channel couplings alone: set factor.split=flow, flow.kinds=[channels]")
        self.module, self.length = module, module.tokenizer.seq_len
        self.net = PlainDecoder(module.net, compile_blocks=compile_blocks)
        self.flow = PlainFlow(module.front.jet)

    # Training

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        """Scalar loss with draws of its own."""
        module, batch = self.module, self.module.with_text(batch)
        levels = module.tokenizer.encode_image(batch["image"])
        draws = module.draw(levels.shape, generator)
        tokens = module.tokens_of(levels, draws)
        z, logdet = self.flow(tokens.x)
        soft, rest = z.split([module.front.dim, z.shape[-1] - module.front.dim], dim=-1)
        latents = Latents(module.noised(soft, draws), rest, logdet)
        places = {"masked": module.ignore_pad, "dropped": module.dropped(draws)}
        h = self.net(latents.soft, batch, draws.text_first, **places)
        bits = module.bits(self.image_nats(h.image, latents), tokens)
        return module.combined(bits, module.text_nats(h.text, batch).per_word(), draws)

    def image_nats(self, h: Tensor, latents: Latents) -> Tensor:
        """As JetFormerModule's, (B,), with all parameters of all tokens' mixtures at once."""
        nll = -self.module.head.log_prob(h, latents.soft)
        return nll.sum(1) + normal_nats(latents.rest) - latents.logdet

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW with its default kernels."""
        return torch.optim.AdamW(list(parameters), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)

    # Sampling

    @torch.no_grad()
    def sample(self, labels: Tensor, sampling: JetFormerSampling) -> Tensor:
        """Tokens (B, L, C) for labels, with draws of its own."""
        draws = Draws(labels.device)
        soft = self.soft_tokens(self.texts(labels, sampling), sampling, draws)
        rest = draws.normal(*soft.shape[:2], self.module.tokenizer.token_dim - soft.shape[2])
        return self.flow.inverse(torch.cat([soft, rest], dim=-1))

    def texts(self, labels: Tensor, sampling: JetFormerSampling) -> Tensor:
        """Ids (B, T) of labels, or of the prompts that they stand for. Raises ValueError for prompts with padding."""
        if self.module.text is None:
            return label_batch(labels)["text"]
        if self.module.ignore_pad:
            raise ValueError("the plain path decodes prompts of one length: set ignore_pad=false")
        prompts = self.module.encode_text(sampling.prompts or [""])["text"]
        return prompts[labels % len(prompts)]

    def soft_tokens(self, text: Tensor, sampling: JetFormerSampling, draws: Draws) -> Tensor:
        """(B, N, D), given draws; both branches of an image are neighbours in the batch."""
        net, branches = self.net.net, 2 if sampling.cfg_scale != 1 else 1
        nothing = torch.arange(len(text) * branches, device=text.device) % branches == 1
        prompt = net.image_prompt(text.repeat_interleave(branches, 0), drop_prefix=nothing).x
        stores = self.net.stores(len(prompt), prompt.shape[1] + self.length - 1)
        h, tokens = self.net.step(prompt, 0, stores), []
        for place in range(prompt.shape[1], prompt.shape[1] + self.length):
            tokens.append(self.draw([h[i::branches] for i in range(branches)], sampling, draws))
            if len(tokens) < self.length:
                x = net.image_embed(tokens[-1].repeat_interleave(branches, 0))
                h = self.net.step(x[:, None], place, stores)
        return torch.stack(tokens, dim=1)

    def draw(self, h: Sequence[Tensor], sampling: JetFormerSampling, draws: Draws) -> Tensor:
        """Tokens (B, D) from each branch's rows (B, E)."""
        temperatures = {"temperature": sampling.temperature, "inv_temperature": sampling.inv_temperature}
        mixtures = [self.module.head.distribution(rows).tempered(**temperatures) for rows in h]
        return draw(mixtures, sampling.cfg_scale - 1, draws)[0]

    # Parts

    def parts(self, batch: int) -> Iterator[Part]:
        """Decoding `batch` images with a cache and without, the flow with its gradients, and what mixture heads do."""
        device = self.module.device
        text = self.texts(torch.arange(batch, device=device) % self.module.num_classes, self.module.sampling)
        yield self.cache_part(text, self.module.sampling)
        yield self.flow_part(torch.randn(batch, self.length, self.module.tokenizer.token_dim, device=device))
        yield from head_parts(HEADS[device.type][-1:], device.type)  # JetFormer's
        yield memory_part(device.type)

    def cache_part(self, text: Tensor, sampling: JetFormerSampling) -> Part:
        def ours() -> Tensor:
            with torch.no_grad():
                return self.module.soft_tokens({"text": text}, sampling)

        return Part(f"decoding with a cache, {len(text)} images", lambda: self.uncached(text, sampling), ours)

    @torch.no_grad()
    def uncached(self, text: Tensor, sampling: JetFormerSampling, generator: Generators = None) -> Tensor:
        """As `JetFormerModule.soft_tokens`, blocks and draws included, but each token runs all before it anew."""
        module, size, guided = self.module, len(text), sampling.cfg_scale != 1
        nothing = torch.arange(size * (1 + guided), device=text.device) >= size
        every, x = torch.ones_like(nothing), torch.zeros(size, 0, module.front.dim, device=text.device)
        count, dim = module.head.noise_shape(1, sampling.guidance if guided else "closed_form")
        settings = {"temperature": sampling.temperature, "inv_temperature": sampling.inv_temperature}
        for _ in range(self.length):
            inputs = module.net.embed(for_branches(x, nothing), for_branches(text, nothing), every, drop_prefix=nothing)
            cond, *uncond = module.net.hidden(inputs)[:, -1].split(size)
            if guided:
                settings |= {"uncond": uncond[0], "cfg_scale": sampling.cfg_scale, "solver": sampling.guidance}
            noise = randn((size, count, dim), generator, device=text.device).transpose(0, 1)
            x = torch.cat([x, module.head.sample(cond, noise, **settings)[:, None]], dim=1)
        return x

    def flow_part(self, x: Tensor) -> Part:
        """Its likelihood's gradients, by matrices and by indices; with the backward pass of the recipe."""

        def gradients(flow: nn.Module) -> tuple[Tensor, ...]:
            z, logdet = flow(x)
            return torch.autograd.grad((normal_nats(z) - logdet).sum(), list(flow.parameters()))

        return Part(
            f"flow's gradients, {len(x)} images", lambda: gradients(self.flow), lambda: gradients(self.flow.jet)
        )

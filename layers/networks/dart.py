"""The Transformer of DART (Gu et al., arXiv 2410.08159): all noisy copies of an image in one sequence, noisiest first.

LLaMA-like blocks: RMSNorm, rotary positions over step, row and column, per-head RMSNorm on queries and keys, SwiGLU, no
biases. Unusual: attention is full inside a copy and causal between copies, computed copy by copy against its prefix, so
there is no mask and the cache of a sampler is exact; DART-AR is causal token by token. A class modulates norms (adaLN),
one vector per image; a text is a prefix of tokens. No official code: what is ours is called so.
In: tokens (B, L, D). Out: h (B, L, E), and `linear` makes velocities of it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers.checks import check_positive
from layers.embed import LabelEmbedder
from layers.init import TRUNCATED_STD, lecun_normal_
from layers.kv_cache import KVCache
from layers.mlp import SwiGLU
from layers.norm import RMSNorm
from layers.precision import compute_dtype
from layers.rope_axes import axes_table, rotate_axes

INIT_STD = 0.02
AXES = (4, 6, 6)  # sixteenths of a head's channels for step, row and column: 16, 24 and 24 of 64
HIDDEN_MULTIPLE = 256  # the default width of the SwiGLU is rounded up to it


@dataclass
class DARTConfig:
    """Sizes of the network; the defaults are DART-B."""

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_hidden: int | None = None  # null: 8/3 of the width, rounded up to a multiple of 256 (ours)
    step_embed: bool = False  # a learned vector per step joins the class vector; else rotary positions tell the step
    grad_checkpointing: bool = False  # recompute blocks in the backward pass

    def __post_init__(self) -> None:
        check_positive("net", self, "width", "depth", "num_heads", "mlp_hidden")
        if self.width % self.num_heads or self.width // self.num_heads % sum(AXES):
            raise ValueError(
                f"net.width {self.width} in net.num_heads {self.num_heads} heads: each must have a multiple of "
                f"{sum(AXES)} channels, which step, row and column share {AXES[0]}:{AXES[1]}:{AXES[2]}"
            )

    @property
    def hidden(self) -> int:
        """Width of the SwiGLU."""
        return self.mlp_hidden or math.ceil(8 * self.width / 3 / HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE


class Stage(NamedTuple):
    """Copies of an image of one resolution: how many, and the token grid of each."""

    num_steps: int
    grid: tuple[int, int]

    @property
    def block(self) -> int:
        """Tokens of a copy."""
        return self.grid[0] * self.grid[1]


class Layout(NamedTuple):
    """Who sees whom in a sequence: a prefix that sees itself, then blocks of so many tokens.

    A block sees itself and all before it; `causal`, its tokens see no later one of it either.
    """

    blocks: tuple[int, ...]
    prefix: int = 0
    causal: bool = False


class Condition(NamedTuple):
    """What images are conditioned on, made once for all steps; one of the two."""

    vectors: Tensor | None = None  # of a class: modulations (B, 1 or T, 6 depth + 2, E)
    prefix: Tensor | None = None  # of a text: tokens (B, P, E)


class FeedForward(SwiGLU):
    """SwiGLU without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden)
        self.w12 = nn.Linear(width, 2 * hidden, bias=False)
        self.w3 = nn.Linear(hidden, width, bias=False)


class BareRMSNorm(nn.Module):
    """x / rms(x) over the last axis, for adaLN, which has a weight of its own. float32 island."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D), same dtype."""
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """softmax(q k' / sqrt(d)) v for q (B, N, L, d) that stand at the end of k and v (B, N, S, d) -> (B, N, L, d).

    One dense call per block: 53 % of the square's work at 16 blocks, and no mask of 4,096 x 4,096.
    """
    if layout.causal and q.shape[2] > 1:
        return _attend_causally(q, k, v, layout.prefix)
    lengths, parts = [length for length in (layout.prefix, *layout.blocks) if length], []
    for rows in reversed(q.split(lengths, dim=2)):
        parts.append(F.scaled_dot_product_attention(rows, k, v))
        # a prefix of the prefix, not of the whole: its gradient is only as long
        k, v = (t[:, :, : t.shape[2] - rows.shape[2]] for t in (k, v))
    return torch.cat(parts[::-1], dim=2) if len(parts) > 1 else parts[0]


def _attend_causally(q: Tensor, k: Tensor, v: Tensor, prefix: int) -> Tensor:
    """Token by token, but for the first `prefix` rows, which see each other."""
    offset = k.shape[2] - q.shape[2]
    if offset:  # a few tokens behind a cache: SDPA's own causal form begins at the first key
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(offset)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if not prefix:
        return out
    own = F.scaled_dot_product_attention(*(t[:, :, :prefix] for t in (q, k, v)))
    return torch.cat([own, out[:, :, prefix:]], dim=2)


class DARTAttention(nn.Module):
    """Self-attention with q/k RMSNorm over the head dim and rotary positions on three axes; no biases."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        head_dim = width // num_heads
        self.num_heads, self.slices = num_heads, axis_widths(head_dim)
        self.q_norm, self.k_norm = RMSNorm(head_dim), RMSNorm(head_dim)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rope: Tensor, layout: Layout, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """x (B, L, E), rope (2, L, d) -> (B, L, E). With a cache x stands behind what the layer stored there."""
        q, k, v = rearrange(self.qkv(x), "b l (three n d) -> three b n l d", three=3, n=self.num_heads)
        q, k = (rotate_axes(norm(y), rope, self.slices) for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        return self.proj(rearrange(attend(q, k, v, layout), "b n l d -> b l (n d)"))


class DARTBlock(nn.Module):
    """Pre-norm attention and SwiGLU; `modulated`: the norms have no weights, six vectors of the condition have them."""

    def __init__(self, width: int, num_heads: int, *, mlp_hidden: int, modulated: bool) -> None:
        super().__init__()
        self.norm1 = BareRMSNorm() if modulated else RMSNorm(width)
        self.attn = DARTAttention(width, num_heads)
        self.norm2 = BareRMSNorm() if modulated else RMSNorm(width)
        self.mlp = FeedForward(width, mlp_hidden)

    def forward(
        self,
        x: Tensor,
        vectors: Tensor | None,
        rope: Tensor,
        layout: Layout,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """x (B, L, E), vectors (B, 1 or T, 6, E) -> (B, L, E): shift, scale, gate of attention, then of the MLP."""
        if vectors is None:
            x = x + self.attn(self.norm1(x), rope, layout, cache, layer)
            return x + self.mlp(self.norm2(x))
        shift1, scale1, gate1, shift2, scale2, gate2 = (per_token(y, x) for y in vectors.unbind(2))
        normed = torch.addcmul(shift1, self.norm1(x), 1 + scale1)
        x = x + gate1 * self.attn(normed, rope, layout, cache, layer)
        return x + gate2 * self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2))


class DART(nn.Module):
    """Tokens (B, L, D) of all copies -> h (B, L, E). L is the sum over stages of steps times tokens per copy.

    num_classes: condition on classes; or text_dim and text_len: on features of texts.  stages: one, or with a second
    the copies of twice the resolution that follow (Matryoshka).  causal: DART-AR, whose sequence goes on with x_0 but
    for its last token, and whose h (B, T K, E) are those of the tokens before the predicted ones.
    """

    def __init__(
        self,
        config: DARTConfig,
        *,
        stages: list[Stage],
        token_dim: int,
        num_classes: int | None = None,
        text_dim: int = 0,
        text_len: int = 0,
        causal: bool = False,
    ) -> None:
        super().__init__()
        width, depth = config.width, config.depth
        modulated = num_classes is not None
        self.config, self.stages, self.causal, self.num_prefix = config, stages, causal, 0 if modulated else text_len
        self.x_embedder = nn.Linear(token_dim, width)
        if len(stages) > 1:
            self.hires_embed = nn.Parameter(torch.empty(width))
        if modulated:
            self.y_embedder = LabelEmbedder(num_classes, width)
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (6 * depth + 2) * width))
        else:
            self.text_proj = nn.Linear(text_dim, width)
            self.no_text = nn.Parameter(torch.empty(width))
        if config.step_embed:
            self.step_embed = nn.Parameter(torch.empty(stages[0].num_steps, width))
        sizes = {"mlp_hidden": config.hidden, "modulated": modulated}
        self.blocks = nn.ModuleList(DARTBlock(width, config.num_heads, **sizes) for _ in range(depth))
        self.norm = BareRMSNorm() if modulated else RMSNorm(width)
        self.linear = nn.Linear(width, token_dim)
        rope = axes_table(self._coordinates(), axis_widths(width // config.num_heads))
        self.register_buffer("rope", rope, persistent=False)  # (2, P + L, d)
        self.init_weights()

    def _coordinates(self) -> Tensor:
        """Step, row and column of the prefix, all 0, and of every token: (P + L, 3)."""
        first = self.stages[0]
        parts = [torch.zeros(self.num_prefix, 3), places(range(first.num_steps + self.causal), first.grid)]
        if len(self.stages) > 1:
            steps = range(first.num_steps, first.num_steps + self.stages[1].num_steps)
            parts.append(places(steps, self.stages[1].grid, zoom=2))
        coordinates = torch.cat(parts)
        return coordinates[:-1] if self.causal else coordinates

    @torch.no_grad()
    def init_weights(self) -> None:
        """Truncated normal of 0.02; zero where velocities, modulations and the second resolution come from (ours)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                truncated_normal_(module.weight)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        zero = {"linear.weight", "adaLN_modulation.1.weight", "hires_embed", "step_embed"}
        for name, param in self.named_parameters():
            if name in zero:
                nn.init.zeros_(param)
            elif name == "no_text":
                nn.init.normal_(param, std=INIT_STD)

    # Conditions

    def of_classes(self, labels: Tensor) -> Condition:
        """Modulations of every block in one product: labels (B,), num_classes = none."""
        c = self.y_embedder(labels)[:, None]  # (B, 1, E)
        if self.config.step_embed:
            c = c + self.step_embed  # (B, T, E)
        vectors = self.adaLN_modulation(c)
        return Condition(vectors=vectors.unflatten(-1, (-1, self.config.width)))

    def of_texts(self, features: Tensor, mask: Tensor) -> Condition:
        """Prefix tokens from features (B, P, F); where mask (B, P) is False, one learned vector for "no word"."""
        tokens = self.text_proj(features)
        return Condition(prefix=torch.where(mask[..., None], tokens, self.no_text.to(tokens.dtype)))

    # The whole sequence, in training

    @property
    def layout(self) -> Layout:
        """Blocks of a whole sequence."""
        blocks = [stage.block for stage in self.stages for _ in range(stage.num_steps)]
        if self.causal:
            blocks.append(self.stages[0].block - 1)
        return Layout(tuple(blocks), self.num_prefix, self.causal)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """x (B, L, D) -> h (B, L, E); causal: x with K - 1 tokens more, the beginning of x_0 -> h (B, T K, E)."""
        h = self._embed(x, 0)
        if condition.prefix is not None:
            h = torch.cat([condition.prefix, h], dim=1)
        for i, block in enumerate(self.blocks):
            h = self._run(block, h, self._vectors(condition, i), self.rope, self.layout)
        first = self.stages[0].block - 1 if self.causal else 0
        return self._finish(h[:, self.num_prefix + first :], condition.vectors)

    def _run(self, block: DARTBlock, *arguments: object) -> Tensor:
        if self.config.grad_checkpointing and self.training:
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def _embed(self, x: Tensor, start: int) -> Tensor:
        """Tokens (B, L, D) that begin at number `start` of the image's -> (B, L, E)."""
        h = self.x_embedder(x)
        if len(self.stages) == 1:
            return h
        first = self.stages[0]
        fine = torch.arange(start, start + x.shape[1], device=x.device) >= first.num_steps * first.block
        return h + fine[:, None] * self.hires_embed.to(h.dtype)

    def _vectors(self, condition: Condition, layer: int) -> Tensor | None:
        return None if condition.vectors is None else condition.vectors[:, :, 6 * layer : 6 * layer + 6]

    def _finish(self, h: Tensor, vectors: Tensor | None) -> Tensor:
        """The last norm: (B, L, E) -> (B, L, E)."""
        if vectors is None:
            return self.norm(h)
        shift, scale = (per_token(y, h) for y in vectors[:, :, -2:].unbind(2))
        return torch.addcmul(shift, self.norm(h), 1 + scale)

    # Piece by piece, with a cache

    def init_cache(self, batch: int, device: torch.device | str) -> KVCache:
        """An empty cache for `batch` whole sequences."""
        heads, length = self.config.num_heads, self.rope.shape[1]
        sizes = {"num_heads": heads, "head_dim": self.config.width // heads, "length": length}
        return KVCache(self.config.depth, batch, **sizes, dtype=compute_dtype(device), device=device)

    def begin(self, prefix: Tensor, cache: KVCache) -> None:
        """A text's tokens (B, P, E) enter the empty cache."""
        self._extend(prefix, None, Layout((), self.num_prefix), cache)

    def extend(self, x: Tensor, vectors: Tensor | None, cache: KVCache) -> Tensor:
        """h (B, L, E) of the tokens that come next, x (B, L, D): a copy, or of a causal network any number."""
        start = cache.filled - self.num_prefix
        if vectors is not None and vectors.shape[1] > 1:  # a vector per step
            step = start // self.stages[0].block
            vectors = vectors[:, step : step + 1]
        h = self._extend(self._embed(x, start), vectors, Layout((x.shape[1],), causal=self.causal), cache)
        return self._finish(h, vectors)

    def _extend(self, h: Tensor, vectors: Tensor | None, layout: Layout, cache: KVCache) -> Tensor:
        rope = self.rope[:, cache.filled : cache.filled + h.shape[1]]
        for i, block in enumerate(self.blocks):
            # not as compiled for training: the length of what is seen differs from step to step
            h = block.forward(h, self._vectors(Condition(vectors), i), rope, layout, cache, i)
        cache.advance(h.shape[1])
        return h


def axis_widths(head_dim: int) -> list[int]:
    """Channels of a head that turn with step, row and column."""
    return [head_dim * share // sum(AXES) for share in AXES]


def places(steps: range, grid: tuple[int, int], *, zoom: int = 1) -> Tensor:
    """Step, row and column of copies in raster order: (len(steps) h w, 3), float32.

    zoom: the grid is so many times finer than the first stage's, in whose units its tokens lie at fractions, so that a
    token finds the coarse one that it is a part of at the same distance everywhere (ours).
    """
    rows, columns = ((torch.arange(side) + 0.5) / zoom - 0.5 for side in grid)
    return torch.cartesian_prod(torch.tensor(steps, dtype=torch.float32), rows, columns)


def per_token(vectors: Tensor, x: Tensor) -> Tensor:
    """Vectors (B, T, E) of T copies, for each token of x (B, L, E); a single one (B, 1, E) stays as it is."""
    return vectors if vectors.shape[1] == 1 else vectors.repeat_interleave(x.shape[1] // vectors.shape[1], dim=1)


def truncated_normal_(weight: Tensor) -> Tensor:
    """A normal distribution of `INIT_STD`, truncated at two of it."""
    return lecun_normal_(weight).mul_(INIT_STD * math.sqrt(weight[0].numel()) * TRUNCATED_STD)

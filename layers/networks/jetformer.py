"""The decoder of JetFormer (Tschannen et al., arXiv 2411.19722; official `models/proj/jetformer/jetformer.py`).

One causal Transformer of Gemma's blocks over text ids and soft tokens, in either order: `BOS, text, BOI, image` or
`BOI, image, BOS, text`, mixed within a batch. Unusual: soft tokens are projected and nothing else, text that is masked
is nowhere seen and takes no position, and a class is a text of one id in 16 tables. In: image tokens (B, N, D), text
ids (B, T). Out: the vectors (B, N, E) and (B, T, E) from which each token is predicted; the heads are the caller's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers.checkpoint import Rule
from layers.checks import check_positive
from layers.flax_layout import State, linear_rules, stack, unstack
from layers.gather import take
from layers.gemma import GemmaBlock, block_rules
from layers.init import lecun_normal_
from layers.kv_cache import KVCache
from layers.norm import OffsetRMSNorm
from layers.precision import compute_dtype
from layers.rope import rotary_table
from layers.text.batches import SpecialIds
from layers.text_image import Inputs, input_order, output_places, right_aligned


@dataclass
class DecoderConfig:
    """Sizes and text; the defaults are the 350M class-conditional model's. Official `jetformer_imagenet2012.py`."""

    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    num_kv_heads: int = 1
    head_dim: int = 64
    mlp_hidden: int = 4096
    dropout: float = 0.1  # on what attention and MLP add to the residual stream
    text_tables: int = 16  # a text is read that many times, each time by a table of its own; official num_vocab_repeats
    text_head: Literal["tied", "untied"] = "tied"  # tied: logits are products with the rows of all tables
    causal_prefix: bool = True  # False: places of the prefix see each other; off in all published configurations
    grad_checkpointing: bool = False  # recompute blocks in the backward pass

    def __post_init__(self) -> None:
        check_positive("net", self, "width", "depth", "num_heads", "num_kv_heads", "head_dim", "mlp_hidden")
        check_positive("net", self, "text_tables")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"net.dropout is {self.dropout}: it is the share that is dropped, 0 to below 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"net.num_heads {self.num_heads} is not divisible by net.num_kv_heads {self.num_kv_heads}: as many "
                f"heads of queries must share each head of keys"
            )
        if self.head_dim % 2:
            raise ValueError(f"net.head_dim is {self.head_dim}: rotary positions turn pairs, so use an even number")
        if self.text_head == "untied" and self.text_tables > 1:
            raise ValueError(
                f"net.text_tables is {self.text_tables} with net.text_head=untied, whose logits are of one table: set "
                f"text_tables=1, or text_head=tied"
            )


class Hidden(NamedTuple):
    """What each token is predicted from: image (B, N, E), text (B, T, E)."""

    image: Tensor
    text: Tensor


class DecoderCache(NamedTuple):
    """Keys and values of sequences that end at one place; that of row b begins at begin[b] (B,), all at 0 if None."""

    own: KVCache
    begin: Tensor | None


class JetFormerDecoder(nn.Module):
    """Image tokens (B, N, D) and text ids (B, T) of a vocabulary -> vectors (B, N, E) and (B, T, E); any N and T."""

    def __init__(self, config: DecoderConfig, *, token_dim: int, vocab: SpecialIds) -> None:
        super().__init__()
        self.config, self.vocab = config, vocab
        self.text_embed = nn.Embedding(config.text_tables * vocab.size, config.width)
        self.image_embed = nn.Linear(token_dim, config.width)
        sizes = {"num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim, "mlp_hidden": config.mlp_hidden}
        self.blocks = nn.ModuleList(
            GemmaBlock(config.width, config.num_heads, **sizes, dropout=config.dropout) for _ in range(config.depth)
        )
        self.norm = OffsetRMSNorm(config.width)
        self.text_head = nn.Linear(config.width, vocab.size) if config.text_head == "untied" else None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Text tables and text head N(0, 1), linear maps LeCun, biases zero. Official `jetformer.py`, `gemma.py`."""
        nn.init.normal_(self.text_embed.weight)
        lecun_normal_(self.image_embed.weight)
        nn.init.zeros_(self.image_embed.bias)
        for block in self.blocks:
            block.init_weights()
        if self.text_head is not None:
            nn.init.normal_(self.text_head.weight)
            nn.init.zeros_(self.text_head.bias)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        text_first: Tensor,
        *,
        text_mask: Tensor | None = None,
        drop_prefix: Tensor | None = None,
    ) -> Hidden:
        """Teacher forcing: image (B, N, D), text (B, T), text_first (B,), bool, and see `embed`.

        BOI and BOS in the middle are predicted by nothing. Where text follows an image, masked ids are predicted too,
        from whatever stands there: leave them out of the loss.
        """
        inputs = self.embed(image, text, text_first, text_mask=text_mask, drop_prefix=drop_prefix)
        h = self.hidden(inputs.without_last())
        lengths = {"text_len": text.shape[1], "image_len": image.shape[1]}
        places = output_places(text_first, text_tables=self.config.text_tables, **lengths)
        return Hidden(*(take(h, index) for index in places))

    def embed(
        self,
        image: Tensor,
        text: Tensor,
        text_first: Tensor,
        *,
        text_mask: Tensor | None = None,
        drop_prefix: Tensor | None = None,
    ) -> Inputs:
        """BOS, text, BOI, image where text_first (B,), else BOI, image, BOS, text, whole; N or T may be 0.

        text_mask (B, T): which ids are there at all; without it all are, which spares the mask. drop_prefix (B,): text
        or image, whichever is first, becomes NOLABEL, and all of its places valid.
        """
        if drop_prefix is None:
            drop_prefix = torch.zeros_like(text_first)
        text_len, image_len = self.config.text_tables * text.shape[1], image.shape[1]
        order = input_order(text_first, text_len=text_len, image_len=image_len)
        pieces = [self._text(text, drop_prefix & text_first), self._image(image, drop_prefix & ~text_first)]
        valid, prefix = None, None
        if text_mask is not None:
            mask = (text_mask | (drop_prefix & text_first)[:, None]).repeat(1, self.config.text_tables)
            valid = torch.cat([mask.new_ones(len(mask), 2), mask, mask.new_ones(image.shape[:2])], dim=1)
            valid = valid.gather(1, order)
        if not self.config.causal_prefix:
            prefix = 1 + torch.where(text_first, text_len, image_len)
        return Inputs(take(torch.cat(pieces, dim=1), order), valid, prefix)

    def _text(self, text: Tensor, dropped: Tensor) -> Tensor:
        """BOS, BOI, and the ids by one table after the other: (B, T) -> (B, 2 + tables T, E)."""
        text = text.masked_fill(dropped[:, None], self.vocab.nolabel)
        offsets = torch.arange(self.config.text_tables, device=text.device) * self.vocab.size
        bos, boi = (text.new_full((len(text), 1), i) for i in (self.vocab.bos, self.vocab.boi))
        return self.text_embed(torch.cat([bos, boi, (text[:, None] + offsets[:, None]).flatten(1)], dim=1))

    def _image(self, image: Tensor, dropped: Tensor) -> Tensor:
        nolabel = self.text_embed(dropped.new_full((1,), self.vocab.nolabel, dtype=torch.int64))
        return torch.where(dropped[:, None, None], nolabel, self.image_embed(image))

    def hidden(self, inputs: Inputs) -> Tensor:
        """The last norm's output at every place (B, L, E)."""
        return self._run(inputs.x, inputs.positions(), inputs.mask())

    def text_logits(self, h: Tensor) -> Tensor:
        """h (..., E) -> (..., V); tied: of all tables' rows, ids being those of the first (official)."""
        return F.linear(h, self.text_embed.weight) if self.text_head is None else self.text_head(h)

    def _run(self, x: Tensor, positions: Tensor, mask: Tensor | None, cache: KVCache | None = None) -> Tensor:
        """All blocks and the last norm: x (B, L, E), positions (B or 1, L), mask (B, L, S)."""
        rope = rotary_table(positions, self.config.head_dim)
        mask = None if mask is None else mask[:, None]  # for all heads
        recompute = self.config.grad_checkpointing and self.training and cache is None
        for layer, block in enumerate(self.blocks):
            if recompute:
                x = checkpoint(block, x, rope, mask, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache, layer)
        return self.norm(x)

    # Decoding, one token at a time

    def image_prompt(
        self, text: Tensor, *, text_mask: Tensor | None = None, drop_prefix: Tensor | None = None
    ) -> Inputs:
        """BOS, text, BOI: what an image follows. text, text_mask (B, T), drop_prefix (B,) as in `embed`."""
        nothing = self.image_embed.weight.new_zeros(len(text), 0, self.image_embed.in_features)
        first = torch.ones(len(text), dtype=torch.bool, device=text.device)
        return self.embed(nothing, text, first, text_mask=text_mask, drop_prefix=drop_prefix)

    def text_prompt(self, image: Tensor, text: Tensor | None = None, *, text_mask: Tensor | None = None) -> Inputs:
        """BOI, image, BOS and the beginning of a text, if there is one: what text follows. image (B, N, D).

        Raises ValueError for such a beginning where texts are read by several tables, one after the other.
        """
        if text is None:
            text = torch.zeros(len(image), 0, dtype=torch.int64, device=image.device)
        elif self.config.text_tables > 1:
            raise ValueError(
                f"net.text_tables is {self.config.text_tables}: a text that is read so many times cannot go on behind "
                f"its last copy; leave the text out of the prompt"
            )
        first = torch.zeros(len(image), dtype=torch.bool, device=image.device)
        return self.embed(image, text, first, text_mask=text_mask)

    def prefill(self, prompt: Inputs, *, room: int) -> tuple[Tensor, DecoderCache]:
        """h (B, E) of the first token behind the prompt, and a cache that has room for that many tokens more.

        The last token of a sequence is no input, so an image of N tokens needs N - 1.
        """
        (batch, length), config = prompt.x.shape[:2], self.config
        sizes = {"num_heads": config.num_kv_heads, "length": length + room, "head_dim": config.head_dim}
        own = KVCache(config.depth, batch, **sizes, dtype=compute_dtype(prompt.x.device), device=prompt.x.device)
        mask, begin = prompt.mask(), None
        if prompt.valid is not None:
            begin = length - prompt.valid.sum(1)
            x, valid, mask = right_aligned(prompt.x, prompt.valid, mask)
            # places before the beginning see themselves: an empty row has no softmax, and nobody looks there
            mask = mask | torch.eye(length, dtype=torch.bool, device=x.device)
            prompt = prompt._replace(x=x, valid=valid)
        h = self._run(prompt.x, prompt.positions(), mask, own)
        own.advance(length)
        return h[:, -1], DecoderCache(own, begin)

    def step_image(self, token: Tensor, cache: DecoderCache) -> Tensor:
        """h (B, E) of what follows the image token (B, D)."""
        return self._step(self.image_embed(token), cache)

    def step_text(self, ids: Tensor, cache: DecoderCache) -> Tensor:
        """h (B, E) of what follows the ids (B,)."""
        return self._step(self.text_embed(ids), cache)

    def _step(self, x: Tensor, cache: DecoderCache) -> Tensor:
        """x (B, E) at the cache's end; it sees everything from its row's beginning on."""
        place, mask = cache.own.filled, None
        positions = torch.full((1, 1), place, device=x.device)
        if cache.begin is not None:
            positions = place - cache.begin[:, None]
            mask = (torch.arange(place + 1, device=x.device) >= cache.begin[:, None])[:, None]
        h = self._run(x[:, None], positions, mask, cache.own)
        cache.own.advance(1)
        return h[:, 0]


# Official checkpoints


def decoder_rules(config: DecoderConfig) -> list[Rule]:
    """Official names <-> those of a module whose `net` is a decoder and whose `head` has the linear map `linear`.

    For states that `unrolled` has been through; `stacked` goes back.
    """
    heads = config.num_heads
    return [
        Rule("EmbedText/embedding", "net.text_embed.weight"),
        *linear_rules("EmbedImage", "net.image_embed"),
        *linear_rules("LogitsText", "net.text_head"),
        *linear_rules("LogitsImage", "head.linear"),
        *block_rules("decoder/layers_*", "net.blocks.*", num_heads=heads, num_kv_heads=config.num_kv_heads),
        Rule("decoder/final_norm/scale", "net.norm.scale"),
    ]


def unrolled(state: Mapping[str, Tensor]) -> State:
    """An official state with one set of names per block; files hold all blocks along axis 0."""
    return unstack(state, "decoder/layers", "decoder/layers_{}", axis=0)


def stacked(state: Mapping[str, Tensor]) -> State:
    """The inverse of `unrolled`."""
    return stack(state, "decoder/layers", "decoder/layers_{}", axis=0)

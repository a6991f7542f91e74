"""The trunk of MAR (Li et al., arXiv 2406.11838; official `mar.py`): tokens -> one condition vector per position.

An encoder sees the known tokens, a decoder adds mask tokens for the others (as in MAE); the class enters as a buffer of
leading tokens. The causal form, one token at a time, is the paper's comparison. Parameter names are the official ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers.blocks import ViTBlock
from layers.checks import check_positive
from layers.embed import SplitLabelEmbedder
from layers.gather import put, take
from layers.kv_cache import KVCache
from layers.orders import Scan


@dataclass
class MARConfig:
    """Sizes of the trunk; the defaults are MAR-B. Official `mar.py`."""

    width: int = 768
    depth: int = 12  # blocks of the encoder, and of the decoder
    num_heads: int = 12
    decoder_width: int | None = None  # null: as the encoder
    decoder_depth: int | None = None
    decoder_heads: int | None = None
    mlp_ratio: float = 4.0
    buffer_size: int = 64  # class tokens put before the image's
    attn_dropout: float = 0.1
    proj_dropout: float = 0.1
    norm_eps: float = 1e-6
    attention: Literal["bidirectional", "causal"] = "bidirectional"  # causal: one token at a time, with a KV cache
    order: Literal["random", Scan] = "random"
    grad_checkpointing: bool = False  # recompute the trunk's blocks in the backward pass; the head's are kept

    def __post_init__(self) -> None:
        check_positive("net", self, "width", "depth", "num_heads", "decoder_width", "decoder_depth", "decoder_heads")
        if self.buffer_size < 1:
            raise ValueError(f"net.buffer_size is {self.buffer_size}: the class enters through it, use at least 1")


class MARCache:
    """Keys and values of both halves of a causal trunk."""

    def __init__(self, encoder: KVCache, decoder: KVCache) -> None:
        self.encoder, self.decoder = encoder, decoder

    def advance(self, positions: int) -> None:
        self.encoder.advance(positions)
        self.decoder.advance(positions)


class MAR(nn.Module):
    """Tokens, continuous (B, K, D) or ids (B, K), -> z (B, R, E); bidirectional (`forward`) or `causal`."""

    def __init__(
        self, config: MARConfig, *, seq_len: int, token_dim: int, vocab_size: int | None, num_classes: int
    ) -> None:
        super().__init__()
        self.config, self.seq_len, self.buffer = config, seq_len, config.buffer_size
        width = config.width
        self.decoder_width = config.decoder_width or width
        self.y_embedder = SplitLabelEmbedder(num_classes, width)
        self.z_proj = nn.Embedding(vocab_size, width) if vocab_size else nn.Linear(token_dim, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=config.norm_eps)
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, self.buffer + seq_len, width))
        self.encoder_blocks = self._blocks(width, config.depth, config.num_heads)
        self.encoder_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.decoder_embed = nn.Linear(width, self.decoder_width)
        if config.attention == "bidirectional":
            self.mask_token = nn.Parameter(torch.empty(1, 1, self.decoder_width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, self.buffer + seq_len, self.decoder_width))
        depth, heads = config.decoder_depth or config.depth, config.decoder_heads or config.num_heads
        self.decoder_blocks = self._blocks(self.decoder_width, depth, heads)
        self.decoder_norm = nn.LayerNorm(self.decoder_width, eps=config.norm_eps)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, seq_len, self.decoder_width))
        self.init_weights()

    def _blocks(self, width: int, depth: int, heads: int) -> nn.ModuleList:
        config = self.config
        return nn.ModuleList(
            ViTBlock(
                width,
                heads,
                mlp_ratio=config.mlp_ratio,
                norm_eps=config.norm_eps,
                attn_dropout=config.attn_dropout,
                proj_dropout=config.proj_dropout,
            )
            for _ in range(depth)
        )

    @torch.no_grad()
    def init_weights(self) -> None:
        """Official `initialize_weights`: tables N(0, 0.02), linear maps Xavier uniform with zero bias."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for name, param in self.named_parameters():
            if name.endswith(("pos_embed_learned", "mask_token", "fake_latent")):
                nn.init.normal_(param, std=0.02)

    def forward(self, x: Tensor, known: Tensor, wanted: Tensor, labels: Tensor) -> Tensor:
        """z (B, R, E) of positions `wanted` (B, R), given tokens x (B, K, D) at positions `known` (B, K).

        A causal trunk sees them in their order; its R is K + 1 (see `causal`).
        """
        if self.config.attention == "causal":
            return self.causal(x, known, wanted, labels)
        return self.decode(self.encode(x, known, labels), known, wanted)

    def embed(self, x: Tensor, positions: Tensor, labels: Tensor | None) -> Tensor:
        """Tokens with their positions, after the class buffer where labels are given: (B, [M +] K, E)."""
        table = self.encoder_pos_embed_learned
        h = self.z_proj(x) + take(table[:, self.buffer :], positions)  # (B, K, E)
        if labels is not None:
            h = torch.cat([self.y_embedder(labels)[:, None] + table[:, : self.buffer], h], dim=1)  # (B, M + K, E)
        return self.z_proj_ln(h)

    def encode(self, x: Tensor, known: Tensor, labels: Tensor) -> Tensor:
        """The known tokens alone see each other: (B, K, D) -> (B, M + K, E)."""
        h = self.embed(x, known, labels)
        for block in self.encoder_blocks:
            h = self._run(block, h)
        return self.encoder_norm(h)

    def decode(self, h: Tensor, known: Tensor, wanted: Tensor) -> Tensor:
        """Mask tokens join; the last block computes only the wanted rows: (B, M + K, E) -> (B, R, E)."""
        h, num_buffer = self.decoder_embed(h), self.buffer
        buffer = torch.arange(num_buffer, device=h.device).expand(len(h), -1)
        everywhere = self.mask_token.expand(len(h), num_buffer + self.seq_len, -1)
        h = put(everywhere, torch.cat([buffer, known + num_buffer], dim=1), h)  # (B, M + L, E)
        h = h + self.decoder_pos_embed_learned
        for block in self.decoder_blocks[:-1]:
            h = self._run(block, h)
        h = self._run(self.decoder_blocks[-1].rows, h, wanted + num_buffer)  # (B, R, E)
        return self.decoder_norm(h) + take(self.diffusion_pos_embed_learned, wanted)

    def causal(
        self, x: Tensor, positions: Tensor, targets: Tensor, labels: Tensor | None, cache: MARCache | None = None
    ) -> Tensor:
        """z of the tokens that follow: x (B, K, D) in their order at `positions` (B, K), `targets` the positions next.

        With labels the sequence starts: the class buffer comes first, targets are (B, K + 1), as many rows return.
        Without, it goes on from the cache, and targets are (B, K). Each row learns where its target lies between the
        two halves of the trunk (MAE's way); the official code has no causal variant, so this place is our choice.
        """
        skip = self.buffer - 1 if labels is not None else 0
        h = self.embed(x, positions, labels)
        for i, block in enumerate(self.encoder_blocks):
            h = self._run(block.causal, h, cache.encoder if cache else None, i)
        table = self.decoder_pos_embed_learned
        where = take(table[:, self.buffer :], targets)
        if skip:
            where = torch.cat([table[:, :skip].expand(len(h), -1, -1), where], dim=1)
        h = self.decoder_embed(self.encoder_norm(h)) + where
        for i, block in enumerate(self.decoder_blocks):
            h = self._run(block.causal, h, cache.decoder if cache else None, i)
        if cache:
            cache.advance(h.shape[1])
        return self.decoder_norm(h)[:, skip:] + take(self.diffusion_pos_embed_learned, targets)

    def init_cache(self, batch: int, *, dtype: torch.dtype, device: torch.device | str) -> MARCache:
        """An empty cache for `batch` sequences of full length."""

        def empty(blocks: nn.ModuleList, width: int) -> KVCache:
            heads = blocks[0].attn.num_heads
            sizes = {"num_heads": heads, "head_dim": width // heads, "length": self.buffer + self.seq_len - 1}
            return KVCache(len(blocks), batch, **sizes, dtype=dtype, device=device)

        return MARCache(empty(self.encoder_blocks, self.config.width), empty(self.decoder_blocks, self.decoder_width))

    def _run(self, block: Callable[..., Tensor], h: Tensor, *arguments: Any) -> Tensor:
        if self.config.grad_checkpointing and self.training:
            return checkpoint(block, h, *arguments, use_reentrant=False)
        return block(h, *arguments)

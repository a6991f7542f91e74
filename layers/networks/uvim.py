"""GIVT's encoder-decoder (Tschannen et al., arXiv 2312.02116; official `models/proj/givt/givt.py` with an encoder): an
image -> the tokens of its label map, as in UViM (Kolesnikov et al., arXiv 2205.10337).

A ViT sees the image; GIVT's causal trunk attends to what it makes of each patch, in every block. In: images (B, 3, H,
W) in [-1, 1], tokens (B, L, D). Out: h (B, L, E), of which the head makes distributions.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from layers.checkpoint import Rule
from layers.flax_layout import (
    conv_rules,
    cross_attention_rules,
    linear_rules,
    norm_rules,
    self_attention_rules,
    unstack,
)
from layers.networks.givt import GIVT, GIVTCache, GIVTConfig
from layers.networks.vit import ViT, ViTConfig, resample_positions, trunk_rules


class UViM(nn.Module):
    """An encoder for images of `size` (H, W), and a causal decoder of `seq_len` tokens of `token_dim` numbers.

    Raises ValueError for a decoder that is not causal, or widths that differ.
    """

    def __init__(
        self, encoder: ViTConfig, decoder: GIVTConfig, *, size: tuple[int, int], seq_len: int, token_dim: int
    ) -> None:
        super().__init__()
        if not decoder.causal:
            raise ValueError(f"decoder.attention is {decoder.attention}: tokens are drawn in order here, use causal")
        if encoder.width != decoder.width:
            raise ValueError(f"encoder.width is {encoder.width}, decoder.width {decoder.width}: make them equal")
        self.encoder = ViT(encoder, channels=3, size=size)
        sizes = {"seq_len": seq_len, "token_dim": token_dim, "num_classes": 1}
        self.decoder = GIVT(decoder, **sizes, null_label=False, cross=True)

    def forward(self, images: Tensor, x: Tensor) -> Tensor:
        """h (B, L, E): row i is the state before token i, given those before it."""
        return self.decoder(x, begin(images), memory=self.encoder(images))

    def prefill(self, images: Tensor, cache: GIVTCache, *, copies: int = 1) -> Tensor:
        """h (B copies, E) of the first token; an image's copies, such as beams, lie side by side in the cache."""
        memory = self.encoder(images).repeat_interleave(copies, dim=0)
        return self.decoder.prefill(begin(memory), cache, memory=memory)

    def step(self, token: Tensor, index: int, cache: GIVTCache) -> Tensor:
        """h (B, E) of token index + 1, from `token` (B, D), the one with number `index`."""
        return self.decoder.step(token, index, cache)


def begin(rows: Tensor) -> Tensor:
    """The one label there is, which begins a sequence, for each row: int64 (B,)."""
    return torch.zeros(len(rows), dtype=torch.int64, device=rows.device)


# Official names and layouts


def encoder_rules(num_heads: int) -> list[Rule]:
    """Of the image encoder, in ours without a prefix."""
    return [
        *conv_rules("EmbedPatches", "patch_embed"),
        *trunk_rules("encoder", "pos_embedding_encoder", "trunk", num_heads=num_heads),
    ]


def decoder_rules(num_heads: int) -> list[Rule]:
    """Of GIVT with attention to a memory, blocks apart, in ours without a prefix; all but the head."""
    block, our_block = "decoder/EncDecBlock*", "blocks.*"
    return [
        Rule("EmbedLabels/embedding", "label_embed.embedding_table.weight"),
        *linear_rules("EmbedTargets", "token_embed"),
        Rule("decoder/pos_emb", "pos_embed"),
        *norm_rules(f"{block}/LayerNorm1", f"{our_block}.norm1"),
        *self_attention_rules(f"{block}/SelfAttn", f"{our_block}.attn", num_heads=num_heads),
        *norm_rules(f"{block}/LayerNorm2", f"{our_block}.norm2"),
        *cross_attention_rules(f"{block}/CrossAttn", f"{our_block}.cross", num_heads=num_heads),
        *norm_rules(f"{block}/LayerNorm3", f"{our_block}.norm3"),
        *linear_rules(f"{block}/MLP/Dense_0", f"{our_block}.mlp.fc1"),
        *linear_rules(f"{block}/MLP/Dense_1", f"{our_block}.mlp.fc2"),
        *norm_rules("decoder/LayerNorm", "norm"),
    ]


def unrolled(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state with the blocks apart; where they were in one array, the encoder's lay on axis 0, the decoder's
    on axis 1."""
    state = unstack(state, "encoder/encoderblock", "encoder/encoderblock_{}", axis=0)
    return unstack(state, "decoder/EncDecBlock", "decoder/EncDecBlock{}", axis=1)


# Weights of a ViT that was trained as a classifier

VIT_RENAMED = {  # big_vision's name <- that in files of before flax's `linen`, such as those of arXiv 2106.10270
    "LayerNorm_2/": "LayerNorm_1/",
    "MlpBlock_3/": "MlpBlock_0/",
    "MultiHeadDotProductAttention_1/": "MultiHeadDotProductAttention_0/",
}
VIT_LEFT_OUT = ("cls", "head/", "pre_logits/", "MAPHead_0/")  # of the classifier alone


def classifier_to_encoder(state: Mapping[str, Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
    """A ViT classifier's official state -> that of UViM's encoder, positions resampled to `grid`.

    As the official code starts from "howto-i21k-L/16". Raises ValueError for a file without positions.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(VIT_LEFT_OUT):
            continue
        if name.startswith("Transformer/encoderblock"):
            for old, new in VIT_RENAMED.items():
                name = name.replace(old, new)
        name = name.replace("Transformer/posembed_input/pos_embedding", "pos_embedding")
        name = name.replace("Transformer/pos_embedding", "pos_embedding")
        renamed[name.replace("Transformer/", "encoder/").replace("embedding/", "EmbedPatches/")] = tensor
    if "pos_embedding" not in renamed:
        raise ValueError("the file holds no learned positions of a ViT: take one of big_vision's or of its augreg set")
    positions = renamed.pop("pos_embedding")
    if round((positions.shape[1] - 1) ** 0.5) ** 2 == positions.shape[1] - 1:  # the first is the class token's
        positions = positions[:, 1:]
    renamed["pos_embedding_encoder"] = resample_positions(positions, grid)
    return unstack(renamed, "encoder/encoderblock", "encoder/encoderblock_{}", axis=0)

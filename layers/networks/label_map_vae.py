"""UViM's autoencoder of label maps (Kolesnikov et al., arXiv 2205.10337) as GIVT has it: a VAE of two ViTs (Tschannen
et al., arXiv 2312.02116; official `models/proj/givt/vit.py`).

Several maps of class ids go in as one-hot channels, side by side, and come back as logits. Unusual: between the ViT's
grid of patches and the smaller square of tokens lies a bilinear resize of the features, with antialiasing.
In: maps (B, K, H, W) of ids; one outside a map's classes is a pixel without any. Out: moments, logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers.checkpoint import Rule
from layers.checks import check_positive
from layers.flax_layout import conv_rules, linear_rules, unstack
from layers.init import lecun_normal_
from layers.label_maps import cross_entropy, one_hot
from layers.networks.vit import ViT, ViTConfig, ViTTrunk, trunk_rules


@dataclass
class LabelMapVAEConfig:
    """Sizes; the defaults are the published ones. Official `vae_coco_panoptic.py`, `givt_coco_panoptic.py`."""

    width: int = 768
    encoder_depth: int = 6
    decoder_depth: int = 12
    num_heads: int = 12
    mlp_hidden: int = 3072
    patch_size: int = 16
    seq_len: int = 256  # tokens, a square number
    token_dim: int = 16
    grad_checkpointing: bool = False  # recompute blocks, and the logits with their loss, in the backward pass

    def __post_init__(self) -> None:
        sizes = ("width", "encoder_depth", "decoder_depth", "num_heads", "mlp_hidden", "patch_size")
        check_positive("arch", self, *sizes, "seq_len", "token_dim")
        if self.code_side**2 != self.seq_len:
            raise ValueError(f"arch.seq_len is {self.seq_len}: tokens lie in a square, so use a square number")

    @property
    def code_side(self) -> int:
        """Tokens in a row."""
        return round(self.seq_len**0.5)

    def vit(self, depth: int) -> ViTConfig:
        """Sizes of one half."""
        sizes = {"width": self.width, "num_heads": self.num_heads, "mlp_hidden": self.mlp_hidden}
        return ViTConfig(**sizes, depth=depth, patch_size=self.patch_size, grad_checkpointing=self.grad_checkpointing)


class LabelMapVAE(nn.Module):
    """Maps of `classes` = {name: number of classes} -> moments (B, 2 D, h, w) -> logits; `size` (H, W) in pixels.

    The order of `classes` is that of the maps and of the one-hot channels.
    """

    def __init__(self, config: LabelMapVAEConfig, *, classes: Mapping[str, int], size: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.classes = config, dict(classes)
        channels = sum(self.classes.values())
        self.encoder = ViT(config.vit(config.encoder_depth), channels=channels, size=size)
        self.encoder_head = nn.Linear(config.width, 2 * config.token_dim)
        self.decoder_stem = nn.Linear(config.token_dim, config.width)
        self.grid = self.encoder.grid
        self.decoder = ViTTrunk(config.vit(config.decoder_depth), seq_len=self.grid[0] * self.grid[1])
        self.decoder_head = nn.Linear(config.width, config.patch_size**2 * channels)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The ViTs' own; flax's default for the linear maps between them; logits that are zero at first."""
        for linear in (self.encoder_head, self.decoder_stem):
            lecun_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.decoder_head.weight)
        nn.init.zeros_(self.decoder_head.bias)

    def encode(self, maps: Tensor) -> Tensor:
        """Ids (B, K, H, W) -> means and log variances (B, 2 D, h, w) of the square of tokens."""
        hot = one_hot(maps, list(self.classes.values()), dtype=self.encoder.patch_embed.weight.dtype)
        features = rearrange(self.encoder(hot), "b (h w) e -> b e h w", h=self.grid[0])
        side = self.config.code_side
        return rearrange(self.encoder_head(resize(features, (side, side))), "b h w d -> b d h w")

    def decode(self, latents: Tensor) -> dict[str, Tensor]:
        """Latents (B, D, h, w) -> logits (B, H, W, classes) of each map by name."""
        logits = self.patch_logits(self._decoded(latents))
        logits = rearrange(
            logits, "b (h w) (p q) c -> b (h p) (w q) c", h=self.grid[0], p=self.config.patch_size
        )  # (B, H, W, all classes)
        return dict(zip(self.classes, logits.split(list(self.classes.values()), dim=-1), strict=True))

    def patch_logits(self, h: Tensor) -> Tensor:
        """Decoded features (B, L, E) -> logits (B, L, p*p, all classes): pixels of a patch, then classes, fastest."""
        return self.decoder_head(h).unflatten(-1, (self.config.patch_size**2, -1))

    def reconstruction(self, latents: Tensor, maps: Tensor, *, ignore_zero: bool) -> dict[str, Tensor]:
        """Cross-entropy of each map by name, (B,) in nats per pixel; `ignore_zero` leaves out pixels of id 0.

        Computed patch by patch: the logits of a 512x512 image, 240 MB, are not put in order first.
        """
        h, arguments = self._decoded(latents), (self._by_patch(maps), ignore_zero)
        if self.config.grad_checkpointing and self.training:
            losses = checkpoint(self._losses, h, *arguments, use_reentrant=False)
        else:
            losses = self._losses(h, *arguments)
        return dict(zip(self.classes, losses, strict=True))

    def _decoded(self, latents: Tensor) -> Tensor:
        stem = self.decoder_stem(latents.movedim(1, -1))  # (B, h, w, E)
        return self.decoder(resize(stem.movedim(-1, 1), self.grid).flatten(1, 2))

    def _by_patch(self, maps: Tensor) -> Tensor:
        patch = self.config.patch_size
        return rearrange(maps, "b k (h p) (w q) -> b k (h w) (p q)", p=patch, q=patch)

    def _losses(self, h: Tensor, maps: Tensor, ignore_zero: bool) -> Sequence[Tensor]:
        parts = self.patch_logits(h).split(list(self.classes.values()), dim=-1)
        return [cross_entropy(part, maps[:, k], ignore_zero=ignore_zero) for k, part in enumerate(parts)]


def resize(features: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, E, h, w) -> (B, *size, E), float32: bilinear with antialiasing, as `jax.image.resize` does it ("linear")."""
    resized = F.interpolate(features.float(), size, mode="bilinear", align_corners=False, antialias=True)
    return resized.movedim(1, -1)


def unrolled(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state with the layers of both halves apart; where they were in one array, they lay on axis 0."""
    for half in ("encoder", "decoder"):
        state = unstack(state, f"{half}/encoderblock", f"{half}/encoderblock_{{}}", axis=0)
    return dict(state)


def flax_rules(num_heads: int) -> list[Rule]:
    """Official names and layouts (layers apart) <-> those of LabelMapVAE."""
    return [
        *conv_rules("embedding", "encoder.patch_embed"),
        *trunk_rules("encoder", "pos_embedding_encoder", "encoder.trunk", num_heads=num_heads),
        *linear_rules("encoder_head", "encoder_head"),
        *linear_rules("decoder_stem", "decoder_stem"),
        *trunk_rules("decoder", "pos_embedding_decoder", "decoder", num_heads=num_heads),
        *linear_rules("decoder_head", "decoder_head"),
    ]

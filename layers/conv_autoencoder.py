"""Convolutional image autoencoder of the latent diffusion family (Rombach et al., arXiv 2112.10752), as in LDM's
`ldm/modules/diffusionmodules/model.py` and MAR's `models/vae.py`.

Residual blocks between strided convolutions; attention in the middle, and in the levels whose nominal resolution is
listed. Parameter names are the official ones.
In: images (B, 3, H, W) in [-1, 1]. Out: moments (B, 2C, h, w) or latents (B, C, h, w), and images again, not clamped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

IMAGE_CHANNELS = 3
NORM_EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)  # official `DiagonalGaussianDistribution`


@dataclass
class ConvConfig:
    """Sizes that every convolutional autoencoder has. Raises ValueError for sizes that cannot be built."""

    base_channels: int = 128
    multipliers: Sequence[int] = (1, 1, 2, 2, 4)  # channels of each level over base_channels, finest level first
    num_res_blocks: int = 2  # per level
    z_channels: int = 16
    double_z: bool = True  # the encoder gives mean and log variance
    norm_groups: int = 32

    def __post_init__(self) -> None:
        self.multipliers = tuple(self.multipliers)
        sizes = (self.num_res_blocks, self.z_channels, self.latent_channels, self.norm_groups, *self.widths)
        if not self.widths or min(sizes) < 1:
            raise ValueError(f"every size of an autoencoder must be at least 1, in {self}")
        if bad := [width for width in self.widths if width % self.norm_groups]:
            raise ValueError(
                f"{bad[0]} channels cannot be normalised in {self.norm_groups} groups: "
                f"change base_channels, multipliers or norm_groups"
            )

    @property
    def widths(self) -> list[int]:
        """Channels of each level, finest first."""
        return [self.base_channels * multiplier for multiplier in self.multipliers]

    @property
    def latent_channels(self) -> int:
        """Channels C of a latent."""
        return self.z_channels

    @property
    def stride(self) -> int:
        """Pixels per latent position, in each direction."""
        return 2 ** (len(self.multipliers) - 1)


@dataclass
class AutoencoderConfig(ConvConfig):
    """The latent diffusion family, whose decoder levels have one more block than `num_res_blocks`.

    The defaults are the KL-16 released with MAR. LDM's KL-16 also has decoder_attention (16,).
    """

    embed_channels: int | None = None  # channels of a latent; None: z_channels
    resolution: int = 256  # nominal: it decides, with the next two, which levels have attention; any image size fits
    encoder_attention: Sequence[int] = (16,)  # resolutions
    decoder_attention: Sequence[int] = ()

    def __post_init__(self) -> None:
        self.encoder_attention = tuple(self.encoder_attention)
        self.decoder_attention = tuple(self.decoder_attention)
        super().__post_init__()

    @property
    def latent_channels(self) -> int:
        return self.z_channels if self.embed_channels is None else self.embed_channels


@dataclass
class KL8Config(AutoencoderConfig):
    """LDM's KL-8, as in Stable Diffusion 1 (`first_stage_config` of v1-inference.yaml): only the middle attends."""

    multipliers: Sequence[int] = (1, 2, 4, 4)
    z_channels: int = 4
    encoder_attention: Sequence[int] = ()


@dataclass
class VQ16Config(AutoencoderConfig):
    """LDM's VQ-16 (`models/first_stage_models/vq-f16/config.yaml`)."""

    z_channels: int = 8
    double_z: bool = False
    decoder_attention: Sequence[int] = (16,)


class ResBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1 convolution on the short way if the channels change."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.changes_channels = in_channels != out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if self.changes_channels else x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with a residual."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape."""
        y = self.norm(x)
        q, k, v = (rearrange(conv(y), "b c h w -> b 1 (h w) c") for conv in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)  # (B, 1, h*w, C)
        return x + self.proj_out(rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Half the size: one row and column of zeros at the bottom and the right, then a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h/2, w/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if the level has it."""

    def __init__(self, in_channels: int, out_channels: int, *, depth: int, attention: bool, groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResBlock(out_channels if j else in_channels, out_channels, groups=groups) for j in range(depth)
        )
        self.attn = nn.ModuleList(AttnBlock(out_channels, groups=groups) for _ in range(depth if attention else 0))
        self.downsample: nn.Module = nn.Identity()  # the encoder and the decoder replace one of these
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h', w')."""
        for j, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[j](x)
        return self.upsample(self.downsample(x))


class Middle(nn.Module):
    """The coarsest level's residual block, attention, residual block."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups=groups)
        self.attn_1 = AttnBlock(channels, groups=groups)
        self.block_2 = ResBlock(channels, channels, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> (B, z or 2z, H/stride, W/stride)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        self.conv_in = nn.Conv2d(IMAGE_CHANNELS, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(zip([config.base_channels, *widths], widths, strict=False)):
            attention = config.resolution // 2**i in config.encoder_attention
            level = Level(before, width, depth=config.num_res_blocks, attention=attention, groups=groups)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1], groups=groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels * (2 if config.double_z else 1), 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """(B, z, h, w) -> images (B, 3, h*stride, w*stride). `up` is stored from fine to coarse and runs backwards."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups, last = config.widths, config.norm_groups, len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups=groups)
        self.up = nn.ModuleList()
        for i, (width, before) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            attention = (config.resolution // 2**last) * 2 ** (last - i) in config.decoder_attention
            level = Level(before, width, depth=config.num_res_blocks + 1, attention=attention, groups=groups)
            if i > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], IMAGE_CHANNELS, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class ConvAutoencoder(nn.Module):
    """Encoder and decoder with the 1x1 convolutions between them: official `AutoencoderKL` without its losses."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        z, latent, factor = config.z_channels, config.latent_channels, 2 if config.double_z else 1
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(factor * z, factor * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, z, 1)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> moments (B, 2C, h, w) with `double_z` (see `Posterior`), else (B, C, h, w)."""
        return self.quant_conv(self.encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W), nominally in [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latents))


class Posterior:
    """Normal distribution q(z | image) with diagonal covariance. float32 island."""

    def __init__(self, moments: Tensor, *, logvar_range: tuple[float, float] | None = LOGVAR_RANGE) -> None:
        """moments (B, 2C, h, w): means, then log variances, which are clamped (None: not)."""
        self.mean, logvar = moments.float().chunk(2, dim=1)
        self.logvar = logvar.clamp(*logvar_range) if logvar_range else logvar

    @property
    def std(self) -> Tensor:
        """(B, C, h, w)."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor) -> Tensor:
        """Unit normal noise (B, C, h, w) -> latents (B, C, h, w)."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """KL divergence to the unit normal, in nats per image: (B,)."""
        terms = self.mean.square() + self.logvar.exp() - 1 - self.logvar
        return 0.5 * terms.flatten(1).sum(1)

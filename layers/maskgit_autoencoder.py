"""Convolutional autoencoder of MaskGIT (Chang et al., arXiv 2202.04200; `nets/vqgan_tokenizer.py`), as in GIVT's
`models/proj/givt/cnn.py` and in the tokenizer of RAR, `modeling/modules/maskgit_vqgan.py`.

Residual blocks between average pools and nearest-neighbour upsampling, no attention. Unusual: a block that changes the
channels adds a 1x1 convolution of its own result and drops its input; the released weights were trained so.
Parameter names are those of RAR's file, `flax_rules` has GIVT's.
In: images (B, 3, H, W) in [-1, 1]. Out: moments (B, 2C, h, w) or latents (B, C, h, w), and images again, not clamped.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from layers.checkpoint import Rule
from layers.conv_autoencoder import IMAGE_CHANNELS, NORM_EPS, ConvConfig
from layers.flax_layout import conv_rules, norm_rules
from layers.init import lecun_normal_


@dataclass
class MaskGITAutoencoderConfig(ConvConfig):
    """Sizes; the defaults are GIVT's for ImageNet. RAR's MaskGIT-VQ has z_channels 256 and double_z False.

    A level has `num_res_blocks` in encoder and decoder, and so has the middle.
    """

    unit_range: bool = True  # official `malib_ckpt`: [0, 1] inside the network, and a clamped log variance


class ResBlock(nn.Module):
    """x + h, or h + conv1x1(h) where the channels change, with h = conv(swish(norm(conv(swish(norm(x)))))).

    The second form loses x: official `ResBlock` convolves the result where one would expect the input.
    """

    def __init__(self, in_channels: int, out_channels: int, *, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False)
        self.changes_channels = in_channels != out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(h) if self.changes_channels else x)


class Level(nn.Module):
    """Residual blocks of one resolution; `upsample`: then twice the size, by nearest neighbour and a convolution."""

    def __init__(self, in_channels: int, out_channels: int, *, depth: int, groups: int, upsample: bool = False) -> None:
        super().__init__()
        self.block = _blocks(in_channels, out_channels, depth, groups)
        if upsample:
            self.upsample_conv = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h', w')."""
        x = self.block(x)
        return self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest")) if self.upsample else x


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> (B, z or 2z, H/stride, W/stride)."""

    def __init__(self, config: MaskGITAutoencoderConfig) -> None:
        super().__init__()
        widths, depth, groups = config.widths, config.num_res_blocks, config.norm_groups
        before = [config.base_channels, *widths]
        self.conv_in = nn.Conv2d(IMAGE_CHANNELS, config.base_channels, 3, padding=1, bias=False)
        self.down = nn.ModuleList(Level(before[i], width, depth=depth, groups=groups) for i, width in enumerate(widths))
        self.mid = _blocks(widths[-1], widths[-1], depth, groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels * (2 if config.double_z else 1), 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for i, level in enumerate(self.down):
            x = level(F.avg_pool2d(x, 2) if i else x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """(B, z, h, w) -> images (B, 3, h*stride, w*stride). `up` is stored from fine to coarse and runs backwards."""

    def __init__(self, config: MaskGITAutoencoderConfig) -> None:
        super().__init__()
        widths, depth, groups = config.widths, config.num_res_blocks, config.norm_groups
        before = [*widths[1:], widths[-1]]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = _blocks(widths[-1], widths[-1], depth, groups)
        self.up = nn.ModuleList(
            Level(before[i], width, depth=depth, groups=groups, upsample=i > 0) for i, width in enumerate(widths)
        )
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], IMAGE_CHANNELS, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class MaskGITAutoencoder(nn.Module):
    """Encoder and decoder for images in [-1, 1]. Official `cnn.Model` up to the order of its tokens."""

    def __init__(self, config: MaskGITAutoencoderConfig) -> None:
        super().__init__()
        self.unit_range = config.unit_range
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def init_weights(self) -> None:
        """As flax starts: for training from scratch (it takes seconds)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                lecun_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> moments (B, 2C, h, w) with `double_z` (see `Posterior`), else (B, C, h, w)."""
        return self.encoder((images + 1) / 2 if self.unit_range else images)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W), nominally in [-1, 1], not clamped: training needs the gradient outside."""
        images = self.decoder(latents)
        return 2 * images - 1 if self.unit_range else images


def flax_rules(config: MaskGITAutoencoderConfig) -> list[Rule]:
    """Names and layouts of GIVT's parameters (`cnn_encoder/ResBlock_3/Conv_0/kernel`).

    flax numbers layers of a kind in the order in which they are called: the decoder's middle comes first, then its
    levels from coarse to fine.
    """
    levels, depth = range(len(config.multipliers)), range(config.num_res_blocks)
    down = [f"down.{i}.block.{j}" for i in levels for j in depth]
    up = [f"up.{i}.block.{j}" for i in reversed(levels) for j in depth]
    middle = [f"mid.{j}" for j in depth]
    upsample = [f"up.{i}.upsample_conv" for i in levels[:0:-1]]
    return [
        *_half("cnn_encoder", "encoder", blocks=[*down, *middle], convs=["conv_in", "conv_out"]),
        *_half("cnn_decoder", "decoder", blocks=[*middle, *up], convs=["conv_in", *upsample, "conv_out"]),
    ]


def _half(official: str, ours: str, *, blocks: list[str], convs: list[str]) -> list[Rule]:
    layers = {f"Conv_{i}": conv for i, conv in enumerate(convs)} | {"GroupNorm_0": "norm_out"}
    inner = {"GroupNorm_0": "norm1", "Conv_0": "conv1", "GroupNorm_1": "norm2", "Conv_1": "conv2"}
    inner |= {"Conv_2": "nin_shortcut"}
    for i, block in enumerate(blocks):
        layers |= {f"ResBlock_{i}/{theirs}": f"{block}.{name}" for theirs, name in inner.items()}
    rules = {name: norm_rules if "GroupNorm" in name else conv_rules for name in layers}
    return [rule for theirs, name in layers.items() for rule in rules[theirs](f"{official}/{theirs}", f"{ours}.{name}")]


def _blocks(in_channels: int, out_channels: int, depth: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        *(ResBlock(out_channels if j else in_channels, out_channels, groups=groups) for j in range(depth))
    )

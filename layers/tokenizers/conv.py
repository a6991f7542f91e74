"""What the tokenizers around a convolutional autoencoder share: sizes, patches, and the scale of latents.

Freezing and weights are those of every learned tokenizer (learned.py).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from layers.conv_autoencoder import ConvAutoencoder, ConvConfig, Posterior
from layers.maskgit_autoencoder import MaskGITAutoencoder
from layers.patch import patchify, unpatchify
from layers.random import Generators, randn
from layers.tokenizers.base import KEYS, Tokens, from_uint8
from layers.tokenizers.learned import LearnedTokenizer

Config = TypeVar("Config", bound=ConvConfig)


def as_architecture(cls: type[Config], value: Config | Mapping[str, Any], *, double_z: bool) -> Config:
    """A config from itself or its fields. Raises ValueError if the kind of tokenizer needs the other `double_z`."""
    config = cls(**value) if isinstance(value, Mapping) else value
    if config.double_z != double_z:
        raise ValueError(f"this tokenizer needs an encoder with double_z {double_z}: set {KEYS}.arch.double_z so")
    return config


class ConvTokenizer(LearnedTokenizer):
    """Square images of `image_size`, whose latents are cut into patches of `patch_size` latent positions a side, or of
    (height, width).

    Raises ValueError if `image_size` is no multiple of stride * patch_size.
    """

    def __init__(
        self,
        vae: ConvAutoencoder | MaskGITAutoencoder,
        arch: ConvConfig,
        *,
        image_size: int,
        patch_size: int | tuple[int, int],
        weights: str | None,
        frozen: bool,
    ) -> None:
        super().__init__(vae, weights=weights, frozen=frozen)
        sides = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        if image_size < 1 or min(sides) < 1 or any(image_size % (arch.stride * side) for side in sides):
            raise ValueError(
                f"image_size {image_size} is not divisible by the autoencoder's stride {arch.stride} times patch_size "
                f"{patch_size}: set {KEYS}.image_size or patch_size"
            )
        self.arch, self.image_size, self.patch_size = arch, image_size, patch_size
        self.latent_size = image_size // arch.stride
        self.grid = (self.latent_size // sides[0], self.latent_size // sides[1])

    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> what the encoder gives, (B, C or 2C, h, w). float32 island, as official code encodes.

        Raises ValueError if the images have another size.
        """
        self.require_weights()
        self.check_size(images)
        if images.is_meta:  # which autocast does not know
            return self.vae.encode(from_uint8(images))
        with torch.autocast(images.device.type, enabled=False):
            return self.vae.encode(from_uint8(images))


class LatentTokenizer(ConvTokenizer):
    """Continuous tokens: (latent - latent_shift) * latent_scale, cut into patches of token dim p*p*C.

    `latent_scale` is 1 / std of the latents of the training set, measured for this tokenizer (`latent_statistics`) and
    never assumed: without it, making or decoding tokens is an error.
    """

    def __init__(
        self,
        vae: ConvAutoencoder | MaskGITAutoencoder,
        arch: ConvConfig,
        *,
        image_size: int,
        patch_size: int | tuple[int, int],
        latent_scale: float | None,
        latent_shift: float,
        weights: str | None,
        frozen: bool,
    ) -> None:
        super().__init__(vae, arch, image_size=image_size, patch_size=patch_size, weights=weights, frozen=frozen)
        if latent_scale is not None and not 0 < latent_scale < math.inf:
            raise ValueError(f"latent_scale is {latent_scale}: use 1 / std of the latents")
        self.latent_scale, self.latent_shift = latent_scale, latent_shift
        self.token_dim = self.latent_size**2 // self.seq_len * arch.latent_channels

    def latents(self, raw: Tensor, generator: Generators = None) -> Tensor:
        """raw (B, C or 2C, h, w) -> latents (B, C, h, w), float32, not scaled."""
        raise NotImplementedError

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w), not scaled -> images (B, 3, H, W)."""
        return self.vae.decode(latents)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.encode(images)

    def encode_raw(self, raw: Tensor, generator: Generators = None) -> Tokens:
        return Tokens(self.to_tokens(self.latents(raw, generator)))

    def decode(self, x: Tensor) -> Tensor:
        self.require_weights()
        return self.decode_latents(self.from_tokens(x))

    def to_tokens(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> tokens (B, L, D). Raises ValueError for another shape, or without a scale."""
        expected = (self.arch.latent_channels, self.latent_size, self.latent_size)
        if tuple(latents.shape[1:]) != expected:
            raise ValueError(
                f"latents are {tuple(latents.shape[1:])}, this tokenizer's are {expected}: they were cached with "
                f"another tokenizer or image_size"
            )
        return self.cut((latents - self.latent_shift) * self._scale())

    def from_tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, L, D) -> latents (B, C, h, w): the inverse of `to_tokens`."""
        return self.join(x.float()) / self._scale() + self.latent_shift

    def cut(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> patches (B, L, D)."""
        return patchify(latents, self.patch_size)

    def join(self, patches: Tensor) -> Tensor:
        """(B, L, D) -> (B, C, h, w): the inverse of `cut`."""
        return unpatchify(patches, self.patch_size, self.grid)

    def _scale(self) -> float:
        if self.latent_scale is None:
            raise ValueError(
                f"this tokenizer has no latent_scale: make latents EXP=<the recipe that trained it> CKPT=last measures "
                f"and prints it; set {KEYS}.latent_scale to that number"
            )
        return self.latent_scale


class PosteriorTokenizer(LatentTokenizer):
    """Continuous tokens of an autoencoder that gives a distribution: raw = moments (B, 2C, h, w), which can be cached;
    the latents are drawn from it anew each time."""

    def init_args(self) -> dict[str, Any]:
        return {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "arch": asdict(self.arch),
            "latent_scale": self.latent_scale,
            "latent_shift": self.latent_shift,
            "weights": self.weights,
            "frozen": self.frozen,
        }

    def posterior(self, raw: Tensor) -> Posterior:
        """The distribution that the moments (B, 2C, h, w) stand for."""
        return Posterior(raw)

    def latents(self, raw: Tensor, generator: Generators = None) -> Tensor:
        """Moments (B, 2C, h, w) -> a sample of the posterior (B, C, h, w)."""
        posterior = self.posterior(raw)
        return posterior.sample(randn(posterior.mean.shape, generator, device=raw.device))


class LatentStatistics(NamedTuple):
    """Mean and standard deviation over `count` latent values."""

    mean: float
    std: float
    count: int


@torch.no_grad()
def latent_statistics(
    tokenizer: LatentTokenizer, batches: Iterable[Mapping[str, Tensor]], *, generator: Generators = None
) -> LatentStatistics:
    """Statistics of sampled, unscaled latents over batches with `raw` or `image`, in float64.

    Set latent_scale to 1 / std; MAR leaves latent_shift at 0. Raises ValueError if there is no image.
    """
    total, squares, count = 0.0, 0.0, 0
    for batch in batches:
        raw = batch["raw"] if "raw" in batch else tokenizer.encode_image(batch["image"])
        values = tokenizer.latents(raw, generator).double()
        total, squares, count = total + values.sum(), squares + values.square().sum(), count + values.numel()
    if not count:
        raise ValueError("no images to measure latents of: give latent_statistics at least one batch")
    mean = float(total) / count
    return LatentStatistics(mean, math.sqrt(max(float(squares) / count - mean**2, 0.0)), count)

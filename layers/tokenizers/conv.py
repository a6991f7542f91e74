"""What the tokenizers around a convolutional autoencoder share: sizes, freezing, weights, and the scale of latents.

A frozen tokenizer stays in eval mode, is not trained, and refuses to run before its weights are there
(`lightning_modules/tokenizer_weights.py` reads the file named by `weights`; nothing here opens files).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from layers.checkpoint import check_fit
from layers.conv_autoencoder import AutoencoderConfig, ConvAutoencoder
from layers.patch import patchify, unpatchify
from layers.random import Generators
from layers.tokenizers.base import Tokenizer, Tokens, from_uint8

KEYS = "--model.init_args.tokenizer.init_args"


def as_architecture(
    cls: type[AutoencoderConfig], value: AutoencoderConfig | Mapping[str, Any], *, double_z: bool
) -> AutoencoderConfig:
    """A config from itself or its fields. Raises ValueError if the kind of tokenizer needs the other `double_z`."""
    config = cls(**value) if isinstance(value, Mapping) else value
    if config.double_z != double_z:
        raise ValueError(f"this tokenizer needs an encoder with double_z {double_z}: set {KEYS}.arch.double_z so")
    return config


class ConvTokenizer(Tokenizer):
    """Square images of `image_size`, whose latents are cut into patches of `patch_size` latent positions.

    Raises ValueError if `image_size` is no multiple of stride * patch_size.
    """

    def __init__(
        self,
        vae: ConvAutoencoder,
        arch: AutoencoderConfig,
        *,
        image_size: int,
        patch_size: int,
        weights: str | None,
        frozen: bool,
    ) -> None:
        super().__init__()
        if image_size < 1 or patch_size < 1 or image_size % (arch.stride * patch_size):
            raise ValueError(
                f"image_size {image_size} is not divisible by the autoencoder's stride {arch.stride} times patch_size "
                f"{patch_size}: set {KEYS}.image_size or patch_size"
            )
        self.vae, self.arch = vae, arch
        self.image_size, self.patch_size, self.weights, self.frozen = image_size, patch_size, weights, frozen
        self.loaded = False
        self.latent_size = image_size // arch.stride
        self.grid = (self.latent_size // patch_size, self.latent_size // patch_size)
        self.requires_grad_(not frozen).train()

    def train(self, mode: bool = True) -> Self:
        """Frozen tokenizers stay in eval mode, whatever their owner does."""
        return super().train(mode and not self.frozen)

    def load_weights(self, state: Mapping[str, Tensor], *, origin: str) -> None:
        """Weights under official names (`encoder.conv_in.weight`, ...); `origin` names their file in errors.

        Raises ValueError that names what is missing, unknown or of another shape; nothing is changed then.
        """
        check_fit(state, self.vae.state_dict(), origin=origin)
        self.vae.load_state_dict(state)
        self.loaded = True

    def require_weights(self) -> None:
        """Raise ValueError rather than compute with random weights that nobody trains."""
        if self.frozen and not self.loaded:
            source = f"the file '{self.weights}' was not read" if self.weights else "it was given no file"
            raise ValueError(
                f"{type(self).__name__} is frozen and has no weights yet ({source}): set {KEYS}.weights and call "
                f"lightning_modules.tokenizer_weights.load_tokenizer_weights, or train it (frozen=false)"
            )

    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> what the encoder gives, (B, C or 2C, h, w). float32 island, as official code encodes.

        Raises ValueError if the images have another size.
        """
        self.require_weights()
        if tuple(images.shape[-2:]) != (self.image_size, self.image_size):
            raise ValueError(
                f"images are {images.shape[-2]}x{images.shape[-1]}, the tokenizer expects {self.image_size}: give "
                f"--data.init_args.image_size and {KEYS}.image_size the same value"
            )
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
        vae: ConvAutoencoder,
        arch: AutoencoderConfig,
        *,
        image_size: int,
        patch_size: int,
        latent_scale: float | None,
        latent_shift: float,
        weights: str | None,
        frozen: bool,
    ) -> None:
        super().__init__(vae, arch, image_size=image_size, patch_size=patch_size, weights=weights, frozen=frozen)
        if latent_scale is not None and not 0 < latent_scale < math.inf:
            raise ValueError(f"latent_scale is {latent_scale}: use 1 / std of the latents")
        self.latent_scale, self.latent_shift = latent_scale, latent_shift
        self.token_dim = patch_size**2 * arch.latent_channels

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
        return patchify((latents - self.latent_shift) * self._scale(), self.patch_size)

    def from_tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, L, D) -> latents (B, C, h, w): the inverse of `to_tokens`."""
        return unpatchify(x.float(), self.patch_size, self.grid) / self._scale() + self.latent_shift

    def _scale(self) -> float:
        if self.latent_scale is None:
            raise ValueError(
                f"this tokenizer has no latent_scale: measure it with layers.tokenizers.conv.latent_statistics over "
                f"the training set and set {KEYS}.latent_scale to 1 / std"
            )
        return self.latent_scale


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

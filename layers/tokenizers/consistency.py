"""OpenAI's consistency decoder for the KL-8 of Stable Diffusion, in place of the autoencoder's own decoder
(openai/consistencydecoder; the technique: Song et al., "Consistency Models", arXiv 2303.01469).

The network is published as TorchScript, which is code: a file is run only if its SHA-256 is the one that was stated
(`lightning_modules/tokenizer_weights.py`). Unusual: decoding draws noise. In: latents (B, 4, h, w), not scaled.
Out: images (B, 3, 8h, 8w), clamped to [-1, 1].
"""

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn

from layers.conv_autoencoder import IMAGE_CHANNELS, KL8Config
from layers.random import Generators, randn
from layers.tokenizers.conv import as_architecture
from layers.tokenizers.kl_vae import KLVAETokenizer

STRIDE = 8  # of KL-8, in pixels

# openai/consistencydecoder, `consistencydecoder/__init__.py`
OPENAI_SHA256 = "c9cebd3132dd9c42936d803e33424145a748843c8f716c0814838bdc8a2fe7cb"
LATENT_FACTOR = 0.18215
CHANNEL_MEANS = (0.38862467, 0.02253063, 0.07381133, -0.0171294)
CHANNEL_STDS = (0.9654121, 1.0440036, 0.76147926, 0.77022034)
DIFFUSION_STEPS, DISTILLED_STEPS = 1024, 64
COSINE_OFFSET = 0.008
SIGMA_DATA = 0.5
SCHEDULE = (1.0, 0.5)  # one evaluation of the network for each


def timestep_of(position: float) -> int:
    """Place in the schedule, 1 being pure noise -> the distilled step above it, as a diffusion timestep."""
    spacing = DIFFUSION_STEPS // DISTILLED_STEPS
    above = (int((DIFFUSION_STEPS - 1) * position) // spacing + 1) * spacing
    return min(above, DIFFUSION_STEPS - spacing)


def signal_power(timestep: int) -> float:
    """Product of (1 - beta) up to and with a timestep, of the cosine schedule; in closed form, float64."""

    def power(t: float) -> float:
        return math.cos((t + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2

    return power((timestep + 1) / DIFFUSION_STEPS) / power(0)


def denoise(network: nn.Module, x: Tensor, timestep: int, features: Tensor) -> Tensor:
    """c_skip x + c_out F(c_in x), clamped: x (B, 3, H, W) of a timestep -> clean images (B, 3, H, W).

    `network(x, timesteps, features=...)` with int64 timesteps (B,) gives (B, 6, H, W), of which three channels count.
    """
    power = signal_power(timestep)
    variance = 1 / power - 1  # of the noise, where the signal has unit scale
    total = variance + SIGMA_DATA**2
    c_in = math.sqrt(1 / power / total)
    c_skip = math.sqrt(1 / power) * SIGMA_DATA**2 / total
    c_out = math.sqrt(variance / total) * SIGMA_DATA
    timesteps = torch.full((len(x),), timestep, device=x.device)
    output = network(c_in * x, timesteps, features=features)[:, :IMAGE_CHANNELS]
    return (c_out * output + c_skip * x).clamp(-1, 1)


def consistency_decode(network: nn.Module, latents: Tensor, noise: list[Tensor]) -> Tensor:
    """Unscaled latents (B, 4, h, w), unit noise (B or 1, 3, 8h, 8w) per evaluation -> images (B, 3, 8h, 8w).

    float32, outside autocast: the precision that the published file wants on each device is unverified.
    """
    mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (CHANNEL_MEANS, CHANNEL_STDS))
    features = (latents.float() * LATENT_FACTOR - mean) / std
    images = torch.zeros_like(noise[0]).expand(len(latents), -1, -1, -1)
    with torch.autocast(latents.device.type, enabled=False):
        for position, unit in zip(SCHEDULE, noise, strict=True):
            timestep = timestep_of(position)
            power = signal_power(timestep)
            images = denoise(network, math.sqrt(power) * images + math.sqrt(1 - power) * unit, timestep, features)
    return images


class ConsistencyTokenizer(KLVAETokenizer):
    """KL-8 whose images are made by the consistency decoder. Frozen: it cannot be trained.

    `decoder`: TorchScript file.  `decoder_sha256`: its SHA-256; the default is that of OpenAI's file.  `noise_seed`:
    without a generator every image is decoded with the same noise of this seed, so it does not depend on its batch.
    The autoencoder's own decoder is kept, unused, so that its file fits.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int = 2,
        *,
        decoder: str,
        decoder_sha256: str = OPENAI_SHA256,
        noise_seed: int = 0,
        arch: KL8Config = KL8Config(),  # noqa: B008
        latent_scale: float | None = None,
        latent_shift: float = 0.0,
        weights: str | None = None,
    ) -> None:
        super().__init__(
            image_size,
            patch_size,
            arch=as_architecture(KL8Config, arch, double_z=True),
            latent_scale=latent_scale,
            latent_shift=latent_shift,
            weights=weights,
        )
        if self.arch.latent_channels != len(CHANNEL_MEANS) or self.arch.stride != STRIDE:
            raise ValueError(
                f"the consistency decoder is made for {len(CHANNEL_MEANS)} latent channels and stride {STRIDE}"
                f", not {self.arch.latent_channels} and {self.arch.stride}: use the architecture of KL-8"
            )
        self.decoder, self.decoder_sha256, self.noise_seed = decoder, decoder_sha256, noise_seed
        self.network: nn.Module | None = None

    def init_args(self) -> dict[str, Any]:
        arguments = super().init_args()
        arguments.pop("frozen")
        return arguments | {
            "decoder": self.decoder,
            "decoder_sha256": self.decoder_sha256,
            "noise_seed": self.noise_seed,
        }

    def set_network(self, network: nn.Module) -> None:
        """The decoder's network (see `denoise` for how it is called)."""
        for param in network.parameters():  # a TorchScript module has no requires_grad_ of its own
            param.requires_grad_(False)
        self.network = network.eval()

    def decode(self, x: Tensor, generator: Generators = None) -> Tensor:
        """Tokens (B, L, D) -> images (B, 3, H, W). Raises ValueError before the network was loaded."""
        if self.network is None:
            raise ValueError(
                f"the consistency decoder '{self.decoder}' was not loaded: call "
                f"lightning_modules.tokenizer_weights.load_tokenizer_weights"
            )
        latents = self.from_tokens(x)
        return consistency_decode(self.network, latents, self._noise(len(x), generator, latents.device))

    def _noise(self, batch: int, generator: Generators, device: torch.device) -> list[Tensor]:
        size = (IMAGE_CHANNELS, self.image_size, self.image_size)
        if generator is not None:
            return [randn((batch, *size), generator, device=device) for _ in SCHEDULE]
        fixed = Generator().manual_seed(self.noise_seed)  # on the CPU: the same on every device
        return [randn((1, *size), fixed, device="cpu").to(device) for _ in SCHEDULE]

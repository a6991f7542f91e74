"""KL-regularised image tokenizers: MAR's and LDM's KL-16, LDM's KL-8 (Rombach et al., arXiv 2112.10752).

raw = posterior moments (B, 2C, h, w), which can be cached; tokens = scaled samples of the posterior, drawn anew each
time. Images in [-1, 1] come back unclamped.
"""

from dataclasses import asdict
from typing import Any

from torch import Tensor

from layers.conv_autoencoder import AutoencoderConfig, ConvAutoencoder, Posterior
from layers.random import Generators, randn
from layers.tokenizers.conv import LatentTokenizer, as_architecture


class KLVAETokenizer(LatentTokenizer):
    """Latents of a KL autoencoder as continuous tokens.

    The default architecture is the KL-16 released with MAR, whose latent_scale is 0.2325, without subtracting the mean
    (MAR `engine_mar.py`); LDM's KL-16 adds decoder_attention (16,). For KL-8 see `KL8Config`, with patch_size 2.
    `weights`: file with the weights.  `frozen`: false to train it.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int = 1,
        *,
        arch: AutoencoderConfig = AutoencoderConfig(),  # noqa: B008 (dataclass defaults are never changed in place)
        latent_scale: float | None = None,
        latent_shift: float = 0.0,
        weights: str | None = None,
        frozen: bool = True,
    ) -> None:
        arch = as_architecture(AutoencoderConfig, arch, double_z=True)
        super().__init__(
            ConvAutoencoder(arch),
            arch,
            image_size=image_size,
            patch_size=patch_size,
            latent_scale=latent_scale,
            latent_shift=latent_shift,
            weights=weights,
            frozen=frozen,
        )

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

    def latents(self, raw: Tensor, generator: Generators = None) -> Tensor:
        """Moments (B, 2C, h, w) -> a sample of the posterior (B, C, h, w)."""
        posterior = Posterior(raw)
        return posterior.sample(randn(posterior.mean.shape, generator, device=raw.device))

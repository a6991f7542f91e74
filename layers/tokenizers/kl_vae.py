"""KL-regularised image tokenizers: MAR's and LDM's KL-16, LDM's KL-8 (Rombach et al., arXiv 2112.10752).

raw = posterior moments (B, 2C, h, w), which can be cached; tokens = scaled samples of the posterior, drawn anew each
time. Images in [-1, 1] come back unclamped.
"""

from layers.conv_autoencoder import AutoencoderConfig, ConvAutoencoder
from layers.tokenizers.conv import PosteriorTokenizer, as_architecture


class KLVAETokenizer(PosteriorTokenizer):
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

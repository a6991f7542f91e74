"""Tokenizers with a codebook: what all that give ids share, and VQ-16 of latent diffusion (Rombach et al., arXiv
2112.10752; LDM `models/first_stage_models/vq-f16`).

VQ-16 is the KL backbone without a posterior, and a codebook of 16384 codes of 8 channels. Two tokenizers: `VQTokenizer`
gives ids (B, L), `ContinuousVQTokenizer` the latents before quantisation, (B, L, D), as in MAR's Table 2.
"""

from dataclasses import asdict
from typing import Any

from torch import Tensor

from layers.codebook import Codebook
from layers.conv_autoencoder import AutoencoderConfig, ConvAutoencoder, ConvConfig, VQ16Config
from layers.maskgit_autoencoder import MaskGITAutoencoder
from layers.random import Generators
from layers.tokenizers.base import KEYS, Tokens
from layers.tokenizers.conv import ConvTokenizer, LatentTokenizer, as_architecture

VQ16_CODES = 16384


class IdTokenizer(ConvTokenizer):
    """Images as ids of the nearest codes: raw and tokens are int64 (B, L) in 0..vocab_size-1, in raster order.

    token_dim is 1, one id. `vae` has an encoder, a decoder and a Codebook `quantize`.
    """

    def __init__(
        self,
        vae: ConvAutoencoder | MaskGITAutoencoder,
        arch: ConvConfig,
        *,
        image_size: int,
        num_codes: int,
        weights: str | None,
        frozen: bool,
    ) -> None:
        super().__init__(vae, arch, image_size=image_size, patch_size=1, weights=weights, frozen=frozen)
        self.vocab_size, self.token_dim = num_codes, 1

    def init_args(self) -> dict[str, Any]:
        return {
            "image_size": self.image_size,
            "arch": asdict(self.arch),
            "num_codes": self.vocab_size,
            "weights": self.weights,
            "frozen": self.frozen,
        }

    def encode_image(self, images: Tensor) -> Tensor:
        return self.vae.quantize.nearest(self.encode(images))

    def encode_raw(self, raw: Tensor, generator: Generators = None) -> Tokens:
        return Tokens(raw.long())

    def decode(self, x: Tensor) -> Tensor:
        """ids (B, L) -> images (B, 3, H, W). Raises ValueError for an id that is no code (a mask token, say)."""
        return self.vae.decode(self.codes(x))

    def codes(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> the decoder's input (B, C, h, w). Raises ValueError for an id that is no code."""
        self.require_weights()
        if not ids.is_meta:
            low, high = (int(value) for value in ids.aminmax())
            if low < 0 or high >= self.vocab_size:
                raise ValueError(
                    f"ids lie in {low}..{high}, the codebook has 0..{self.vocab_size - 1}: they are of another "
                    f"tokenizer, or the model was given another vocabulary than {KEYS}.num_codes"
                )
        return self.vae.quantize.latents(ids.long(), self.latent_size)


class VQAutoencoder(ConvAutoencoder):
    """Encoder, codebook, decoder: official `VQModel` without its losses."""

    def __init__(self, config: AutoencoderConfig, num_codes: int) -> None:
        super().__init__(config)
        self.quantize = Codebook(num_codes, config.latent_channels)


class VQTokenizer(IdTokenizer):
    """Ids of LDM's VQ-16. `weights`: file with the weights.  `frozen`: false to train it."""

    def __init__(
        self,
        image_size: int,
        *,
        arch: VQ16Config = VQ16Config(),  # noqa: B008
        num_codes: int = VQ16_CODES,
        weights: str | None = None,
        frozen: bool = True,
    ) -> None:
        arch = as_architecture(VQ16Config, arch, double_z=False)
        vae = VQAutoencoder(arch, num_codes)
        super().__init__(vae, arch, image_size=image_size, num_codes=num_codes, weights=weights, frozen=frozen)


class ContinuousVQTokenizer(LatentTokenizer):
    """Latents of the VQ autoencoder after quant_conv and before quantisation, as continuous tokens.

    `quantize_on_decode`: latents become their nearest codes before the decoder sees them, as in LDM's
    `VQModelInterface.decode`; false is its `force_not_quantize`. Which of the two MAR's Table 2 used is not published.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int = 1,
        *,
        arch: VQ16Config = VQ16Config(),  # noqa: B008
        num_codes: int = VQ16_CODES,
        quantize_on_decode: bool = True,
        latent_scale: float | None = None,
        latent_shift: float = 0.0,
        weights: str | None = None,
        frozen: bool = True,
    ) -> None:
        arch = as_architecture(VQ16Config, arch, double_z=False)
        super().__init__(
            VQAutoencoder(arch, num_codes),
            arch,
            image_size=image_size,
            patch_size=patch_size,
            latent_scale=latent_scale,
            latent_shift=latent_shift,
            weights=weights,
            frozen=frozen,
        )
        self.num_codes, self.quantize_on_decode = num_codes, quantize_on_decode

    def init_args(self) -> dict[str, Any]:
        return {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "arch": asdict(self.arch),
            "num_codes": self.num_codes,
            "quantize_on_decode": self.quantize_on_decode,
            "latent_scale": self.latent_scale,
            "latent_shift": self.latent_shift,
            "weights": self.weights,
            "frozen": self.frozen,
        }

    def latents(self, raw: Tensor, generator: Generators = None) -> Tensor:
        return raw.float()

    def decode_latents(self, latents: Tensor) -> Tensor:
        if self.quantize_on_decode:
            codebook = self.vae.quantize
            latents = codebook.latents(codebook.nearest(latents), self.latent_size)
        return self.vae.decode(latents)

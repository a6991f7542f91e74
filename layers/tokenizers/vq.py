"""VQ-16 of latent diffusion (Rombach et al., arXiv 2112.10752; LDM `models/first_stage_models/vq-f16`).

The KL backbone without a posterior, and a codebook of 16384 codes of 8 channels. Two tokenizers: `VQTokenizer` gives
ids (B, L), `ContinuousVQTokenizer` the latents before quantisation, (B, L, D), as in MAR's Table 2.
"""

from dataclasses import asdict
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from layers.conv_autoencoder import AutoencoderConfig, ConvAutoencoder, VQ16Config
from layers.random import Generators
from layers.tokenizers.base import Tokens
from layers.tokenizers.conv import ConvTokenizer, LatentTokenizer, as_architecture

VQ16_CODES = 16384
CHUNK = 2**25  # distances are taken for as many rows at a time as give this many float32 differences (128 MiB)


class Codebook(nn.Module):
    """Vectors, and the search for the nearest. Official `taming.modules.vqvae.quantize.VectorQuantizer2`."""

    def __init__(self, num_codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, channels)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)  # as official code starts

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> ids int64 (B, h*w) of the nearest codes; of equally near ones, the lowest. float32 island.

        Squared differences are summed directly: the expanded product would round equal distances apart.
        """
        rows = rearrange(latents.float(), "b c h w -> (b h w) c")
        codes = self.embedding.weight.float()
        size = max(1, CHUNK // codes.numel())
        ids = [(chunk[:, None] - codes).square().sum(-1).argmin(-1) for chunk in rows.split(size)]
        return torch.cat(ids).view(len(latents), -1)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 (B, L) -> codes (B, L, C)."""
        return self.embedding(ids)


class VQAutoencoder(ConvAutoencoder):
    """Encoder, codebook, decoder: official `VQModel` without its losses."""

    def __init__(self, config: AutoencoderConfig, num_codes: int) -> None:
        super().__init__(config)
        self.quantize = Codebook(num_codes, config.latent_channels)

    def codes(self, ids: Tensor, size: int) -> Tensor:
        """ids (B, size*size) -> quantised latents (B, C, size, size)."""
        return rearrange(self.quantize(ids), "b (h w) c -> b c h w", h=size, w=size)


class VQTokenizer(ConvTokenizer):
    """Images as ids of the nearest codes: raw and tokens are int64 (B, L) in 0..num_codes-1, in raster order.

    token_dim is 1, one id. `weights`: file with the weights.  `frozen`: false to train it.
    """

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
        self.require_weights()
        if not x.is_meta:
            low, high = (int(value) for value in x.aminmax())
            if low < 0 or high >= self.vocab_size:
                raise ValueError(f"ids lie in {low}..{high}, the codebook has 0..{self.vocab_size - 1}")
        return self.vae.decode(self.vae.codes(x.long(), self.latent_size))


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
            latents = self.vae.codes(self.vae.quantize.nearest(latents), self.latent_size)
        return self.vae.decode(latents)

"""MaskGIT's VQGAN for 256x256 images, the tokenizer of RAR (Yu et al., arXiv 2411.00776): the released
`maskgit-vqgan-imagenet-f16-256.bin` (bytedance/1d-tokenizer, `modeling/modules/maskgit_vqgan.py` and `titok.py`).

Stride 16 and 1024 codes of 256 numbers: 16x16 ids. Unusual: the network sees pixels in [0, 1], and decoded images are
cut down to one of the 256 grey levels, because the official pipeline truncates where ours rounds.
In: uint8 images (B, 3, H, W). Out: ids int64 (B, L), and images in [-1, 1] again.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from layers.codebook import Codebook
from layers.maskgit_autoencoder import MaskGITAutoencoder, MaskGITAutoencoderConfig
from layers.tokenizers.base import KEYS
from layers.tokenizers.conv import as_architecture
from layers.tokenizers.vq import IdTokenizer

MASKGIT_CODES = 1024
TOP_LEVEL = 255  # of uint8


@dataclass
class MaskGITVQConfig(MaskGITAutoencoderConfig):
    """Sizes of the released network. Raises ValueError if pixels were not in [0, 1] inside the network."""

    z_channels: int = 256
    double_z: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.unit_range:
            raise ValueError(f"unit_range is False, but MaskGIT's VQGAN sees [0, 1]: leave {KEYS}.arch.unit_range out")


class MaskGITVQAutoencoder(MaskGITAutoencoder):
    """Encoder, codebook, decoder, under the released names."""

    def __init__(self, config: MaskGITVQConfig, num_codes: int) -> None:
        super().__init__(config)
        self.quantize = Codebook(num_codes, config.latent_channels)

    def init_weights(self) -> None:
        """As flax starts, and codes as far apart as latents are then, whose variance is about 1 (ours).

        The official +-1/num_codes are all about equally far from such latents: few would be chosen, and few learn.
        """
        super().init_weights()
        nn.init.normal_(self.quantize.embedding.weight)


class MaskGITVQTokenizer(IdTokenizer):
    """Ids of MaskGIT's VQGAN. `weights`: file with the weights.  `frozen`: false to train it."""

    def __init__(
        self,
        image_size: int,
        *,
        arch: MaskGITVQConfig = MaskGITVQConfig(),  # noqa: B008 (never changed in place)
        num_codes: int = MASKGIT_CODES,
        weights: str | None = None,
        frozen: bool = True,
    ) -> None:
        arch = as_architecture(MaskGITVQConfig, arch, double_z=False)
        vae = MaskGITVQAutoencoder(arch, num_codes)
        if not frozen:
            vae.init_weights()
        super().__init__(vae, arch, image_size=image_size, num_codes=num_codes, weights=weights, frozen=frozen)

    def decode(self, x: Tensor) -> Tensor:
        """ids (B, L) -> images (B, 3, H, W) that `to_uint8` turns into the official bytes: uint8(255 * clamped).

        Raises ValueError for an id that is no code.
        """
        return (self.unit_images(x) * TOP_LEVEL).floor() / TOP_LEVEL * 2 - 1

    def unit_images(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> float32 images (B, 3, H, W) in [0, 1], as the official `decode` returns them."""
        return self.vae.decoder(self.codes(ids)).float().clamp(0, 1)

"""GIVT's beta-VAE (Tschannen et al., arXiv 2312.02116; official big_vision `models/proj/givt/cnn.py` and `vae.py`).

raw = posterior moments (B, 2C, h, w), which can be cached; tokens = samples of the posterior, drawn anew each time and
used as they are, without a scale. Unusual: a token of several latent positions is ordered (channel, row, column), not
(row, column, channel) as everywhere else here, because GIVT's flow adapter splits a token into its first and its second
half: halves of the channels in this order, as in the released adapters, and halves of the positions in ours.
"""

from collections.abc import Mapping

from einops import rearrange
from torch import Tensor

from layers.checkpoint import to_ours
from layers.conv_autoencoder import LOGVAR_RANGE, Posterior
from layers.maskgit_autoencoder import MaskGITAutoencoder, MaskGITAutoencoderConfig, flax_rules
from layers.tokenizers.base import KEYS
from layers.tokenizers.conv import PosteriorTokenizer, as_architecture


class BetaVAETokenizer(PosteriorTokenizer):
    """Latents of the beta-VAE as continuous tokens; the default architecture is that of the five released for ImageNet.

    `patch_size`: latent positions of a token, a side or (height, width); GIVT takes (1, 2) at 512 pixels, which gives
    a grid of (32, 16).  `weights`: file with the weights, a released `vae_imagenet_2012_beta_*_params` or one of ours.
    `frozen`: false to train it. Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int | tuple[int, int] = 1,
        *,
        arch: MaskGITAutoencoderConfig = MaskGITAutoencoderConfig(),  # noqa: B008 (never changed in place)
        latent_scale: float = 1.0,
        latent_shift: float = 0.0,
        weights: str | None = None,
        frozen: bool = True,
    ) -> None:
        arch = as_architecture(MaskGITAutoencoderConfig, arch, double_z=True)
        patch = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
        if len(patch) != 2:
            raise ValueError(f"patch_size is {patch_size}: set {KEYS}.patch_size to one number, or to height and width")
        vae = MaskGITAutoencoder(arch)
        if not frozen:
            vae.init_weights()
        super().__init__(
            vae,
            arch,
            image_size=image_size,
            patch_size=patch_size if isinstance(patch_size, int) else patch,
            latent_scale=latent_scale,
            latent_shift=latent_shift,
            weights=weights,
            frozen=frozen,
        )
        self.patch = patch

    def load_weights(self, state: Mapping[str, Tensor], *, origin: str) -> None:
        """As every tokenizer's; GIVT's names and layouts (`cnn_encoder/Conv_0/kernel`) are taken too."""
        if any("/" in name for name in state):
            try:
                state = to_ours(state, flax_rules(self.arch))
            except (ValueError, RuntimeError) as error:  # RuntimeError: of kernels that have another rank
                raise ValueError(f"{origin} does not fit {KEYS}.arch: {error}") from error
        super().load_weights(state, origin=origin)

    def posterior(self, raw: Tensor) -> Posterior:
        return Posterior(raw, logvar_range=LOGVAR_RANGE if self.arch.unit_range else None)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).clamp(-1, 1)

    def cut(self, latents: Tensor) -> Tensor:
        p, q = self.patch
        return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=q)

    def join(self, patches: Tensor) -> Tensor:
        (h, w), (p, q) = self.grid, self.patch
        return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=h, w=w, p=p, q=q)

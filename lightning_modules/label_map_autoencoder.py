"""Stage 1 of GIVT's form for image-to-map tasks: the VAE whose latents are a label map's tokens (Tschannen et al.,
arXiv 2312.02116; official `trainers/proj/givt/vae.py`).

Unusual: only maps are looked at, images are not; the reconstruction is a classification of each pixel.
In: ids (B, K, H, W). Out: losses; a checkpoint that serves as `weights` of stage 2's frozen tokenizer.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from layers.checkpoint import Rule
from layers.networks.label_map_vae import flax_rules, unrolled
from layers.random import Generators
from layers.tokenizers.base import KEYS, Tokenizer
from layers.tokenizers.label_map import Maps
from lightning_modules.base import Batch
from lightning_modules.config import as_config
from lightning_modules.label_maps import LabelMapModule
from lightning_modules.optim import OptimConfig


@dataclass
class LabelMapLoss:
    """loss = cross-entropy, the mean over pixels, summed over the maps, + kl_weight x KL."""

    kl_weight: float = 2.5e-4  # nats, summed over the latents of a map, mean over maps. Official beta
    ignore_zero: bool = False  # leave out pixels of id 0: of depth, those that were not measured

    def __post_init__(self) -> None:
        if self.kl_weight < 0:
            raise ValueError(f"loss.kl_weight is {self.kl_weight}: a weight cannot be negative")


class LabelMapAutoencoderModule(LabelMapModule):
    """Trains `tokenizer`, a LabelMapTokenizer with frozen false; see LabelMapModule for `score_images`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        loss: LabelMapLoss = LabelMapLoss(),  # noqa: B008 (dataclass defaults are never changed in place)
        score_images: int = 256,
        optim: OptimConfig = OptimConfig(lr=1e-3),  # noqa: B008
        init_from: str | None = None,
        init_key: str | None = None,
        compile: bool = False,
    ) -> None:
        loading = {"init_from": init_from, "init_key": init_key}
        super().__init__(tokenizer, optim, None, score_images=score_images, **loading, compile=compile)
        if self.tokenizer.frozen or self.tokenizer.weights:
            raise ValueError(
                f"the tokenizer is trained here: set {KEYS}.frozen=false and no weights; to start from a file, give "
                f"OFFICIAL= (--model.init_args.init_from)"
            )
        self.loss_config = as_config(LabelMapLoss, loss)
        self.save_arguments(
            tokenizer=self.tokenizer,
            loss=self.loss_config,
            score_images=score_images,
            optim=self.optim,
            compile=compile,
            **loading,
        )

    def no_weight_decay(self, name: str, param: nn.Parameter) -> bool:
        """Only kernels have weight decay: not the learned positions. Official `wd_mults`."""
        return name.endswith("pos_embed")

    def compiled_modules(self) -> list[nn.Module]:
        """Both ViTs; what lies between them is small, and the loss takes turns with them."""
        return [self.tokenizer.vae.encoder, self.tokenizer.vae.decoder]

    def training_loss(self, batch: Batch, generator: Generator | None = None) -> dict[str, Tensor]:
        """The loss; posterior noise as all training noise, by row of the global batch."""
        ids, tokenizer = self.tokenizer.stacked(batch), self.tokenizer
        shape = (len(ids), tokenizer.token_dim, *tokenizer.grid)
        return self.losses(ids, self.global_rows(torch.randn, *shape, generator=generator))

    def losses(self, ids: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Terms for given noise: ids (B, K, H, W), unit noise (B, D, h, w) -> scalars by name."""
        posterior = self.tokenizer.posterior(self.tokenizer.encode_image(ids))
        latents = posterior.sample(noise)
        terms = self.tokenizer.vae.reconstruction(latents, ids, ignore_zero=self.loss_config.ignore_zero)
        terms = {name: value.mean() for name, value in terms.items()}
        kl = posterior.kl().mean()
        return {"loss": sum(terms.values()) + self.loss_config.kl_weight * kl, **terms, "kl": kl}

    def predict_maps(self, images: Tensor, ids: Tensor, generator: Generators) -> Maps:
        """What comes back of the maps, from a sample of their posterior, as officially."""
        tokens = self.tokenizer.encode_raw(self.tokenizer.encode_image(ids), generator)
        return self.tokenizer.predict(tokens.x)

    # Files

    def official_rules(self) -> list[Rule]:
        """Official `models/proj/givt/vit.py`, layers apart."""
        rules = flax_rules(self.tokenizer.arch.num_heads)
        return [rule._replace(ours=f"tokenizer.vae.{rule.ours}") for rule in rules]

    def unrolled(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return unrolled(state)

"""Training of the tokenizers: KL autoencoders (Rombach et al., arXiv 2112.10752; official CompVis/latent-diffusion,
`LPIPSWithDiscriminator`) and vector-quantised ones (Esser et al., arXiv 2012.09841; `VQLPIPSWithDiscriminator`).

Unusual: discriminator and autoencoder train from one loss, one backward pass and one optimiser. Neither term's gradient
reaches the other side, so this is the official pair of optimisers but for one thing: both step from the same weights,
where LDM encodes the batch a second time, with the autoencoder just updated, for the discriminator's turn.
In: uint8 images (B, 3, H, W). Out: losses; a checkpoint that serves as `weights` of a frozen tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Generator, Tensor, nn

from layers.checkpoint import Rule
from layers.codebook import code_usage, entropy_loss
from layers.discriminator import (
    DiscriminatorConfig,
    PatchDiscriminator,
    adaptive_weight,
    frozen_call,
    hinge_discriminator,
    hinge_generator,
)
from layers.perceptual import PerceptualDistance
from layers.random import Generators
from layers.tokenizers.base import KEYS, Tokenizer, from_uint8
from layers.tokenizers.conv import LatentStatistics, LatentTokenizer, PosteriorTokenizer, latent_statistics
from layers.tokenizers.vq import IdTokenizer
from lightning_modules.base import Batch, GenerativeModule, eval_mode
from lightning_modules.config import as_config
from lightning_modules.optim import OptimConfig
from lightning_modules.pictures import rows_to_show, spread_rows
from lightning_modules.tokenizer_weights import read_autoencoder
from lightning_modules.weights import check_named, read_official

MEASURED_AT_ONCE = 64  # images


@dataclass
class AutoencoderObjective:
    """loss = n (l1 + l2 + perceptual) + kl or commitment, codebook and entropy + adaptive * disc_weight * adversarial.

    l1, l2: means over the values of all images; perceptual: mean over images. n is the number of values of an image
    (3 H W) with reduction "sum", which is how LDM weighs the KL term, and 1 with "mean", as in its VQ models.
    There are two conventions for a codebook. By the paper (van den Oord et al., arXiv 1711.00937, Eq. 3) and in MaskGIT
    beta = 0.25 is the commitment's weight: commitment_weight 0.25, codebook_weight 1. The code of taming, LDM and RAR
    has it on the other term, which is the default here: 1 and 0.25.
    """

    l1_weight: float = 1.0
    l2_weight: float = 0.0  # of squared differences of values in [-1, 1]
    reduction: Literal["sum", "mean"] = "sum"
    kl_weight: float = 1e-6  # where there is a posterior: nats, summed over an image's latents, mean over images
    commitment_weight: float = 1.0  # of ids: mean over latent values of (z - sg[code])^2, which moves the encoder
    codebook_weight: float = 0.25  # of ids: (sg[z] - code)^2, which moves the codes
    entropy_weight: float = 0.0  # of ids: keeps codes from dying (`entropy_loss`, of a process's images); MaskGIT: 0.1
    entropy_temperature: float = 0.01  # of the soft choice, in squared distances; MaskGIT's
    perceptual_weight: float = 0.0  # of LPIPS; LDM: 1. Needs the next two files, nothing is downloaded
    vgg: str | None = None  # torchvision's vgg16-397923af.pth, or those names in a safetensors file
    lpips: str | None = None  # vgg.pth of lpips 0.1 (also taming's): the five heads
    disc_weight: float = 0.5  # 0: no discriminator
    disc_start: int = 50_001  # optimiser step from which the discriminator learns and counts

    def __post_init__(self) -> None:
        weights = {name: value for name, value in vars(self).items() if name.endswith("_weight")}
        if bad := [name for name, value in weights.items() if value < 0]:
            raise ValueError(f"objective.{bad[0]} is {weights[bad[0]]}: a weight cannot be negative")
        if self.entropy_temperature <= 0:
            raise ValueError(f"objective.entropy_temperature is {self.entropy_temperature}: it must be positive")
        if not self.l1_weight + self.l2_weight + self.perceptual_weight:
            raise ValueError("nothing compares the reconstruction with the image: set objective.l1_weight or l2_weight")
        if self.perceptual_weight and not (self.vgg and self.lpips):
            raise ValueError(
                f"objective.perceptual_weight is {self.perceptual_weight}, which needs the files objective.vgg "
                f"(torchvision's vgg16-397923af.pth) and objective.lpips (vgg.pth of lpips 0.1): name them, or set it "
                f"to 0"
            )


class AutoencoderModule(GenerativeModule):
    """Trains `tokenizer`, a KLVAETokenizer, BetaVAETokenizer, VQTokenizer or MaskGITVQTokenizer with frozen false; see
    GenerativeModule for the rest.

    Labels are not used (`num_classes` follows the data all the same). Latents are trained as they are: latent_scale
    comes afterwards, see `measure_latents`. Raises ValueError for other tokenizers and for sizes that do not fit.
    """

    OFFICIAL_KEYS = ("model",)

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_classes: int = 1000,
        objective: AutoencoderObjective = AutoencoderObjective(),  # noqa: B008 (never changed in place)
        discriminator: DiscriminatorConfig = DiscriminatorConfig(),  # noqa: B008
        optim: OptimConfig = OptimConfig(lr=1e-4, betas=(0.5, 0.9)),  # noqa: B008
        init_from: str | None = None,
        init_key: str | None = None,
        init_classes: Literal["keep", "new"] = "keep",
        compile: bool = False,
    ) -> None:
        loading = {"init_from": init_from, "init_key": init_key, "init_classes": init_classes}
        super().__init__(tokenizer, num_classes, optim, None, **loading, compile=compile)
        check_tokenizer(self.tokenizer)
        self.objective = as_config(AutoencoderObjective, objective)
        config = as_config(DiscriminatorConfig, discriminator)
        self.discriminator = self._discriminator(config) if self.objective.disc_weight else None
        self.perceptual = PerceptualDistance() if self.objective.perceptual_weight else None
        self.save_arguments(
            tokenizer=self.tokenizer,
            num_classes=num_classes,
            objective=self.objective,
            discriminator=config,
            optim=self.optim,
            **loading,
            compile=compile,
        )

    def _discriminator(self, config: DiscriminatorConfig) -> PatchDiscriminator:
        if self.tokenizer.image_size < config.smallest_image:
            raise ValueError(
                f"images of {self.tokenizer.image_size} pixels are too small for a discriminator of "
                f"{config.num_layers} layers, which needs {config.smallest_image}: lower discriminator.num_layers, or "
                f"set objective.disc_weight to 0"
            )
        return PatchDiscriminator(config)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.perceptual is not None:
            files = [self.objective.vgg, self.objective.lpips]
            self.perceptual.load_weights(read_files(files), origin=" and ".join(files))

    def compiled_modules(self) -> list[nn.Module]:
        """All but the decoder's ends: the last weight's gradient is taken apart, which compiled code does not allow."""
        vae = self.tokenizer.vae
        return [vae.encoder, vae.decoder.mid, *vae.decoder.up]

    # Losses

    def training_loss(self, batch: Batch, generator: Generator | None = None) -> dict[str, Tensor]:
        """The objective; posterior noise as all training noise, by row of the global batch."""
        images, noise = batch["image"], None
        if isinstance(self.tokenizer, PosteriorTokenizer):
            size, channels = self.tokenizer.latent_size, self.tokenizer.arch.latent_channels
            noise = self.global_rows(torch.randn, len(images), channels, size, size, generator=generator)
        return self.losses(images, noise)

    def losses(self, images: Tensor, noise: Tensor | None) -> dict[str, Tensor]:
        """Terms for given noise: uint8 images (B, 3, H, W), unit noise (B, C, h, w) or None for VQ -> scalars by name.

        In training "loss" also holds the discriminator's own loss. In eval mode the discriminator is left out, and
        "psnr" is added.
        """
        objective, target = self.objective, from_uint8(images)
        latents, penalty, terms = self.bottleneck(self.encode(images), noise)
        output = self.tokenizer.vae.decode(latents).float()
        distance, distances = self.distance(output, target)
        reconstruction = distance * (target[0].numel() if objective.reduction == "sum" else 1)
        loss, terms = reconstruction + penalty, distances | terms
        if not self.training:
            return {"loss": loss, **terms, "psnr": psnr(output, target).mean()}
        if self.discriminator is not None:
            added, adversarial = self.adversarial(output, target, reconstruction)
            loss, terms = loss + added, terms | adversarial
        return {"loss": loss, **terms}

    def encode(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> what the encoder gives, in the precision of training; frozen ones encode in float32.

        Raises ValueError if the images have another size than the tokenizer's.
        """
        self.tokenizer.check_size(images)
        return self.tokenizer.vae.encode(from_uint8(images))

    def bottleneck(self, encoded: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What the encoder gives -> latents (B, C, h, w) for the decoder, their weighted penalty, its terms by name."""
        if isinstance(self.tokenizer, IdTokenizer):
            return self._quantised(encoded)
        posterior = self.tokenizer.posterior(encoded)
        kl = posterior.kl().mean()
        return posterior.sample(noise), self.objective.kl_weight * kl, {"kl": kl}

    def _quantised(self, encoded: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Nearest codes, whose gradient goes straight through to the encoder.

        Among the terms: which part of the codebook the images of this process's batch use (see `code_usage`).
        """
        objective, codebook = self.objective, self.tokenizer.vae.quantize
        ids = codebook.nearest(encoded)
        codes = codebook.latents(ids, self.tokenizer.latent_size)
        terms = {
            "commitment": (encoded - codes.detach()).square().mean(),
            "codebook": (encoded.detach() - codes).square().mean(),
        }
        penalty = objective.commitment_weight * terms["commitment"] + objective.codebook_weight * terms["codebook"]
        if objective.entropy_weight:
            terms["entropy"] = entropy_loss(codebook.distances(encoded), objective.entropy_temperature)
            penalty = penalty + objective.entropy_weight * terms["entropy"]
        terms |= code_usage(ids, self.tokenizer.vocab_size)
        return encoded + (codes - encoded).detach(), penalty, terms

    def distance(self, output: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted mean distance of images (B, 3, H, W) in [-1, 1], and its terms by name."""
        objective, error = self.objective, output - target
        terms = {"rec": objective.l1_weight * error.abs().mean() + objective.l2_weight * error.square().mean()}
        if self.perceptual is None:
            return terms["rec"], terms
        terms["perceptual"] = self.perceptual(output, target).mean()
        return terms["rec"] + objective.perceptual_weight * terms["perceptual"], terms

    def adversarial(self, output: Tensor, target: Tensor, reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Both sides' terms: what is added to the loss, and its parts by name."""
        discriminator = self.discriminator
        if self.global_step < self.objective.disc_start:
            # a zero that all parameters have a part in: distributed training waits for a gradient of each
            return 0.0 * sum(p.sum() for p in discriminator.parameters()), {}
        adversarial = hinge_generator(frozen_call(discriminator, output).float())
        weight = adversarial.new_zeros(())  # counting FLOPs takes no gradient
        if torch.is_grad_enabled():
            weight = adaptive_weight(reconstruction, adversarial, self.tokenizer.vae.decoder.conv_out.weight)
        disc = hinge_discriminator(discriminator(target).float(), discriminator(output.detach()).float())
        terms = {"adversarial": adversarial, "adaptive": weight, "disc": disc}
        return self.objective.disc_weight * weight * adversarial + disc, terms

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Each side by its own norm, as with two optimisers: the autoencoder's gradient is far the larger one."""
        if not gradient_clip_val or gradient_clip_algorithm == "value" or self.discriminator is None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for side in (self.tokenizer, self.discriminator):
            nn.utils.clip_grad_norm_(side.parameters(), gradient_clip_val)

    # Pictures and figures

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 3, H, W), nominally in [-1, 1], from the posterior's mean or the codes."""
        with eval_mode(self):
            encoded, vae = self.encode(images.to(self.device)), self.tokenizer.vae
            if isinstance(self.tokenizer, PosteriorTokenizer):
                return vae.decode(self.tokenizer.posterior(encoded).mean).float()
            ids = vae.quantize.nearest(encoded)
            return vae.decode(vae.quantize.latents(ids, self.tokenizer.latent_size)).float()

    def originals(self, datamodule: Any, count: int) -> Tensor:
        """`count` images, or all if there are fewer, spread over the validation set (else the training set): uint8."""
        return torch.cat([row["image"] for row in spread_rows(rows_to_show(datamodule), count)]).to(self.device)

    def sample(self, labels: Tensor | Sequence[int], sampling: Any = None, generator: Generators = None) -> NoReturn:
        """Raises ValueError: there are no labels here to draw images for."""
        raise ValueError(
            "an autoencoder draws no images: make sample and `reconstruct` show what comes back of given ones, and "
            "figures of drawn images (make eval, make sweep, fid.every_n_steps) are of no use for it"
        )

    def measure_latents(self, datamodule: Any, count: int, *, seed: int = 0) -> LatentStatistics:
        """Mean and standard deviation of posterior samples over `count` images, spread over the training set.

        Raises ValueError for ids, which have no scale.
        """
        if not isinstance(self.tokenizer, LatentTokenizer):
            raise ValueError(f"the tokens of {type(self.tokenizer).__name__} are ids: they have no scale to measure")
        images = (row["image"] for row in spread_rows(datamodule.train_set, count))
        chunks = iter(lambda: list(islice(images, MEASURED_AT_ONCE)), [])
        batches = ({"image": torch.cat(chunk).to(self.device)} for chunk in chunks)
        generator = Generator(self.device).manual_seed(seed)
        return latent_statistics(self.tokenizer, batches, generator=generator)

    # Files

    def official_rules(self) -> list[Rule]:
        """LDM's names: the autoencoder's own, and its discriminator among the losses."""
        return [Rule("loss.discriminator.*", "discriminator.*"), Rule("*", "tokenizer.vae.*")]

    def load_official(self, path: str | Path, *, key: str | None = None) -> None:
        """The autoencoder of any file that serves as a tokenizer's weights; the discriminator stays as it is."""
        if key is not None:
            raise ValueError(
                f"'{key}' cannot be chosen in {path}: an autoencoder's average is taken where there is one"
            )
        state, _ = read_autoencoder(path)
        self.tokenizer.load_weights(state, origin=str(path))


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise ValueError unless this tokenizer can be trained here."""
    if not isinstance(tokenizer, PosteriorTokenizer | IdTokenizer):
        raise ValueError(
            f"{type(tokenizer).__name__} is not trained here: set --model.init_args.tokenizer to "
            f"layers.tokenizers.kl_vae.KLVAETokenizer, beta_vae.BetaVAETokenizer, vq.VQTokenizer or "
            f"maskgit_vq.MaskGITVQTokenizer"
        )
    if tokenizer.frozen:
        raise ValueError(f"the tokenizer is frozen, so there is nothing to train: set {KEYS}.frozen=false")
    if tokenizer.weights:
        raise ValueError(
            f"{KEYS}.weights is '{tokenizer.weights}', but this one is trained: to start from a file, "
            f"give OFFICIAL= (--model.init_args.init_from)"
        )


def read_files(paths: list[str]) -> dict[str, Tensor]:
    """Tensors of several weight files in one dict. Raises FileNotFoundError with the cure."""
    state: dict[str, Tensor] = {}
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no file at '{path}' (objective.vgg: torchvision's vgg16-397923af.pth; objective.lpips: vgg.pth of "
                f"lpips 0.1): put it there, or train without it by --model.init_args.objective.perceptual_weight=0"
            )
        check_named(path)
        state |= read_official(path, None, keys=())
    return state


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of clamped images (B, 3, H, W) in [-1, 1]: (B,)."""
    error = (output.clamp(-1, 1) - target).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp_min(1e-10))

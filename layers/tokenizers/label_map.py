"""Label maps as continuous tokens: the tokenizer of GIVT's form for image-to-map tasks, after UViM (arXiv 2205.10337).

raw = posterior moments (B, 2 D, h, w), which can be cached; tokens = samples of the posterior, unscaled, raster order.
Unusual: what goes in and comes out are maps, not images; `decode` colours them, so that there is a picture.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from layers.checkpoint import to_ours
from layers.conv_autoencoder import Posterior
from layers.label_maps import bins_of_depth, depth_of_bins, depth_picture, panoptic_map, panoptic_picture
from layers.networks.label_map_vae import LabelMapVAE, LabelMapVAEConfig, flax_rules, unrolled
from layers.random import Generators, randn
from layers.tokenizers.base import KEYS, Tokens
from layers.tokenizers.learned import LearnedTokenizer

PANOPTIC, DEPTH = {"semantics", "instances"}, {"depth"}
Maps = dict[str, Tensor]  # name -> ids (B, H, W)


class LabelMapTokenizer(LearnedTokenizer):
    """Tokens of maps of `image_size` pixels a side, with `classes` = {name: number of ids}.

    The names say what the maps are: semantics (class 0 is void) and instances, both ids; or depth, numbers that are put
    into bins from `min_depth` to `max_depth` (bin 0, all that is not above, is unknown). Their order is that of the
    one-hot channels. A batch has a map under each name.
    `min_fraction`: predicted instances on no more than that share of the pixels are dropped.  `weights`: file with the
    weights, a released `vae_*_params.npz` or one of ours.  `frozen`: false to train it.
    Raises ValueError for other names and for sizes that do not fit.
    """

    def __init__(
        self,
        image_size: int,
        *,
        classes: dict[str, int],
        arch: LabelMapVAEConfig = LabelMapVAEConfig(),  # noqa: B008 (dataclass defaults are never changed in place)
        min_depth: float = 0.001,
        max_depth: float = 10.0,
        min_fraction: float = 0.0,
        weights: str | None = None,
        frozen: bool = True,
    ) -> None:
        if set(classes) not in (PANOPTIC, DEPTH) or min(classes.values()) < 2:
            raise ValueError(
                f"classes are {classes}: set {KEYS}.classes to {{instances: 100, semantics: 134}} or {{depth: 256}}, "
                f"with your numbers of ids, at least 2"
            )
        if not min_depth < max_depth:
            raise ValueError(f"min_depth {min_depth} is not below max_depth {max_depth}: set {KEYS}.max_depth")
        if not 0 <= min_fraction < 1:
            raise ValueError(f"min_fraction is {min_fraction}: it is a share of the pixels, 0 to drop no instance")
        arch = LabelMapVAEConfig(**arch) if isinstance(arch, Mapping) else arch
        super().__init__(
            LabelMapVAE(arch, classes=classes, size=(image_size, image_size)), weights=weights, frozen=frozen
        )
        self.image_size, self.arch, self.classes = image_size, arch, dict(classes)
        self.min_depth, self.max_depth, self.min_fraction = min_depth, max_depth, min_fraction
        self.grid, self.token_dim = (arch.code_side, arch.code_side), arch.token_dim

    def init_args(self) -> dict[str, Any]:
        return {
            "image_size": self.image_size,
            "classes": self.classes,
            "arch": asdict(self.arch),
            "min_depth": self.min_depth,
            "max_depth": self.max_depth,
            "min_fraction": self.min_fraction,
            "weights": self.weights,
            "frozen": self.frozen,
        }

    @property
    def panoptic(self) -> bool:
        """Whether the maps are of classes and instances, not of depth."""
        return set(self.classes) == PANOPTIC

    def load_weights(self, state: Mapping[str, Tensor], *, origin: str) -> None:
        """As every tokenizer's; official names and layouts are taken too, with layers in one array or apart.

        Raises ValueError that says what to set, if the file's tokens have another length.
        """
        if any("/" in name for name in state):
            try:
                state = to_ours(unrolled(state), flax_rules(self.arch.num_heads))
            except (ValueError, RuntimeError) as error:  # RuntimeError: of kernels that have another rank
                raise ValueError(f"{origin} does not fit {KEYS}.arch: {error}") from error
        found = state["decoder_stem.weight"].shape[1] if "decoder_stem.weight" in state else self.token_dim
        if found != self.token_dim:
            raise ValueError(
                f"{origin} has tokens of {found} numbers, this tokenizer {self.token_dim}: set {KEYS}.arch.token_dim="
                f"{found}"
            )
        super().load_weights(state, origin=origin)

    # Maps -> tokens

    def forward(self, batch: Mapping[str, Tensor], generator: Generators = None) -> Tokens:
        """A batch with `raw` (cached) or a map (B, H, W) under each name -> Tokens."""
        raw = batch["raw"] if "raw" in batch else self.encode_image(self.stacked(batch))
        return self.encode_raw(raw, generator)

    def stacked(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The batch's maps (B, K, H, W) as ids, in the order of `classes`; depth is put into bins.

        Raises ValueError if it lacks one, or has one of another size.
        """
        for name in self.classes:
            if name not in batch:
                raise ValueError(
                    f"the data gives no map '{name}', only {', '.join(batch)}: take data of the task that "
                    f"{KEYS}.classes names"
                )
            if tuple(batch[name].shape[-2:]) != (self.image_size, self.image_size):
                raise ValueError(
                    f"maps are {batch[name].shape[-2]}x{batch[name].shape[-1]}, the tokenizer expects "
                    f"{self.image_size}: give --data.init_args.image_size and {KEYS}.image_size the same value"
                )
        if self.panoptic:
            return torch.stack([batch[name] for name in self.classes], dim=1)
        return bins_of_depth(batch["depth"], self.classes["depth"], low=self.min_depth, high=self.max_depth)[:, None]

    def encode_image(self, images: Tensor) -> Tensor:
        """Maps (B, K, H, W) -> moments (B, 2 D, h, w). float32 island while frozen, as the official code encodes."""
        self.require_weights()
        if images.is_meta or not self.frozen:  # autocast does not know meta tensors
            return self.vae.encode(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.vae.encode(images)

    def posterior(self, raw: Tensor) -> Posterior:
        """The distribution that the moments (B, 2 D, h, w) stand for."""
        return Posterior(raw, logvar_range=None)

    def encode_raw(self, raw: Tensor, generator: Generators = None) -> Tokens:
        posterior = self.posterior(raw)
        latents = posterior.sample(randn(posterior.mean.shape, generator, device=raw.device))
        return Tokens(latents.flatten(2).transpose(1, 2))  # (B, L, D)

    # Tokens -> maps

    def predict(self, x: Tensor) -> Maps:
        """Tokens (B, L, D) -> ids (B, H, W) of each map by name."""
        return self.ids(self.vae.decode(self.latents(x)))

    def latents(self, x: Tensor) -> Tensor:
        """Tokens (B, L, D) -> latents (B, D, h, w)."""
        self.require_weights()
        return x.float().transpose(1, 2).unflatten(2, self.grid)

    def ids(self, logits: Mapping[str, Tensor]) -> Maps:
        """Logits (B, H, W, classes) by name -> the maps that they mean."""
        if not self.panoptic:
            return {"depth": logits["depth"].argmax(-1)}
        return panoptic_map(**logits, min_fraction=self.min_fraction)

    def depth(self, bins: Tensor) -> Tensor:
        """Bins -> depth, in the unit of `max_depth`."""
        return depth_of_bins(bins, self.classes["depth"], low=self.min_depth, high=self.max_depth)

    def decode(self, x: Tensor) -> Tensor:
        return self.picture(self.predict(x))

    def picture(self, maps: Mapping[str, Tensor]) -> Tensor:
        """Maps of ids (B, H, W) by name -> colours (B, 3, H, W) in [-1, 1]."""
        if self.panoptic:
            return panoptic_picture(maps["semantics"], maps["instances"])
        return depth_picture(maps["depth"], self.classes["depth"])

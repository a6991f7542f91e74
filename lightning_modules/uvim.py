"""Stage 2 of GIVT's form for image-to-map tasks, after UViM: panoptic segmentation, depth (Tschannen et al., arXiv
2312.02116; Kolesnikov et al., arXiv 2205.10337; official `givt_coco_panoptic.py`, `givt_nyu_depth.py`).

A ViT sees the image, a causal GIVT draws the tokens of its label map, and the frozen VAE of stage 1 makes the map of
them. Unusual: one Gaussian per channel; tokens are searched for by beams that branch in random draws.
In: images and maps (datamodules/label_maps.py). Out: losses; maps (B, H, W) by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Generator, Tensor, nn

from layers.checkpoint import Rule, check_fit, to_ours
from layers.checks import check_positive
from layers.flax_layout import linear_rules
from layers.heads.gmm import GMMHead
from layers.networks.givt import GIVTConfig
from layers.networks.uvim import UViM, classifier_to_encoder, decoder_rules, encoder_rules, unrolled
from layers.networks.vit import ViTConfig
from layers.precision import compute_dtype
from layers.random import Generators, token_noise
from layers.samplers.autoregressive import Beams, beam_search
from layers.tokenizers.base import KEYS, Tokenizer, from_uint8
from layers.tokenizers.label_map import Maps
from lightning_modules.base import Batch, eval_mode
from lightning_modules.config import as_config
from lightning_modules.flax_files import read_npz
from lightning_modules.label_maps import LabelMapModule
from lightning_modules.optim import OptimConfig
from lightning_modules.pretrained import TRAINED_TOKENIZER


@dataclass
class UViMSearch:
    """How tokens are drawn; the defaults are those of panoptic segmentation. Official `ar_generation_config`."""

    temperature: float = 0.85  # factor of the standard deviations
    num_beams: int = 4  # 1, with one fan: plain sampling
    num_fans: int = 8  # draws that each beam branches into

    def __post_init__(self) -> None:
        check_positive("search", self, "temperature", "num_beams", "num_fans")


class UViMModule(LabelMapModule):
    """Training and prediction; see GenerativeModule and LabelMapModule for the common arguments.

    encoder, decoder: sizes of the image encoder and of GIVT.  num_mixtures: Gaussians per channel.  encoder_from: npz
    file of a ViT classifier that the image encoder starts from (big_vision's, such as "howto-i21k-L/16").
    encoder_lr: what the encoder's learning rate is multiplied by.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        encoder: ViTConfig = ViTConfig(),  # noqa: B008 (dataclass defaults are never changed in place)
        decoder: GIVTConfig = GIVTConfig(dropout=0.0),  # noqa: B008
        num_mixtures: int = 1,
        search: UViMSearch = UViMSearch(),  # noqa: B008
        score_images: int = 256,
        encoder_from: str | None = None,
        encoder_lr: float = 0.1,
        optim: OptimConfig = OptimConfig(lr=1e-3, optimizer="adafactor"),  # noqa: B008
        init_from: str | None = None,
        init_key: str | None = None,
        compile: bool = False,
    ) -> None:
        search = as_config(UViMSearch, search)
        loading = {"init_from": init_from, "init_key": init_key}
        super().__init__(tokenizer, optim, search, score_images=score_images, **loading, compile=compile)
        self.tokenizer.requires_grad_(False)  # stage 1 trained it
        encoder, decoder = as_config(ViTConfig, encoder), as_config(GIVTConfig, decoder)
        sizes = {"seq_len": self.tokenizer.seq_len, "token_dim": self.tokenizer.token_dim}
        self.net = UViM(encoder, decoder, size=(self.tokenizer.image_size,) * 2, **sizes)
        init = "zero" if num_mixtures == 1 else "spread"  # one component has nothing to be told apart from
        options = {"num_mixtures": num_mixtures, "kind": "per_channel", "init": init}
        self.head = GMMHead(self.tokenizer.token_dim, decoder.width, **options)
        self.encoder_from, self.encoder_lr = encoder_from, encoder_lr
        self.save_arguments(
            tokenizer=self.tokenizer,
            encoder=encoder,
            decoder=decoder,
            num_mixtures=num_mixtures,
            search=search,
            score_images=score_images,
            encoder_from=encoder_from,
            encoder_lr=encoder_lr,
            optim=self.optim,
            compile=compile,
            **loading,
        )

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.encoder_from and not self.init_from and self.is_first_start(stage):
            self.load_encoder(self.encoder_from)

    # Optimiser

    def no_weight_decay(self, name: str, param: nn.Parameter) -> bool:
        """Only kernels have weight decay: not the positions, not the first input. Official `wd_mults`."""
        return name.endswith(("pos_embed", "embedding_table.weight"))

    def lr_multiplier(self, name: str, param: nn.Parameter) -> float:
        return self.encoder_lr if name.startswith("net.encoder.") else 1.0

    def factored_shape(self, name: str, param: nn.Parameter) -> Sequence[int]:
        return by_heads(name, param.shape, self.num_heads(name.startswith("net.encoder.")))

    def num_heads(self, of_encoder: bool) -> int:
        """Attention heads of a half."""
        blocks = self.net.encoder.trunk.blocks if of_encoder else self.net.decoder.blocks
        return blocks[0].attn.num_heads

    # Training

    def compiled_modules(self) -> list[nn.Module]:
        return [self.net]

    def training_loss(self, batch: Batch, generator: Generator | None = None) -> dict[str, Tensor]:
        """Negative log-likelihood in nats: "loss" is the mean over channels, "nats_per_token" their sum."""
        with torch.no_grad():
            x = self.tokens(batch, generator).x
        nll = self.head.nll(self.net(from_uint8(batch["image"]), x), x).mean()
        return {"loss": nll / self.tokenizer.token_dim, "nats_per_token": nll}

    # Prediction

    @torch.no_grad()
    def predict(self, images: Tensor, search: UViMSearch | None = None, generator: Generators = None) -> Maps:
        """Maps (B, H, W) by name for uint8 images (B, 3, H, W): "semantics" and "instances", ids, or "depth".

        `search` overrides the module's settings. `generator`: one for the batch, or a sequence with one per image.
        Raises ValueError for images of another size.
        """
        size = self.tokenizer.image_size
        if tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(f"images are {tuple(images.shape[1:])}, this model takes (3, {size}, {size}): resize them")
        with eval_mode(self):
            beams = self.beams(images.to(self.device), search or self.sampling, generator)
            return self.in_units(self.tokenizer.predict(beams.tokens[:, 0]))

    def predict_maps(self, images: Tensor, ids: Tensor, generator: Generators) -> Maps:
        return self.tokenizer.predict(self.beams(images, self.sampling, generator).tokens[:, 0])

    def beams(self, images: Tensor, search: UViMSearch, generator: Generators = None) -> Beams:
        """Sequences of tokens for uint8 images (B, 3, H, W), the likeliest that was found first."""
        copies, settings = search.num_beams, {"temperature": search.temperature}
        cache = self.net.decoder.init_cache(len(images) * copies, dtype=compute_dtype(self.device), device=self.device)
        draws, dim = self.head.noise_shape(1, "closed_form")

        def propose(h: Tensor, place: int, fans: int) -> tuple[Tensor, Tensor]:
            noise = token_noise(len(images), draws, copies * fans, dim, generator=generator, device=self.device)
            drawn = self.head.sample_with_log_prob(h.repeat_interleave(fans, dim=0), noise, **settings)
            tokens, log_probs = (part.unflatten(0, (-1, fans)) for part in drawn)
            return tokens, log_probs

        return beam_search(
            self.net.prefill(from_uint8(images), cache, copies=copies),
            lambda token, place: self.net.step(token, place, cache),
            propose,
            cache.reorder,
            self.tokenizer.seq_len,
            num_beams=copies,
            num_fans=search.num_fans,
        )

    # Files

    def official_rules(self) -> list[Rule]:
        """Official `models/proj/givt/givt.py` with an encoder, blocks apart."""
        parts = {
            "net.encoder.": encoder_rules(self.num_heads(of_encoder=True)),
            "net.decoder.": decoder_rules(self.num_heads(of_encoder=False)),
            "head.": linear_rules("decoder/LogitsDense", "linear"),
        }
        rules = [rule._replace(ours=f"{prefix}{rule.ours}") for prefix, rules in parts.items() for rule in rules]
        return [*rules, TRAINED_TOKENIZER]

    def unrolled(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return unrolled(state)

    def ours_from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As every module's. Raises ValueError that says what to set, if the file's tokens have another length."""
        kernel = state.get("EmbedTargets/kernel")
        if kernel is not None and len(kernel) != self.tokenizer.token_dim:
            raise ValueError(
                f"the file's tokens have {len(kernel)} numbers, this model's {self.tokenizer.token_dim}: set "
                f"{KEYS}.arch.token_dim={len(kernel)}, and take the tokenizer that goes with it"
            )
        return super().ours_from_official(state)

    def load_encoder(self, path: str | Path) -> None:
        """Start the image encoder from a ViT classifier's npz file; positions are resampled, the classifier left out.

        Raises FileNotFoundError, or ValueError for a file that does not fit.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no file at '{path}' (encoder_from: a ViT of big_vision's in npz format): put it there, or start from "
                f"nothing by --model.init_args.encoder_from=null and encoder_lr=1"
            )
        try:
            official = classifier_to_encoder(read_npz(path), self.net.encoder.grid)
            state = to_ours(official, encoder_rules(self.num_heads(of_encoder=True)))
        except ValueError as error:
            raise ValueError(f"{path} is no ViT that the image encoder could start from: {error}") from error
        check_fit(state, self.net.encoder.state_dict(), origin=str(path))
        self.net.encoder.load_state_dict(state)
        rank_zero_info(f"image encoder: {len(state)} tensors of {path}")


def by_heads(name: str, shape: Sequence[int], num_heads: int) -> Sequence[int]:
    """The shape of an attention weight with its heads apart, as in the official kernels [E, N, d] and [N, d, E]; any
    other parameter's as it is."""
    parts = {"qkv": 3, "kv": 2, "q": 1}.get(name.split(".")[-2])
    if parts:
        return parts, num_heads, shape[0] // parts // num_heads, *shape[1:]
    if name.endswith(".proj.weight"):
        return shape[0], num_heads, shape[1] // num_heads
    return shape

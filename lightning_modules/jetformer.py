"""JetFormer: raw pixels and text in one likelihood model (Tschannen et al., arXiv 2411.19722; big_vision
`proj/jetformer`).

A flow turns patches into latents, a causal Transformer models some numbers of each by a Gaussian mixture and the words
of a text by a softmax, the other numbers are standard normal: bits per dimension of pixels are all that is trained.
Unusual: no tokenizer, but noise on the pixels that fades while training; image and text come in either order.
In: uint8 images, class labels or captions. Out: losses, images, captions, likelihoods.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn

from layers.checkpoint import Rule
from layers.checks import check_share
from layers.flows import jet
from layers.flows.factored import OFFICIAL, FactorConfig, FactoredFlow, factored_rules
from layers.flows.jet import JetConfig
from layers.flows.linear import PCA
from layers.guidance import for_branches
from layers.heads.gmm import GMMHead
from layers.heads.mixtures import check_temperatures
from layers.networks import jetformer
from layers.networks.jetformer import DecoderConfig, JetFormerDecoder, decoder_rules
from layers.precision import cast_linear_
from layers.random import Generators, randn, token_noise
from layers.samplers.autoregressive import autoregress
from layers.text.base import TextTokenizer
from layers.text.batches import TextBatch, label_batch
from layers.tokenizers.base import Tokenizer, Tokens
from layers.tokenizers.dequantised import DequantisedTokenizer
from lightning_modules.base import Batch, GenerativeModule, planned_steps
from lightning_modules.config import as_config
from lightning_modules.flow_start import fit_components, load_flow
from lightning_modules.image_text import ImageText
from lightning_modules.likelihood import likelihood_terms
from lightning_modules.optim import OptimConfig
from lightning_modules.pretrained import TRAINED_TOKENIZER
from lightning_modules.protocol import Protocol
from lightning_modules.text import WithText, as_text_tokenizer, text_config


@dataclass
class HeadConfig:
    """The mixture of a soft token. Official `get_pdf`."""

    num_mixtures: int = 1024
    scale_min: float = 1e-6
    # zero: the official one, with which equal components get equal gradients and may never part; spread: apart at once
    init: Literal["spread", "zero"] = "spread"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the product that makes its parameters


@dataclass
class JetFormerObjective:
    """What is learnt of an example, and what noise is on it, by default with class labels. Official `train.py`."""

    text_first_prob: float = 1.0  # share of examples of which the image is learnt, given the text; else the reverse
    text_weight: float = 0.0025  # of nats per word beside bits per dimension
    loss_on_prefix: bool = False  # what comes first is learnt, too; off in all published configurations
    prefix_drop_prob: float = 0.1  # of texts that come first
    token_noise: float = 0.3  # largest standard deviation of the noise on soft tokens, as input and as target
    rgb_noise_max: float = 64.0  # of the noise on pixels at the start, in levels of 0..255
    rgb_noise_min: float = 0.0  # at the end; the paper's models of captions have 3
    rgb_noise_on_image_prefix: bool = False
    gradient_through_image_prefix: bool = False  # of texts, to the flow

    def __post_init__(self) -> None:
        check_share("objective", self, "text_first_prob", "prefix_drop_prob")
        if self.token_noise < 0 or not 0 <= self.rgb_noise_min <= self.rgb_noise_max:
            raise ValueError(
                f"objective.token_noise is {self.token_noise}, rgb_noise_max {self.rgb_noise_max} and rgb_noise_min "
                f"{self.rgb_noise_min}: noise must not be negative, and must not grow"
            )

    @property
    def learns_text(self) -> bool:
        """Whether any text counts in the loss; else what the model says of texts means nothing."""
        return self.loss_on_prefix or self.text_first_prob < 1


@dataclass
class JetFormerSampling:
    """Sampler settings. Official `predict_fns.py`, `parallel_decode.py`."""

    temperature: float = 1.0  # factor of sigma; what is standard normal stays so
    inv_temperature: float = 1.0  # factor of the mixture's logits
    cfg_scale: float = 1.0  # density-based guidance, 1 + the paper's w; off at 1
    guidance: Literal["closed_form", "rejection"] = "closed_form"  # rejection: the official algorithm
    prompts: list[str] = field(default_factory=list)  # models of captions: what label i stands for, round and round

    def __post_init__(self) -> None:
        check_temperatures(self.temperature, self.inv_temperature)


class Draws(NamedTuple):
    """All that is random in a loss of B images; in evaluation the last five are not looked at."""

    text_first: Tensor  # (B,), bool
    place: Tensor  # (B, C, H, W), normal: where in its interval each level comes to lie
    drop: Tensor | None = None  # (B,), uniform
    rgb: Tensor | None = None  # (B, C, H, W), normal
    rgb_sigma: float = 0.0  # in levels of 0..255
    token: Tensor | None = None  # (B, N, D), normal
    token_sigma: Tensor | None = None  # (B, 1, 1)


class JetFormerModule(WithText, ImageText, GenerativeModule):
    """Training and sampling; see GenerativeModule for the common arguments.

    text: tokenizer of captions; without one, class labels are texts of one token.  text_len: ids of a caption, with its
    end.  ignore_pad: what follows the end is not there, instead of being more ends.  num_classes: with captions not
    looked at.  flow, factor: between pixels and decoder.  flow_from: checkpoint of ours with a flow to start from.
    """

    OFFICIAL_KEYS = ("model",)  # the authors keep no average
    PROTOCOL = Protocol(
        num_images=50_000,
        num_classes=1000,
        statistics={256: "VIRTUAL_imagenet256_labeled.npz"},
        weights=("raw",),
        note="raw weights, temperature and guidance of the recipe; ADM's evaluation suite, as reviews of the paper say",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_classes: int = 1000,
        text: TextTokenizer | None = None,
        text_len: int = 64,
        ignore_pad: bool = False,
        net: DecoderConfig = DecoderConfig(),  # noqa: B008 (dataclass defaults are never changed in place)
        head: HeadConfig = HeadConfig(),  # noqa: B008
        flow: JetConfig = JetConfig(block_depth=4, kinds=["channels"]),  # noqa: B008
        factor: FactorConfig = FactorConfig(),  # noqa: B008
        objective: JetFormerObjective = JetFormerObjective(),  # noqa: B008
        sampling: JetFormerSampling = JetFormerSampling(),  # noqa: B008
        optim: OptimConfig = OptimConfig(lr=1e-3, weight_decay=0.1),  # noqa: B008
        flow_from: str | None = None,
        init_from: str | None = None,
        init_key: str | None = None,
        init_classes: Literal["keep", "new"] = "keep",
        compile: bool = False,
    ) -> None:
        sampling, text = as_config(JetFormerSampling, sampling), as_text_tokenizer(text)
        loading = {"init_from": init_from, "init_key": init_key, "init_classes": init_classes}
        drawable = num_classes if text is None else max(1, len(sampling.prompts))
        super().__init__(tokenizer, drawable, optim, sampling, **loading, compile=compile)
        self.text, self.text_len, self.ignore_pad = text, text_len, ignore_pad
        self.objective, self.flow_from = as_config(JetFormerObjective, objective), flow_from
        config, gmm = as_config(DecoderConfig, net), as_config(HeadConfig, head)
        flow, factor = as_config(JetConfig, flow), as_config(FactorConfig, factor)
        self._check()
        self.front = FactoredFlow(factor, flow, grid=self.tokenizer.grid, token_dim=self.tokenizer.token_dim)
        self.net = JetFormerDecoder(config, token_dim=self.front.dim, vocab=self.special_ids)
        self.head = GMMHead(self.front.dim, config.width, **asdict(gmm))
        self.save_arguments(
            tokenizer=self.tokenizer,
            num_classes=num_classes,
            text=text_config(text),
            text_len=text_len,
            ignore_pad=ignore_pad,
            net=config,
            head=gmm,
            flow=flow,
            factor=factor,
            objective=self.objective,
            sampling=sampling,
            optim=self.optim,
            flow_from=flow_from,
            **loading,
            compile=compile,
        )

    def _check(self) -> None:
        """Raise ValueError for arguments that do not go together."""
        if not isinstance(self.tokenizer, DequantisedTokenizer):
            raise ValueError(
                f"JetFormer's likelihood is one of pixels, and {type(self.tokenizer).__name__} has no density: use "
                f"layers.tokenizers.dequantised.DequantisedTokenizer"
            )
        self.check_prompts(self.sampling.prompts)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if not self.init_from and self.is_first_start(stage):
            if self.flow_from:
                load_flow(self.front.jet, self.flow_from)
            if isinstance(self.front.linear, PCA):
                fit_components(self.front.linear, self.tokenizer, self.trainer.datamodule)

    def no_weight_decay(self, name: str, param: nn.Parameter) -> bool:
        """Only kernels decay, and what the official decoder has of them without that name. Official `wd_mults`."""
        return name in ("net.text_embed.weight", "front.linear.weight") or name.endswith(".pos_embed")

    def compiled_modules(self) -> list[nn.Module]:
        return [*(coupling.net for coupling in self.front.jet.couplings), self.net, self.head]

    # Training

    def on_train_start(self) -> None:
        self._total_steps, _ = planned_steps(self.trainer)
        if math.isinf(self._total_steps) and self.objective.rgb_noise_max > self.objective.rgb_noise_min:
            raise ValueError(
                "objective.rgb_noise_max falls to rgb_noise_min over the whole run, and this one has no end: give "
                "--trainer.max_steps or max_epochs"
            )

    def rgb_sigma(self) -> float:
        """The noise on pixels now."""
        step, total = (self.trainer.global_step, self._total_steps) if self._trainer else (0, 1)
        return rgb_noise(step, total, largest=self.objective.rgb_noise_max, smallest=self.objective.rgb_noise_min)

    def draw(self, shape: Sequence[int], generator: Generator | None) -> Draws:
        """What is random in a loss of levels of this shape (B, C, H, W)."""
        uniform, normal = (partial(self.global_rows, f, generator=generator) for f in (torch.rand, torch.randn))
        size, objective = shape[0], self.objective
        first, place = uniform(size) < objective.text_first_prob, normal(*shape)
        if not self.training:
            return Draws(first, place)
        token = normal(size, self.tokenizer.seq_len, self.front.dim)
        token_sigma = objective.token_noise * uniform(size, 1, 1)
        return Draws(first, place, uniform(size), normal(*shape), self.rgb_sigma(), token, token_sigma)

    def training_loss(self, batch: Batch, generator: Generator | None = None) -> dict[str, Tensor]:
        """Bits per dimension of images that follow their text, weighted nats per word of texts that follow their image.

        Beside it "bpd" and, if learnt, "text_nats", means over all images in the order that was drawn. In evaluation,
        instead, of every image after its text and of every text after its image, where the model learns both.
        """
        batch = self.with_text(batch)
        levels = self.tokenizer.encode_image(batch["image"])
        draws = self.draw(levels.shape, generator)
        tokens = self.tokens_of(levels, draws)
        latents = self.front(tokens.x)
        latents = latents._replace(soft=self.noised(latents.soft, draws))
        first = draws.text_first
        h = self.hidden(latents.soft, batch, first, self.dropped(draws))
        nats, text = self.image_nats(h.image, latents), self.text_nats(h.text, batch).per_word()
        loss = self.combined(self.bits(nats, tokens), text, draws)
        if not self.training and 0 < self.objective.text_first_prob < 1:
            other = self.hidden(latents.soft, batch, ~first)
            nats = torch.where(first, nats, self.image_nats(other.image, latents))
            text = torch.where(first, self.text_nats(other.text, batch).per_word(), text)
        figures = likelihood_terms(nats, tokens, batch)
        if self.objective.learns_text:
            figures["text_nats"] = text.mean()
        usage = self.head.usage(h.image.detach()) if self.writes_figures() else {}
        return {"loss": loss, **figures, **usage}

    def tokens_of(self, levels: Tensor, draws: Draws) -> Tokens:
        """Levels (B, C, H, W) -> tokens, in training of noisy levels: whole numbers, not clipped."""
        if self.training:
            sigma = draws.rgb_sigma * (self.tokenizer.levels - 1) / 255 * torch.ones_like(draws.rgb[:, :1, :1, :1])
            if not self.objective.rgb_noise_on_image_prefix:
                sigma = sigma * draws.text_first[:, None, None, None]
            levels = (levels + sigma * draws.rgb).round()
        return self.tokenizer.encode_raw(levels, lambda shape: draws.place)

    def noised(self, soft: Tensor, draws: Draws) -> Tensor:
        """Soft tokens (B, N, D) as the decoder reads and predicts them: noisy where they follow a text, and without
        gradient where they come before it."""
        if not self.training:
            return soft
        first = draws.text_first[:, None, None]
        if not self.objective.gradient_through_image_prefix:
            soft = torch.where(first, soft, soft.detach())
        return soft + first * draws.token_sigma * draws.token

    def dropped(self, draws: Draws) -> Tensor | None:
        """Texts (B,) that come first and are not shown."""
        return (draws.drop < self.objective.prefix_drop_prob) & draws.text_first if self.training else None

    def combined(self, bits: Tensor, text: Tensor, draws: Draws) -> Tensor:
        """The loss of images (B,) in bits per dimension and of texts (B,) in nats per word. Official `loss_fn`.

        With `loss_on_prefix` the mean over texts is that of this process's, as many as were shown.
        """
        weight = self.objective.text_weight
        if not self.objective.loss_on_prefix:
            return torch.where(draws.text_first, bits, weight * text).mean()
        dropped = self.dropped(draws)
        shown = torch.ones_like(text) if dropped is None else (~dropped).float()
        return bits.mean() + weight * (text * shown).sum() / shown.sum().clamp_min(1)

    def blank_batch(self, size: int, device: torch.device | str, *, cached: bool = False) -> Batch:
        """As GenerativeModule's, with empty texts; pixels cannot be cached."""
        text = torch.zeros(size, 1 if self.text is None else self.text_len, dtype=torch.int64, device=device)
        there = torch.ones_like(text, dtype=torch.bool)
        return super().blank_batch(size, device) | {"text": text, "text_mask": there, "text_loss": there}

    # Sampling

    def prepare_sampling(self, *, compile: bool = False) -> None:
        """As GenerativeModule's, but for the head and the flow's scales, which stay float32. `compile`: the flow."""
        cast_linear_(self.net, torch.bfloat16)
        self.front.jet.prepare_sampling(compile=compile)

    def sample_tokens(self, labels: Tensor, sampling: JetFormerSampling, generator: Generators = None) -> Tensor:
        """Tokens (B, L, D) for labels (B,), or for the prompts that they stand for; none: the empty text."""
        texts = label_batch(labels) if self.text is None else self.prompts_of(labels, sampling.prompts)
        return self.tokens_for(texts, sampling, generator)

    def tokens_for(self, texts: TextBatch, sampling: JetFormerSampling, generator: Generators = None) -> Tensor:
        """Tokens (B, L, D) of images that follow the texts: soft ones in turn, the rest at once, the flow back."""
        soft = self.soft_tokens(texts, sampling, generator)
        rest = randn((*soft.shape[:2], self.tokenizer.token_dim - self.front.dim), generator, device=self.device)
        return self.front.inverse(soft, rest)

    def soft_tokens(self, texts: TextBatch, sampling: JetFormerSampling, generator: Generators = None) -> Tensor:
        """Soft tokens (B, N, D), one after another, with a KV cache; guidance doubles the batch, not the calls."""
        self.check_sampling(sampling)
        size, guided = len(texts["text"]), sampling.cfg_scale != 1
        nothing = torch.arange(size * (1 + guided), device=self.device) >= size  # which branch is without text
        text, mask = (None if t is None else for_branches(t, nothing) for t in (texts["text"], self.mask_of(texts)))
        prompt = self.net.image_prompt(text, text_mask=mask, drop_prefix=nothing)
        h, cache = self.net.prefill(prompt, room=self.tokenizer.seq_len - 1)
        solver = sampling.guidance if guided else "closed_form"
        count, dim = self.head.noise_shape(1, solver)
        settings = {"cfg_scale": sampling.cfg_scale, "temperature": sampling.temperature, "solver": solver}

        def step(token: Tensor, j: int) -> Tensor:
            return self.net.step_image(for_branches(token, nothing), cache)

        def draw(h: Tensor, j: int) -> Tensor:
            noise = token_noise(size, count, 1, dim, generator=generator, device=self.device)
            cond, uncond = h.split(size) if guided else (h, None)
            return self.head.sample(cond, noise, uncond=uncond, inv_temperature=sampling.inv_temperature, **settings)

        return autoregress(h, step, draw, self.tokenizer.seq_len)

    def check_sampling(self, sampling: JetFormerSampling) -> None:
        """Raise ValueError for guidance where there is nothing to guide away from."""
        if sampling.cfg_scale != 1 and not self.objective.prefix_drop_prob:
            raise ValueError(
                f"sampling.cfg_scale is {sampling.cfg_scale}, but guidance needs a model that knows texts and their "
                f"absence: objective.prefix_drop_prob is 0; set cfg_scale to 1"
            )

    # Official files

    def _with_new_classes(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fresh rows for our classes in each table; the file's special ones stay."""
        if self.text is not None:
            raise ValueError("init_classes=new is for class labels, but this model learns captions: leave it at keep")
        name, tables = "net.text_embed.weight", self.net.config.text_tables
        if name not in state or state[name].shape[1] != self.net.config.width or len(state[name]) % tables:
            return state  # the strict load reports it
        ours, theirs = (t.unflatten(0, (tables, -1)) for t in (self.net.text_embed.weight.detach().cpu(), state[name]))
        rows = torch.cat([ours[:, : self.num_classes], theirs[:, self.num_classes - ours.shape[1] :]], dim=1)
        return state | {name: rows.flatten(0, 1)}

    def unrolled(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return jetformer.unrolled(jet.unrolled(state, OFFICIAL))

    def official_state_dict(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """As Pretrained's, with all blocks and couplings in one array each, as in the files."""
        return jetformer.stacked(jet.stacked(super().official_state_dict(state), OFFICIAL))

    def official_rules(self) -> list[Rule]:
        """Names of blocks and couplings apart."""
        flow = factored_rules("front", num_heads=self.front.jet.config.num_heads)
        return [TRAINED_TOKENIZER, *decoder_rules(self.net.config), *flow]


def rgb_noise(step: int, total: float, *, largest: float, smallest: float) -> float:
    """Standard deviation of the noise on pixels at a step, counted from 0: half a cosine over the whole run."""
    return smallest + (largest - smallest) * (1 + math.cos(math.pi * step / total)) / 2

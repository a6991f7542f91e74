"""GIVT: generative infinite-vocabulary Transformers (Tschannen et al., arXiv 2312.02116; big_vision `proj/givt`).

Unusual: the Transformer gives the parameters of a Gaussian mixture over the next real-valued token, so that the latents
of a VAE need no codebook and have a likelihood. GIVT-Causal draws them in raster order; GIVT-MaskGIT in parallel, the
surest first. A flow adapter may stand between the latents and the Transformer. In: tokens (B, L, D), labels (B,). Out:
h (B, L, E), of which the head makes densities.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from layers.checkpoint import Rule
from layers.checks import check_positive, check_share
from layers.flows.adapter import AdapterConfig, FlowAdapter, adapter_rules
from layers.gather import take
from layers.guidance import for_branches
from layers.heads.gmm import GMMHead, HeadConfig
from layers.networks.givt import GIVT, GIVTCache, GIVTConfig, trunk_rules, unrolled
from layers.precision import cast_linear_, compute_dtype
from layers.random import Generators, randn, token_noise
from layers.samplers.autoregressive import Beams, autoregress, beam_search
from layers.samplers.maskgit import (
    choice_temperatures,
    gumbel_from_normal,
    mask_counts,
    mask_ratio,
    mask_weights,
    maskgit_decode,
    random_masks,
)
from layers.tokenizers.base import Tokenizer, Tokens
from lightning_modules.base import Batch, GenerativeModule, sum_over_ranks
from lightning_modules.config import as_config
from lightning_modules.editing import Editable
from lightning_modules.likelihood import likelihood_terms
from lightning_modules.optim import OptimConfig
from lightning_modules.pretrained import TRAINED_TOKENIZER
from lightning_modules.protocol import Protocol

# from this probability on every label is dropped, in training and in sampling. Official `decode`
ALWAYS_DROPPED = 0.999


@dataclass
class GIVTObjective:
    """What the network does not see in training. Official `Model.get_input_mask_training`."""

    label_drop_prob: float = 0.1  # 0: no row for "no label", so no guidance; 1: unconditional
    mask_rate_min: float = 0.3  # bidirectional: at least this share of the schedule is masked
    mask_schedule: str = "cosine"  # or pow:p

    def __post_init__(self) -> None:
        check_share("objective", self, "label_drop_prob", "mask_rate_min")
        mask_ratio(torch.zeros(1), self.mask_schedule)  # an unknown one is an error now, not at the first step


@dataclass
class GIVTSampling:
    """Sampler settings. Official `decode.py` (causal) and `parallel_decode.py` (bidirectional)."""

    temperature: float = 1.0  # factor of sigma
    inv_temperature: float = 1.0  # factor of the mixture's logits
    cfg_scale: float = 1.0  # density-based guidance, 1 + the paper's w; off at 1
    guidance: Literal["closed_form", "rejection"] = "closed_form"  # rejection: the official algorithm
    top_p: float | None = None  # share of a mixture's mass that is drawn from, that of its likeliest components
    clip_sigmas: float | None = None  # draws lie within that many sigmas
    num_beams: int = 1  # causal: beam search with num_fans draws per beam and token
    num_fans: int = 1
    num_iter: int = 16  # bidirectional: the remaining settings are MaskGIT's
    schedule: str = "cosine"  # or pow:p
    choice_temperature: float = 35.0  # of the Gumbel noise by which sureness is blurred
    anneal: bool = True  # it falls to 0

    def __post_init__(self) -> None:
        check_positive("sampling", self, "temperature", "clip_sigmas", "num_beams", "num_fans", "num_iter")
        if self.choice_temperature < 0:
            raise ValueError(f"sampling.choice_temperature is {self.choice_temperature}: use 0 for no noise, or more")
        if self.beams and self.cfg_scale != 1:
            raise ValueError(
                f"sampling.cfg_scale is {self.cfg_scale} with num_beams {self.num_beams} and num_fans {self.num_fans}: "
                f"beams are ranked by likelihood, which guidance has none of; set cfg_scale or both others to 1"
            )
        mask_ratio(torch.zeros(1), self.schedule)

    @property
    def beams(self) -> bool:
        return self.num_beams * self.num_fans > 1


class GIVTModule(Editable, GenerativeModule):
    """Training and sampling of GIVT-Causal and GIVT-MaskGIT; see GenerativeModule for the common arguments."""

    OFFICIAL_KEYS = ("model",)  # the authors keep no average
    UNCONDITIONAL = ("objective.label_drop_prob=1", "sampling.cfg_scale=1")
    PROTOCOL = Protocol(
        num_images=50_000,
        num_classes=1000,
        statistics={256: "VIRTUAL_imagenet256_labeled.npz", 512: "VIRTUAL_imagenet512.npz"},
        weights=("raw",),
        note="raw weights, temperature and guidance of the recipe; ADM's statistics of the training set, as far as is "
        "known: the authors' code has no evaluator",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_classes: int = 1000,
        net: GIVTConfig = GIVTConfig(),  # noqa: B008 (dataclass defaults are never changed in place)
        head: HeadConfig = HeadConfig(),  # noqa: B008
        adapter: AdapterConfig = AdapterConfig(),  # noqa: B008
        objective: GIVTObjective = GIVTObjective(),  # noqa: B008
        sampling: GIVTSampling = GIVTSampling(),  # noqa: B008
        optim: OptimConfig = OptimConfig(lr=1e-3, weight_decay=0.1),  # noqa: B008
        init_from: str | None = None,
        init_key: str | None = None,
        init_classes: Literal["keep", "new"] = "keep",
        compile: bool = False,
    ) -> None:
        sampling = as_config(GIVTSampling, sampling)
        loading = {"init_from": init_from, "init_key": init_key, "init_classes": init_classes}
        super().__init__(tokenizer, num_classes, optim, sampling, **loading, compile=compile)
        self.objective = as_config(GIVTObjective, objective)
        config, flow = as_config(GIVTConfig, net), as_config(AdapterConfig, adapter)
        gmm, token_dim = as_config(HeadConfig, head), self.tokenizer.token_dim
        if self.tokenizer.vocab_size:
            raise ValueError(
                "GIVT's tokens are continuous, but this tokenizer's are ids: use one with latents or pixels"
            )
        null = self.objective.label_drop_prob > 0
        sizes = {"seq_len": self.tokenizer.seq_len, "token_dim": token_dim}
        self.net = GIVT(config, **sizes, num_classes=num_classes, null_label=null)
        self.head = GMMHead(token_dim, config.width, **asdict(gmm))
        self.adapter = FlowAdapter(flow, token_dim, self.tokenizer.grid) if flow.num_blocks else None
        self.save_arguments(
            tokenizer=self.tokenizer,
            num_classes=num_classes,
            net=config,
            head=gmm,
            adapter=flow,
            objective=self.objective,
            sampling=sampling,
            optim=self.optim,
            compile=compile,
            **loading,
        )

    @property
    def causal(self) -> bool:
        return self.net.config.causal

    @property
    def unconditional(self) -> bool:
        """Whether every label is dropped."""
        return self.objective.label_drop_prob >= ALWAYS_DROPPED

    def no_weight_decay(self, name: str, param: nn.Parameter) -> bool:
        """Only kernels decay. Official config: wd_mults for names that end in /kernel."""
        return name in ("net.label_embed.embedding_table.weight", "net.pos_embed")

    def compiled_modules(self) -> list[nn.Module]:
        return [self.net, self.head]

    # Training

    def training_loss(self, batch: Batch, generator: Generator | None = None) -> dict[str, Tensor]:
        """Mean negative log-likelihood of tokens, of masked ones in a bidirectional model; see the two forms below."""
        tokens = self.tokens(batch, generator)
        size, seq_len = tokens.x.shape[:2]
        u = self.global_rows(torch.rand, size, generator=generator)
        labels = self.dropped(batch["label"], u)
        if self.causal:
            return self.causal_loss(tokens, labels, batch)
        return self.masked_loss(tokens.x, labels, self.global_rows(self._masks, size, seq_len, generator=generator))

    def dropped(self, labels: Tensor, u: Tensor) -> Tensor:
        """Labels with "no label" where u (B,), uniform, falls below the rate; all of them in unconditional models.

        The official code draws these and then forgets to hand them on, so that its models for a rate between 0 and 1
        never see "no label" in training. Without it guidance would have nothing to compare with.
        """
        if self.unconditional:
            return torch.full_like(labels, self.net.null_label)
        if self.net.null_label is None or not self.training:
            return labels
        return torch.where(u < self.objective.label_drop_prob, self.net.null_label, labels)

    def causal_loss(self, tokens: Tokens, labels: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Mean over all tokens of the head's loss, and the likelihood of whole images (see `likelihood_terms`)."""
        x, logdet = self.adapter(tokens.x) if self.adapter else (tokens.x, 0.0)
        h = self.net(x, labels)
        terms = self._head_terms(x, h)
        figures = likelihood_terms(terms["nll"].sum(1) - logdet, tokens, batch)
        return {"loss": terms["loss"].mean(), **figures, **self._usage(h)}

    def masked_loss(self, x: Tensor, labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Mean over the masked tokens of the global batch of the head's loss; weights (B, L) of `mask_weights`."""
        if self.adapter:
            x, _ = self.adapter(x)
        h = self.net(x, labels, weights > 0)
        terms = {name: (term * weights).sum(1).mean() for name, term in self._head_terms(x, h).items()}
        return {"loss": terms["loss"], "nats_per_token": terms["nll"], **self._usage(h)}

    def _masks(self, rows: int, seq_len: int, *, generator: Generator | None, device: torch.device) -> Tensor:
        """`mask_weights` of masks (rows, L) for the global batch."""
        u = torch.rand(rows, generator=generator, device=device)
        keys = torch.rand(rows, seq_len, generator=generator, device=device)
        objective = self.objective
        return mask_weights(random_masks(u, keys, min_rate=objective.mask_rate_min, schedule=objective.mask_schedule))

    def _head_terms(self, x: Tensor, h: Tensor) -> dict[str, Tensor]:
        """The head's terms per token (B, L); a mixture draws neither times nor noise."""
        rows, time = h.flatten(0, 1), h.new_zeros(1, h.shape[0] * h.shape[1])
        terms = self.head(x.flatten(0, 1), rows, time, time[..., None])
        return {name: term[0].view(x.shape[:2]) for name, term in terms.items()}

    def _usage(self, h: Tensor) -> dict[str, Tensor]:
        """How the components are used, where it is written."""
        return self.head.usage(h.detach()) if self.writes_figures() else {}

    def on_validation_epoch_end(self) -> None:
        """Raises ValueError where scales have collapsed, which no later step would mend."""
        super().on_validation_epoch_end()
        sums = sum_over_ranks({name: value.item() for name, value in self._val_sums.items()})  # all ranks stop or none
        if sums:
            self.head.check_scales(sums["min_scale"] / sums["rows"])

    def representations(self, batch: Batch, generator: Generator | None = None) -> dict[str, Tensor]:
        """Causal: features (B, E) by name, for probes, of images without their labels.

        Raises ValueError for a model that is bidirectional, or that was never without labels.
        """
        if not self.causal or self.net.null_label is None:
            raise ValueError("representations are of causal models that know 'no label' (objective.label_drop_prob)")
        x = self.tokens(batch, generator).x
        labels = torch.full((len(x),), self.net.null_label, device=x.device)
        return self.net.representations(self.adapter(x)[0] if self.adapter else x, labels)

    # Sampling

    def prepare_sampling(self, *, compile: bool = False) -> None:
        """As GenerativeModule's, for the trunk: the head stays float32. `compile` acts on bidirectional models only."""
        cast_linear_(self.net, torch.bfloat16)
        if compile and not self.causal:
            self.net.compile(mode="reduce-overhead", dynamic=False)

    def sample_tokens(self, labels: Tensor, sampling: GIVTSampling, generator: Generators = None) -> Tensor:
        """Tokens (B, L, D) for labels (B,)."""
        positions = torch.arange(self.net.seq_len, device=self.device).expand(len(labels), -1)
        nothing = torch.zeros(*positions.shape, self.tokenizer.token_dim, device=self.device)
        if not self.causal:
            x = self.fill(nothing, positions, labels, sampling, generator)
        elif sampling.beams:
            x = self.beams(labels, sampling, generator).tokens[:, 0]
        else:
            x = self.generate(labels, sampling, generator)
        return self.adapter.inverse(x) if self.adapter else x

    @torch.no_grad()
    def check_sampling(self, sampling: GIVTSampling) -> None:
        """Raise ValueError for settings with which this model cannot be sampled. Draws one token to know."""
        if not self.causal:
            mask_counts(self.net.seq_len, sampling.num_iter, sampling.schedule)
        rows = self.branches(torch.zeros(1, dtype=torch.int64, device=self.device), sampling)
        noise = self.noise_source(1, sampling, Generator(self.device).manual_seed(0))(1)
        h = torch.zeros(len(rows), self.net.config.width, device=self.device)
        self.head.sample(**self._draw_arguments(h, noise, sampling))

    def branches(self, labels: Tensor, sampling: GIVTSampling) -> Tensor:
        """Rows of the label table: (B,), or with guidance (2B,), those with labels first.

        Raises ValueError where there is nothing to guide away from, and for beams of a bidirectional model.
        """
        if sampling.beams and not self.causal:
            raise ValueError("sampling.num_beams and num_fans are of causal models: set both to 1")
        if self.unconditional:
            labels = torch.full_like(labels, self.net.null_label)
        if sampling.cfg_scale == 1:
            return labels
        if self.unconditional or self.net.null_label is None:
            raise ValueError(
                f"sampling.cfg_scale is {sampling.cfg_scale}, but guidance needs a model that knows labels and their "
                f"absence: objective.label_drop_prob is {self.objective.label_drop_prob}; set cfg_scale to 1"
            )
        return torch.cat([labels, torch.full_like(labels, self.net.null_label)])

    def generate(self, labels: Tensor, sampling: GIVTSampling, generator: Generators = None) -> Tensor:
        """Causal: one token after another (B, L, D), with a KV cache; guidance doubles the batch, not the calls."""
        rows, noise = self.branches(labels, sampling), self.noise_source(len(labels), sampling, generator)
        cache = self._cache(len(rows))

        def step(token: Tensor, j: int) -> Tensor:
            return self.net.step(for_branches(token, rows), j, cache)

        def draw(h: Tensor, j: int) -> Tensor:
            return self.head.sample(**self._draw_arguments(h, noise(1), sampling))

        return autoregress(self.net.prefill(rows, cache), step, draw, self.net.seq_len)

    def beams(self, labels: Tensor, sampling: GIVTSampling, generator: Generators = None) -> Beams:
        """Causal: the most probable of many draws, all beams of each image and their scores."""
        rows = self.branches(labels, sampling).repeat_interleave(sampling.num_beams)
        cache, noise = self._cache(len(rows)), self.noise_source(len(labels), sampling, generator)

        def step(token: Tensor, j: int) -> Tensor:
            return self.net.step(token, j, cache)

        def propose(h: Tensor, j: int, fans: int) -> tuple[Tensor, Tensor]:
            arguments = self._draw_arguments(h.repeat_interleave(fans, 0), noise(sampling.num_beams * fans), sampling)
            tokens, log_prob = self.head.sample_with_log_prob(**arguments)
            return tokens.unflatten(0, (-1, fans)), log_prob.unflatten(0, (-1, fans))

        sizes = {"num_beams": sampling.num_beams, "num_fans": sampling.num_fans}
        return beam_search(self.net.prefill(rows, cache), step, propose, cache.reorder, self.net.seq_len, **sizes)

    def fill(
        self, x: Tensor, positions: Tensor, labels: Tensor, sampling: GIVTSampling, generator: Generators = None
    ) -> Tensor:
        """Bidirectional: draw the unknown `positions` (B, R) of x (B, L, D), ascending; the others stay."""
        rows, noise = self.branches(labels, sampling), self.noise_source(len(x), sampling, generator)

        def propose(x: Tensor, unknown: Tensor, positions: Tensor, k: int) -> tuple[Tensor, Tensor]:
            h = take(
                self.net(for_branches(x, rows), rows, for_branches(unknown, rows)), for_branches(positions, rows)
            ).flatten(0, 1)
            arguments = self._draw_arguments(h, noise(positions.shape[1]), sampling)
            tokens, log_prob = self.head.sample_with_log_prob(**arguments)
            return tokens.unflatten(0, positions.shape), log_prob.unflatten(0, positions.shape)

        def gumbel(k: int) -> Tensor:
            return gumbel_from_normal(randn(x.shape[:2], generator, device=self.device))

        counts = mask_counts(positions.shape[1], sampling.num_iter, sampling.schedule)
        temperatures = choice_temperatures(sampling.choice_temperature, sampling.num_iter, anneal=sampling.anneal)
        return maskgit_decode(x, positions, propose, counts=counts, temperatures=temperatures, gumbel=gumbel)

    def redraw(
        self, x: Tensor, unknown: Tensor, labels: Tensor, sampling: GIVTSampling, generator: Generators
    ) -> Tensor:
        """See Editable; iterations are at most as many as tokens are drawn."""
        if self.causal:
            raise ValueError(
                "GIVT-Causal cannot edit: it draws each token from those above and before it, and never sees known "
                "ones after; use a model with net.attention=bidirectional"
            )
        if self.adapter:
            x, _ = self.adapter(x)
        count = int(unknown[0].sum())
        positions = unknown.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
        x = self.fill(x, positions, labels, replace(sampling, num_iter=min(sampling.num_iter, count)), generator)
        return self.adapter.inverse(x) if self.adapter else x

    def noise_source(self, batch: int, sampling: GIVTSampling, generator: Generators) -> Callable[[int], Tensor]:
        """Tokens per image -> noise (n, B tokens, dim) for the head: each image's comes from its own generator."""
        draws, dim = self.head.noise_shape(1, sampling.guidance)

        def draw(tokens: int) -> Tensor:
            return token_noise(batch, draws, tokens, dim, generator=generator, device=self.device)

        return draw

    def _draw_arguments(self, h: Tensor, noise: Tensor, sampling: GIVTSampling) -> dict[str, Any]:
        """What the head samples with: h (R or 2R, E), noise (n, R, dim)."""
        cond, *uncond = h.split(noise.shape[1])
        return {
            "z": cond,
            "noise": noise,
            "uncond": uncond[0] if uncond else None,
            "cfg_scale": sampling.cfg_scale,
            "temperature": sampling.temperature,
            "inv_temperature": sampling.inv_temperature,
            "top_p": sampling.top_p,
            "clip_sigmas": sampling.clip_sigmas,
            "solver": sampling.guidance,
        }

    def _cache(self, batch: int) -> GIVTCache:
        return self.net.init_cache(batch, dtype=compute_dtype(self.device), device=self.device)

    # Official files

    def unrolled(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return unrolled(state)

    def official_rules(self) -> list[Rule]:
        """Names are the official ones, apart for each block; kernels are transposed, queries, keys and values fused."""
        return [TRAINED_TOKENIZER, *trunk_rules(self.net.config.num_heads), *adapter_rules()]

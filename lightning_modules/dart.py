"""DART: denoising noisy copies of an image one after another, each from all noisier ones (Gu et al., "DART: Denoising
Autoregressive Transformer for Scalable Text-to-Image Generation", arXiv 2410.08159).

Unusual: the noise of each copy is its own, so one sequence holds the whole path and one forward pass trains all of it;
sampling takes T passes with a KV cache. `variant`: dart draws the tokens of a copy independently, dart_ar one after
another, dart_fm moves them by a small flow. There is no official code; what is ours is called so.
In: tokens (B, K, D), class labels or captions. Out: velocities, tokens.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Generator, Tensor, nn

from layers.checkpoint import Rule
from layers.checks import check_positive, check_share
from layers.diffusion.nomad import Nomad, Schedule, Weight, clean, mix
from layers.guidance import cfg, for_branches
from layers.heads.flow import FlowHead
from layers.networks.dart import DART, Condition, DARTConfig, Stage
from layers.networks.dart_decoding import DARTDecoder
from layers.precision import cast_linear_
from layers.random import Generators, randn
from layers.samplers.nomad import Prediction, denoise, denoise_tokens
from layers.text.base import TextTokenizer
from layers.text.batches import TextBatch
from layers.text.encoder import EncoderConfig, make_encoder
from layers.tokenizers.base import Tokenizer
from layers.tokenizers.half import half_size, halved
from lightning_modules.base import Batch, GenerativeModule
from lightning_modules.config import as_config
from lightning_modules.optim import OptimConfig
from lightning_modules.protocol import Protocol
from lightning_modules.text import WithText, as_text_tokenizer, text_config
from lightning_modules.trained_for import NAME as TRAINED_FOR
from lightning_modules.trained_for import TrainedFor
from lightning_modules.weights import read_own

Variant = Literal["dart", "dart_ar", "dart_fm"]


@dataclass
class DARTObjective:
    """Process and loss. Paper sections 3.1 and 3.2; options of ours in layers/diffusion/nomad.py."""

    num_steps: int = 16  # T: copies of an image, and network calls of a sample
    schedule: Schedule = "direct"  # what the cosine is of: each copy (direct), or all copies so far (matched)
    weight: Weight = "v"  # of the squared error of x_0 at each step; its mean is 1
    hires_steps: int = 0  # Matryoshka: copies of the image itself, which follow those of its half size; 0: none
    label_drop_prob: float = 0.1  # of classes and captions, for guidance

    def __post_init__(self) -> None:
        check_share("objective", self, "label_drop_prob")
        if self.hires_steps < 0 or self.hires_steps == 1:
            raise ValueError(f"objective.hires_steps is {self.hires_steps}: use 0 for one resolution, or 2 and more")


@dataclass
class FlowConfig:
    """The head of dart_fm (ours, by the published difference of 8 M parameters)."""

    width: int = 640
    depth: int = 3

    def __post_init__(self) -> None:
        check_positive("head", self, "width", "depth")


@dataclass
class DARTSampling:
    """Sampler settings. As many network calls as the model has steps: their number is not one of them."""

    cfg_scale: float = 1.5  # off at 1
    head_steps: int = 16  # dart_fm: Euler steps of the head
    prompts: list[str] = field(default_factory=list)  # models of captions: what label i stands for, round and round

    def __post_init__(self) -> None:
        check_positive("sampling", self, "head_steps")


class Copies(NamedTuple):
    """Images of one resolution and their noise, with what a loss needs of the process."""

    process: Nomad
    x: Tensor  # (B, K, D)
    noise: Tensor  # (B, T, K, D)
    time: Tensor | None = None  # dart_fm: of the head (B, T - 1, K)

    @property
    def noised(self) -> Tensor:
        """(B, T, K, D)."""
        return self.process.noised(self.x, self.noise)


class DARTModule(WithText, TrainedFor, GenerativeModule):
    """Training and sampling; see GenerativeModule for the common arguments.

    text: tokenizer of captions; without one, the model is conditioned on classes.  text_len: ids of a caption, with its
    end.  encoder: what makes features of them.  num_classes: with captions not looked at.  head: of dart_fm.
    coarse_from: checkpoint of the same model without hires_steps, to start phase 2 of Matryoshka from.
    """

    UNCONDITIONAL = ("objective.label_drop_prob=0", "sampling.cfg_scale=1")
    PROTOCOL = Protocol(
        num_images=50_000,
        num_classes=1000,
        statistics={256: "VIRTUAL_imagenet256_labeled.npz"},
        weights=("0.9999",),
        note="FID-50K with guidance, as other papers quote it; which statistics the authors used is not known",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_classes: int = 1000,
        variant: Variant = "dart",
        text: TextTokenizer | None = None,
        text_len: int = 128,
        encoder: EncoderConfig = EncoderConfig(),  # noqa: B008 (dataclass defaults are never changed in place)
        net: DARTConfig = DARTConfig(),  # noqa: B008
        head: FlowConfig = FlowConfig(),  # noqa: B008
        objective: DARTObjective = DARTObjective(),  # noqa: B008
        sampling: DARTSampling = DARTSampling(),  # noqa: B008
        optim: OptimConfig = OptimConfig(lr=3e-4),  # noqa: B008
        coarse_from: str | None = None,
        init_from: str | None = None,
        init_key: str | None = None,
        init_classes: Literal["keep", "new"] = "keep",
        compile: bool = False,
    ) -> None:
        sampling, text = as_config(DARTSampling, sampling), as_text_tokenizer(text)
        loading = {"init_from": init_from, "init_key": init_key, "init_classes": init_classes}
        drawable = num_classes if text is None else max(1, len(sampling.prompts))
        super().__init__(tokenizer, drawable, optim, sampling, **loading, compile=compile)
        self.variant, self.text, self.text_len, self.ignore_pad = variant, text, text_len, True
        self.objective, self.coarse_from = as_config(DARTObjective, objective), coarse_from
        config, head = as_config(DARTConfig, net), as_config(FlowConfig, head)
        encoder = as_config(EncoderConfig, encoder)
        self._check(config)
        condition: dict[str, Any] = {"num_classes": num_classes}
        if text is not None:
            self.encoder = make_encoder(encoder, vocab_size=text.vocab_size, max_len=text_len)
            condition = {"text_dim": encoder.dim, "text_len": text_len}
        stages = self._stages()
        settings = self.objective.schedule, self.objective.weight
        self.processes = nn.ModuleList(Nomad(stage.num_steps, *settings) for stage in stages)
        sizes = {"stages": stages, "token_dim": self.tokenizer.token_dim}
        self.net = DART(config, **sizes, **condition, causal=variant == "dart_ar")
        if self.has_flow:
            self.head = FlowHead(self.tokenizer.token_dim, config.width, **asdict(head))
        self.decoder = DARTDecoder(self.net)
        steps = {"objective__num_steps": self.objective.num_steps, "objective__hires_steps": self.objective.hires_steps}
        tokens = "x".join(map(str, stages[0].grid))
        self.keep_facts(variant=variant, objective__schedule=self.objective.schedule, **steps, tokens=tokens)
        self.save_arguments(
            tokenizer=self.tokenizer,
            num_classes=num_classes,
            variant=variant,
            text=text_config(text),
            text_len=text_len,
            encoder=encoder,
            net=config,
            head=head,
            objective=self.objective,
            sampling=sampling,
            optim=self.optim,
            coarse_from=coarse_from,
            **loading,
            compile=compile,
        )

    def _check(self, config: DARTConfig) -> None:
        """Raise ValueError for arguments that do not go together."""
        if self.variant not in get_args(Variant):
            raise ValueError(f"variant is '{self.variant}': use {', '.join(get_args(Variant))}")
        fine, causal = self.objective.hires_steps, self.variant == "dart_ar"
        if self.tokenizer.vocab_size:
            raise ValueError(f"DART's tokens are continuous, {type(self.tokenizer).__name__} makes ids: use another")
        if fine and causal:
            raise ValueError(f"objective.hires_steps is {fine}: dart_ar has one resolution, set it to 0")
        if config.step_embed and (self.text or fine or causal):
            raise ValueError(
                "net.step_embed is a part of each step's class vector: it is not for captions, hires_steps or dart_ar"
            )
        self.check_prompts(self.sampling.prompts)
        if self.coarse_from and not self.objective.hires_steps:
            raise ValueError(f"coarse_from is {self.coarse_from}, but objective.hires_steps is 0: use init_from")

    def _stages(self) -> list[Stage]:
        steps, fine = self.objective.num_steps, self.objective.hires_steps
        if not fine:
            return [Stage(steps, self.tokenizer.grid)]
        return [Stage(steps, half_size(self.tokenizer).grid), Stage(fine, self.tokenizer.grid)]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.coarse_from and not self.init_from and self.is_first_start(stage):
            self.load_coarse(self.coarse_from)

    def compiled_modules(self) -> list[nn.Module]:
        """Blocks: their graph, with an attention per step, is compiled once for all of them."""
        return [*self.net.blocks, *([self.head] if self.has_flow else [])]

    @property
    def has_flow(self) -> bool:
        """Whether a flow moves what is drawn."""
        return self.variant == "dart_fm"

    # Training

    def training_loss(self, batch: Batch, generator: Generator | None = None) -> dict[str, Tensor]:
        """Eq. 7: weighted squared error of x_0 at all steps ("denoise"); of dart_fm, and the head's loss ("flow")."""
        images = self.images(batch, generator)
        size = len(images[0])
        dropped = self.global_rows(torch.rand, size, generator=generator) < self.objective.label_drop_prob
        copies = []
        for process, x in zip(self.processes, images, strict=True):
            noise = self.global_rows(torch.randn, size, process.num_steps, *x.shape[1:], generator=generator)
            time = None
            if self.has_flow:
                time = self.global_rows(torch.rand, size, process.num_steps - 1, x.shape[1], generator=generator)
            copies.append(Copies(process, x, noise, time))
        return self.denoising_loss(copies, self.condition(batch, dropped & self.training))

    def images(self, batch: Batch, generator: Generator | None) -> list[Tensor]:
        """Tokens (B, K, D) of each resolution, coarse first. Raises ValueError for two of them and cached latents."""
        x = self.tokens(batch, generator).x
        if len(self.processes) == 1:
            return [x]
        if "image" not in batch:
            raise ValueError(
                f"objective.hires_steps is {self.objective.hires_steps}: images of two sizes are encoded, and cached "
                f"latents will not do; use data of images"
            )
        small, draw = {"image": halved(batch["image"])}, self.global_rows
        coarse = half_size(self.tokenizer)(small, lambda shape: draw(torch.randn, *shape, generator=generator))
        return [coarse.x, x]

    def condition(self, batch: Batch | TextBatch, dropped: Tensor) -> Condition:
        """Of labels or texts, as often as `dropped` (B,) or (2B,) has rows; those that it marks are without."""
        if self.text is None:
            return self.net.of_classes(torch.where(dropped, self.num_classes, for_branches(batch["label"], dropped)))
        batch = self.with_text(batch)
        mask = for_branches(batch["text_mask"], dropped) & ~dropped[:, None]
        return self.net.of_texts(for_branches(self.encoder(batch["text"], batch["text_mask"]), dropped), mask)

    def denoising_loss(self, copies: Sequence[Copies], condition: Condition) -> dict[str, Tensor]:
        """The loss for given draws; every step of every resolution counts alike."""
        noised = [part.noised for part in copies]
        sequence = [x_t.flatten(1, 2) for x_t in noised]
        if self.variant == "dart_ar":
            sequence.append(copies[0].x[:, :-1])
        h = self.net(torch.cat(sequence, dim=1), condition)
        parts = h.split([x_t.shape[1] * x_t.shape[2] for x_t in noised], dim=1)
        steps = sum(part.process.num_steps for part in copies)
        terms: dict[str, Tensor] = {}
        for part, x_t, own in zip(copies, noised, parts, strict=True):
            own, share = own.unflatten(1, x_t.shape[1:3]), part.process.num_steps / steps
            v = self.net.linear(own)  # (B, T, K, D)
            found = {"denoise": part.process.loss(v, part.x, part.noise)}
            if part.time is not None:
                found["flow"] = self.flow_loss(part, x_t, v, own)
            terms = {name: terms.get(name, 0) + share * value for name, value in found.items()}
        return {"loss": sum(terms.values()), **(terms if len(terms) > 1 else {})}

    def flow_loss(self, part: Copies, x_t: Tensor, v: Tensor, h: Tensor) -> Tensor:
        """The head's loss on its way from a Gaussian draw to x_{t-1} with the same noise, for t = T..2.

        x_t and v (B, T, K, D), h (B, T, K, E). The trunk learns from it through h alone.
        """
        x = part.process.clean(x_t, v.detach().float())[:, :-1]
        start = mix(x, part.noise[:, 1:], part.process.gamma[1:])
        rows = (x_t[:, 1:], h[:, :-1], start)
        goal, hidden, start = (t.flatten(0, 2) for t in rows)
        return self.head(goal, hidden, part.time.flatten()[None], start[None])["loss"].mean()

    def blank_batch(self, size: int, device: torch.device | str, *, cached: bool = False) -> Batch:
        """As GenerativeModule's, with empty texts; whatever can be cached is encoded."""
        batch = super().blank_batch(size, device)
        if self.text is not None:
            text = torch.zeros(size, self.text_len, dtype=torch.int64, device=device)
            batch |= {"text": text, "text_mask": text > 0}
        elif len(self.processes) == 1:
            with torch.no_grad():
                batch["raw"] = self.tokenizer.encode_image(batch["image"])
        return batch

    # Sampling

    def prepare_sampling(self, *, compile: bool = False) -> None:
        """As GenerativeModule's. `compile` makes CUDA graphs of the steps; of dart_ar's thousands it makes none."""
        cast_linear_(self.net, torch.bfloat16)
        if self.has_flow:
            cast_linear_(self.head, torch.bfloat16)
        if compile and self.variant != "dart_ar":
            self.decoder.capture()
            if self.has_flow:
                self.head.capture_sampling()

    def sample_tokens(self, labels: Tensor, sampling: DARTSampling, generator: Generators = None) -> Tensor:
        """Tokens (B, K, D) for labels (B,), or for the prompts that they stand for; without prompts, for no text."""
        self.check_sampling(sampling)
        shapes = [(len(labels), stage.num_steps, stage.block, self.tokenizer.token_dim) for stage in self.net.stages]
        noises = [randn(shape, generator, device=self.device) for shape in shapes]
        asked = {"label": labels} if self.text is None else self.prompts_of(labels, sampling.prompts)
        return self.generate(noises, asked, sampling)

    def generate(self, noises: Sequence[Tensor], asked: Batch | TextBatch, sampling: DARTSampling) -> Tensor:
        """The sampler for given noise of each resolution, (B, T, K, D); `asked`: label (B,), or text and text_mask.

        Both guidance branches are one batch; conditions are computed once for all steps.
        """
        size, gammas = len(noises[0]), [process.gammas for process in self.processes]
        without = torch.arange(size * (1 + (sampling.cfg_scale != 1)), device=self.device) >= size
        advance = self.decoder.start(self.condition(asked, without), len(without))

        def read(x: Tensor) -> Tensor:
            return advance(for_branches(x, without))

        def x_of(h: Tensor, x_t: Tensor, gamma: float) -> Tensor:
            v = self.net.linear(h).float()
            return clean(x_t, cfg(*v.chunk(2), sampling.cfg_scale) if len(v) > size else v, gamma)

        def predict(x_t: Tensor, i: int, gammas: Sequence[float]) -> Prediction:
            h = read(x_t)
            return Prediction(x_of(h, x_t, gammas[i]), h[:size])

        def refine(x: Tensor, prediction: Prediction) -> Tensor:
            """The head moves on the condition; guidance has acted before."""
            hidden, start = prediction.hidden.flatten(0, 1), x.flatten(0, 1)[None]
            moved = self.head.sample(hidden, start, num_steps=sampling.head_steps, solver="euler")
            return moved.unflatten(0, x.shape[:2])

        if self.variant == "dart_ar":
            tokens = (lambda x: read(x)[:, -1]), (lambda h, x_t, i: x_of(h, x_t, gammas[0][i]))
            return denoise_tokens(*tokens, noises[0], gammas[0])
        for noise, own in zip(noises, gammas, strict=True):
            x = denoise(partial(predict, gammas=own), noise, own, refine=refine if self.has_flow else None)
        return x

    def check_sampling(self, sampling: DARTSampling) -> None:
        """Raise ValueError for guidance where there is nothing to guide away from."""
        if sampling.cfg_scale != 1 and not self.objective.label_drop_prob:
            raise ValueError(
                f"sampling.cfg_scale is {sampling.cfg_scale}, but guidance needs a model that was also trained without "
                f"labels: objective.label_drop_prob is 0; set cfg_scale to 1"
            )

    # Checkpoints

    def load_coarse(self, path: str) -> None:
        """Weights of the same model without hires_steps: the one vector that it lacks stays as it is, 0 at first.

        Raises FileNotFoundError, or ValueError for a file that is not such a checkpoint.
        """
        state = read_own(path, None)
        if state is None:
            raise ValueError(f"coarse_from is {path}, which is no checkpoint of ours: give one of phase 1")
        self.check_text_of(path)
        self.check_facts(state, path, but=["objective.hires_steps"])
        own = {name: self.state_dict()[name] for name in ("net.hires_embed", TRAINED_FOR)}
        self.load_weights(state | own, origin=path)

    def official_rules(self) -> list[Rule]:
        """There is no official layout: names are ours."""
        return [Rule("*", "*")]

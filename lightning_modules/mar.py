"""MAR: autoregressive image generation without vector quantisation (Li et al., arXiv 2406.11838; code LTH14/mar).

Unusual: a Transformer yields one vector z per token, and a small diffusion model on single tokens, conditioned on z,
stands for p(token | z). Orders are random, attention is bidirectional, several tokens are drawn per iteration; raster
or causal variants of the paper share the trunk. In: tokens (B, L, D) or ids (B, L), labels (B,). Out: z (B, R, E).
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from layers.checkpoint import Rule
from layers.checks import check_positive, check_share
from layers.cuda_graphs import Graphed
from layers.gather import put, take
from layers.guidance import for_branches
from layers.heads.base import OneShotHead
from layers.heads.choice import HeadConfig, make_head
from layers.networks.mar import MAR, MARConfig
from layers.orders import scan_order
from layers.patch import channel_major_to_ours, ours_to_channel_major
from layers.precision import compute_dtype
from layers.random import Generators, mix_seed, randn, token_noise
from layers.samplers.masked import annealed_steps, linear_cfg_scale, mask_lengths, mask_rate, reveal
from layers.tokenizers.base import Tokenizer
from lightning_modules.base import Batch, GenerativeModule
from lightning_modules.config import as_config
from lightning_modules.editing import Editable, partition
from lightning_modules.optim import OptimConfig
from lightning_modules.pretrained import TRAINED_TOKENIZER
from lightning_modules.protocol import Protocol


@dataclass
class MARObjective:
    """Which tokens are masked in training."""

    mask_ratio_min: float = 0.7
    mask_multiple: int = 1  # round the masked count up to a multiple: few lengths, so few compiled graphs
    label_drop_prob: float = 0.1

    def __post_init__(self) -> None:
        check_share("objective", self, "mask_ratio_min", "label_drop_prob")
        if self.mask_multiple < 1:
            raise ValueError(f"objective.mask_multiple is {self.mask_multiple}: use 1 or more")


@dataclass
class MARSampling:
    """Sampler settings. Official `sample_tokens`; causal variants draw one token at a time whatever `num_iter` says."""

    num_iter: int = 64
    num_steps: int = 100  # diffusion steps per token; 1 for heads that answer at once
    num_steps_last: int | None = None  # opt-in approximation (DiSA): steps fall linearly to this many
    solver: Literal["ddpm", "ddim", "euler", "heun", "direct"] | None = None  # null: the head's usual one
    cfg_scale: float = 1.0  # off at 1
    cfg_schedule: Literal["linear", "constant"] = "linear"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_positive("sampling", self, "num_iter", "num_steps", "num_steps_last", "temperature")


# torch.compile keeps 8 graphs of a function, then runs it eagerly; training and validation need one each per count
MAX_STATIC_COUNTS = 4

Noise = Callable[[int, int, int], Tensor]  # (draws, tokens per image, D) -> standard normal (draws, B tokens, D)


class MARModule(Editable, GenerativeModule):
    """Training and sampling of MAR and the paper's variants; see GenerativeModule for the common arguments."""

    OFFICIAL_KEYS = ("model", "model_ema")
    UNCONDITIONAL = ("objective.label_drop_prob=0", "sampling.cfg_scale=1")
    PROTOCOL = Protocol(
        num_images=50_000,
        num_classes=1000,
        statistics={256: "VIRTUAL_imagenet256_labeled.npz", 512: "VIRTUAL_imagenet512.npz"},
        weights=("0.9999", "model_ema"),
        note="50 images per class, average weights, 256 iterations x 100 steps, guidance of the recipe (linear); FID "
        "against the mean and covariance in ADM's reference batch, from PNG files",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_classes: int = 1000,
        net: MARConfig = MARConfig(),  # noqa: B008 (dataclass defaults are never changed in place)
        head: HeadConfig = HeadConfig(),  # noqa: B008
        objective: MARObjective = MARObjective(),  # noqa: B008
        sampling: MARSampling = MARSampling(),  # noqa: B008
        optim: OptimConfig = OptimConfig(blr=1e-4),  # noqa: B008
        init_from: str | None = None,
        init_key: str | None = None,
        init_classes: Literal["keep", "new"] = "keep",
        compile: bool = False,
    ) -> None:
        sampling = as_config(MARSampling, sampling)
        loading = {"init_from": init_from, "init_key": init_key, "init_classes": init_classes}
        super().__init__(tokenizer, num_classes, optim, sampling, **loading, compile=compile)
        self.objective = as_config(MARObjective, objective)
        config, self.head_config = as_config(MARConfig, net), as_config(HeadConfig, head)
        sizes = {"token_dim": self.tokenizer.token_dim, "vocab_size": self.tokenizer.vocab_size}
        self.net = MAR(config, seq_len=self.tokenizer.seq_len, num_classes=num_classes, **sizes)
        self.head = make_head(self.head_config, self.net.decoder_width, **sizes)
        order = self.net.config.order
        scan = torch.tensor(scan_order("raster" if order == "random" else order, self.tokenizer.grid))
        self.register_buffer("scan", scan, persistent=False)  # what `orders` are where they are not random
        self._captured: Graphed | None = None  # the trunk, by prepare_sampling
        self.save_arguments(
            tokenizer=self.tokenizer,
            num_classes=num_classes,
            net=config,
            head=self.head_config,
            objective=self.objective,
            sampling=sampling,
            optim=self.optim,
            **loading,
            compile=compile,
        )

    def check_sampling(self, sampling: MARSampling) -> None:
        """Raise ValueError for more iterations than tokens, and for steps or a solver that the head does not have."""
        if not self.causal:
            mask_lengths(self.net.seq_len, sampling.num_iter)
        for steps in (sampling.num_steps, sampling.num_steps_last or sampling.num_steps):
            self.head.noise_shape(steps, sampling.solver or self.head.SOLVERS[0])

    def no_weight_decay(self, name: str, param: nn.Parameter) -> bool:
        """The head has no decay; tables and class vectors have. Official `misc.py`."""
        return name.startswith("head.")

    def compiled_modules(self) -> list[nn.Module]:
        return [self.net, self.head]

    def dynamic_shapes(self) -> bool:
        """The number of masked tokens differs from step to step; a graph each is made for a few numbers only."""
        return not self.causal and len(self.mask_counts()) > MAX_STATIC_COUNTS

    def training_loss(self, batch: Batch, generator: Generator | None = None) -> dict[str, Tensor]:
        """Mean of the head's loss over masked tokens (all tokens of causal variants). Official `forward`."""
        x = self.tokens(batch, generator).x  # (B, L, D) or (B, L)
        size, seq_len = x.shape[:2]
        dropped = self.global_rows(torch.rand, size, generator=generator) < self.objective.label_drop_prob
        labels = torch.where(dropped & self.training, self.num_classes, batch["label"])
        orders = self.orders(self.global_rows(torch.rand, size, seq_len, generator=generator))
        num_masked = seq_len if self.causal else self.num_masked(generator)
        one_shot = isinstance(self.head, OneShotHead)  # no times, no noise
        shape = (size, 1 if one_shot else self.head_config.repeat, num_masked)
        time = self.head.draw_times(self.global_rows(torch.rand, *shape, generator=generator))
        dim = 0 if one_shot else self.tokenizer.token_dim
        noise = self.global_rows(torch.randn, *shape, dim, generator=generator)
        return self.masked_loss(x, labels, orders[:, :num_masked], orders[:, num_masked:], time, noise)

    def masked_loss(
        self, x: Tensor, labels: Tensor, masked: Tensor, known: Tensor, time: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Loss for given draws: positions masked (B, R) and known (B, K), time (B, M, R), noise (B, M, R, D).

        Only masked rows meet the head, and each condition is projected once for its M draws.
        """
        z = self.conditions(x, labels, masked, known)  # (B, R, E)
        wanted = take(x, masked).flatten(0, 1)  # (B R, D) or (B R,)
        time = time.transpose(0, 1).flatten(1)  # (M, B R)
        terms = self.head(wanted, z.flatten(0, 1), time, noise.transpose(0, 1).flatten(1, 2))
        return {name: value.mean() for name, value in terms.items()}

    def conditions(self, x: Tensor, labels: Tensor, masked: Tensor, known: Tensor) -> Tensor:
        """z (B, R, E) of the masked positions; causal variants predict each from those that come before it."""
        if not self.causal:
            return self.net(take(x, known), known, masked, labels)
        return self.net(take(x, masked[:, :-1]), masked[:, :-1], masked, labels)

    @property
    def causal(self) -> bool:
        return self.net.config.attention == "causal"

    def orders(self, keys: Tensor) -> Tensor:
        """Orders (B, L) from random keys (B, L): last revealed first, but for causal trunks in order of generation."""
        if self.net.config.order == "random":
            return keys.argsort(dim=1)
        return (self.scan if self.causal else self.scan.flip(0)).expand(len(keys), -1)

    def num_masked(self, generator: Generator | None) -> int:
        """Masked tokens of this step, one number for all images and processes, drawn on the host.

        The official code draws one per process; a common one leaves no process waiting for another.
        """
        u = mix_seed(generator.initial_seed()) / 2**63 if generator else random.random()
        return self._round_up(math.ceil(self.tokenizer.seq_len * mask_rate(u, self.objective.mask_ratio_min)))

    def mask_counts(self) -> list[int]:
        """All numbers of masked tokens that training meets."""
        seq_len = self.tokenizer.seq_len
        fewest = math.ceil(seq_len * self.objective.mask_ratio_min)
        return sorted({self._round_up(count) for count in range(fewest, seq_len + 1)})

    def _round_up(self, count: int) -> int:
        multiple = self.objective.mask_multiple
        return min(self.tokenizer.seq_len, -(-count // multiple) * multiple)

    # Sampling

    def prepare_sampling(self, *, compile: bool = False) -> None:
        """As GenerativeModule's. `compile` makes CUDA graphs of trunk and head, one per shape when it first occurs.

        At 64 iterations these are 64 numbers of known tokens and 7 of new ones, anew for each size of batch. What is
        inside, a block and a step of the head, is compiled once for all lengths. Of causal trunks, the head alone.
        """
        super().prepare_sampling()
        if compile:
            for block in [*self.net.encoder_blocks, *self.net.decoder_blocks]:
                block.compile(dynamic=True)
            self._captured = Graphed(self.net)
            self.head.capture_sampling()

    def sample_tokens(self, labels: Tensor, sampling: MARSampling, generator: Generators = None) -> Tensor:
        """Tokens (B, L, D) or ids (B, L) for labels (B,). Official `sample_tokens`."""
        orders = self.orders(randn((len(labels), self.net.seq_len), generator, device=self.device))
        return self.generate(labels, orders, self.noise_source(len(labels), generator), sampling)

    def noise_source(self, batch: int, generator: Generators) -> Noise:
        """(draws, tokens per image, D) -> noise (draws, B tokens, D): each image's comes from its own generator."""
        return partial(token_noise, batch, generator=generator, device=self.device)

    def generate(self, labels: Tensor, orders: Tensor, noise: Noise, sampling: MARSampling) -> Tensor:
        """The sampler for given orders (B, L) and noise."""
        x = self.empty_tokens(len(labels))
        if self.causal:
            return self._generate_causal(x, labels, orders, noise, sampling)
        return self.fill(x, labels, orders, self.net.seq_len, noise, sampling)

    def fill(
        self, x: Tensor, labels: Tensor, orders: Tensor, num_unknown: int, noise: Noise, sampling: MARSampling
    ) -> Tensor:
        """Replace the unknown tokens `orders[:, :num_unknown]` of x, some per iteration; the others stay."""
        lengths = mask_lengths(num_unknown, sampling.num_iter)
        steps = annealed_steps(sampling.num_steps, sampling.num_steps_last, len(lengths))
        labels = self._with_null(labels, sampling)
        for k, (known, new) in enumerate(reveal(orders, num_unknown, lengths)):
            scale = self._scale(sampling, lengths[k])
            z = self._guided_z(x, labels, new, known)
            x = put(x, new, self._draw(z, new, noise, scale, steps[k], sampling))
        return x

    def _generate_causal(
        self, x: Tensor, labels: Tensor, orders: Tensor, noise: Noise, sampling: MARSampling, num_known: int = 0
    ) -> Tensor:
        """One token after another, in order of generation, with a KV cache; the first `num_known` enter it at once."""
        labels = self._with_null(labels, sampling)
        cache = self.net.init_cache(len(labels), dtype=compute_dtype(self.device), device=self.device)
        steps = annealed_steps(sampling.num_steps, sampling.num_steps_last, x.shape[1] - num_known)
        for j in range(num_known, orders.shape[1]):
            start = 0 if j == num_known else j - 1
            new, known = orders[:, j : j + 1], for_branches(orders[:, start:j], labels)  # (B, 1), (B, 1 or at first K)
            targets = for_branches(orders[:, j if j > num_known else 0 : j + 1], labels)
            tokens = take(for_branches(x, labels), known)
            z = self.net.causal(tokens, known, targets, labels if j == num_known else None, cache)[:, -1:]  # (B, 1, E)
            scale = self._scale(sampling, max(1, orders.shape[1] - j - 1))
            x = put(x, new, self._draw(z, new, noise, scale, steps[j - num_known], sampling))
        return x

    def redraw(
        self, x: Tensor, unknown: Tensor, labels: Tensor, sampling: MARSampling, generator: Generators
    ) -> Tensor:
        """See Editable; iterations are at most as many as tokens are drawn."""
        if self.causal and self.net.config.order != "random":
            raise ValueError(
                f"a causal trunk of {self.net.config.order} order cannot edit: it draws each token from those before "
                f"it, and never sees known ones after; train with net.order=random or net.attention=bidirectional"
            )
        count = int(unknown[0].sum())
        orders = self.orders(randn(unknown.shape, generator, device=self.device))
        orders, noise = partition(orders, unknown == self.causal), self.noise_source(len(x), generator)
        if self.causal:
            return self._generate_causal(x, labels, orders, noise, sampling, self.net.seq_len - count)
        return self.fill(x, labels, orders, count, noise, replace(sampling, num_iter=min(sampling.num_iter, count)))

    def empty_tokens(self, batch: int) -> Tensor:
        """Tokens of which nothing is known yet."""
        if self.tokenizer.vocab_size:
            return torch.zeros(batch, self.net.seq_len, dtype=torch.int64, device=self.device)
        return torch.zeros(batch, self.net.seq_len, self.tokenizer.token_dim, device=self.device)

    def _with_null(self, labels: Tensor, sampling: MARSampling) -> Tensor:
        """Labels of both guidance branches (2B,), or of the only one (B,)."""
        return labels if sampling.cfg_scale == 1 else torch.cat([labels, torch.full_like(labels, self.num_classes)])

    def _guided_z(self, x: Tensor, labels: Tensor, new: Tensor, known: Tensor) -> Tensor:
        """z (B or 2B, R, E) of the new positions in all branches.

        While nothing is known, an image differs from another by its class alone: the branch without is one row.
        """
        trunk = self._captured or self.net.forward  # not as compiled for training: sampling meets too many shapes
        if known.shape[1] or len(x) == len(labels):
            known, new, x = (for_branches(y, labels) for y in (known, new, x))
            return trunk(take(x, known), known, new, labels)
        size = len(x)
        everywhere = torch.arange(self.net.seq_len, device=x.device).expand(size + 1, -1)
        rows, positions = x[:1].expand(size + 1, *x.shape[1:]), everywhere[:, :0]
        z = trunk(take(rows, positions), positions, everywhere, labels[: size + 1])  # (B + 1, L, E)
        return torch.cat([take(z[:size], new), take(z[size:], new)])

    def _draw(
        self, z: Tensor, new: Tensor, noise: Noise, scale: float, num_steps: int, sampling: MARSampling
    ) -> Tensor:
        """Tokens (B, R, ...) from z (B or 2B, R, E)."""
        cond, *uncond = z.split(len(new))
        solver = sampling.solver or self.head.SOLVERS[0]
        draws, dim = self.head.noise_shape(num_steps, solver)
        rows = self.head.sample(
            cond.flatten(0, 1),
            noise(draws, new.shape[1], dim),
            uncond=uncond[0].flatten(0, 1) if uncond else None,
            cfg_scale=scale,
            temperature=sampling.temperature,
            num_steps=num_steps,
            solver=solver,
        )
        return rows.unflatten(0, new.shape)

    def _scale(self, sampling: MARSampling, unknown: int) -> float:
        if sampling.cfg_schedule == "constant":
            return sampling.cfg_scale
        return linear_cfg_scale(sampling.cfg_scale, unknown, self.net.seq_len)

    def official_rules(self) -> list[Rule]:
        """Names are the official ones; a token's channels, there channel-major, are permuted to our order."""
        names = [Rule(name, f"net.y_embedder.{name}") for name in ("class_emb.weight", "fake_latent")]
        return [*names, TRAINED_TOKENIZER, *self._patch_rules(), Rule("diffloss.*", "head.*"), Rule("*", "net.*")]

    def _patch_rules(self) -> list[Rule]:
        """Rules of the tensors that have an axis of token channels, where a token is a patch of several pixels."""
        p = getattr(self.tokenizer, "patch_size", 1)
        if p == 1 or self.tokenizer.vocab_size:
            return []
        channels = self.tokenizer.token_dim // p**2
        ours, official = channel_major_to_ours(p, channels), ours_to_channel_major(p, channels)

        def columns(index: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda w: w[:, index.to(w.device)]

        def outputs(index: Tensor) -> Callable[[Tensor], Tensor]:  # rows of the noise, then of the variance
            return lambda w: w.unflatten(0, (-1, len(index)))[:, index.to(w.device)].flatten(0, 1)

        last = "net.final_layer.linear"
        return [
            Rule("z_proj.weight", "net.z_proj.weight", columns(ours), columns(official)),
            Rule("diffloss.net.input_proj.weight", "head.net.input_proj.weight", columns(ours), columns(official)),
            Rule(f"diffloss.{last}.weight", f"head.{last}.weight", outputs(ours), outputs(official)),
            Rule(f"diffloss.{last}.bias", f"head.{last}.bias", outputs(ours), outputs(official)),
        ]

"""RAR: randomized autoregressive image generation (Yu et al., arXiv 2411.00776; code bytedance/1d-tokenizer).

A language model of image tokens with cross-entropy. Unusual: at first every image of a batch is presented in a random
order of its own, later ever fewer, at last all in one scan, in which images are drawn; the model so learns what lies on
both sides of a token. In: ids (B, L) of any discrete tokenizer, labels (B,). Out: logits (B, L, V), or ids.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from layers.checkpoint import Rule
from layers.checks import check_positive, check_share
from layers.guidance import cfg, for_branches, power_cosine_scale
from layers.networks.rar import RAR, RARConfig
from layers.orders import Scan, annealed_orders, random_ratio, scan_order
from layers.precision import cast_linear_, compute_dtype
from layers.random import Generators, randn
from layers.samplers.autoregressive import autoregress
from layers.samplers.maskgit import gumbel_from_normal
from layers.tokenizers.base import Tokenizer
from lightning_modules.base import Batch, GenerativeModule
from lightning_modules.config import as_config
from lightning_modules.optim import OptimConfig
from lightning_modules.pretrained import TRAINED_TOKENIZER
from lightning_modules.protocol import Protocol

# parameters without weight decay: those of whose official name this is a part. So the adaLN of the last norm, in whose
# name there is an "ln", is free of it, and those of the blocks, which are spelt LN, are not. Official `train_utils.py`
NO_DECAY = ("ln", "bias", "norm", "embed")
NOISE_BLOCK = 16  # tokens for which noise is drawn at once

Noise = Callable[[int], Tensor]  # number of a token -> standard Gumbel noise (B, V)


@dataclass
class RARObjective:
    """In which order tokens are learnt, and which labels are not shown. Official `rar.yaml`."""

    anneal_start: int = 125_000  # optimiser steps; before, all orders are random
    anneal_end: int = 187_500  # from there on, none is
    scan: Scan = "raster"  # the order that training anneals to, and in which images are drawn
    label_drop_prob: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.anneal_start <= self.anneal_end:
            raise ValueError(
                f"objective.anneal_start is {self.anneal_start} and anneal_end {self.anneal_end}: they are optimiser "
                f"steps, the first at least 0 and not after the second (both 0: no random order)"
            )
        check_share("objective", self, "label_drop_prob")


@dataclass
class RARSampling:
    """Sampler settings. Official `generate`."""

    temperature: float = 1.0  # logits are divided by it
    cfg_scale: float = 1.0  # guidance of the last tokens; off at 1 (officially at 0)
    cfg_power: float = 0.0  # how late guidance sets in, from 1 (`power_cosine_scale`); 0: the same for all tokens

    def __post_init__(self) -> None:
        check_positive("sampling", self, "temperature")
        if self.cfg_power < 0:
            raise ValueError(f"sampling.cfg_power is {self.cfg_power}: use 0 (constant guidance) or more")


class RARModule(GenerativeModule):
    """Training and sampling of RAR; see GenerativeModule for the common arguments."""

    OFFICIAL_KEYS = ("model",)  # the authors keep no average, and their files are bare state dicts
    UNCONDITIONAL = ("objective.label_drop_prob=0", "sampling.cfg_scale=1")
    PROTOCOL = Protocol(
        num_images=50_000,
        num_classes=1000,
        statistics={256: "VIRTUAL_imagenet256_labeled.npz"},
        weights=("raw",),
        note="50 images per class, raw weights, guidance, its power and temperature of the recipe, float32 with TF32; "
        "ADM's evaluation suite",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_classes: int = 1000,
        net: RARConfig = RARConfig(),  # noqa: B008 (dataclass defaults are never changed in place)
        objective: RARObjective = RARObjective(),  # noqa: B008
        sampling: RARSampling = RARSampling(),  # noqa: B008
        optim: OptimConfig = OptimConfig(lr=4e-4),  # noqa: B008
        init_from: str | None = None,
        init_key: str | None = None,
        init_classes: Literal["keep", "new"] = "keep",
        compile: bool = False,
    ) -> None:
        sampling = as_config(RARSampling, sampling)
        loading = {"init_from": init_from, "init_key": init_key, "init_classes": init_classes}
        super().__init__(tokenizer, num_classes, optim, sampling, **loading, compile=compile)
        self.objective, config = as_config(RARObjective, objective), as_config(RARConfig, net)
        vocab_size = self.tokenizer.vocab_size
        if not vocab_size:
            raise ValueError(
                f"RAR's tokens are ids, but {type(self.tokenizer).__name__}'s are continuous: use a discrete one, such "
                f"as layers.tokenizers.maskgit_vq.MaskGITVQTokenizer"
            )
        self.net = RAR(config, seq_len=self.tokenizer.seq_len, vocab_size=vocab_size, num_classes=num_classes)
        scan = torch.tensor(scan_order(self.objective.scan, self.tokenizer.grid))
        self.register_buffer("scan", scan, persistent=False)
        self.save_arguments(
            tokenizer=self.tokenizer,
            num_classes=num_classes,
            net=config,
            objective=self.objective,
            sampling=sampling,
            optim=self.optim,
            **loading,
            compile=compile,
        )

    def check_sampling(self, sampling: RARSampling) -> None:
        """Raise ValueError for guidance where there is nothing to guide away from."""
        if sampling.cfg_scale != 1 and not self.objective.label_drop_prob:
            raise ValueError(
                f"sampling.cfg_scale is {sampling.cfg_scale}, but guidance needs a model that knows labels and their "
                f"absence: objective.label_drop_prob is 0; set cfg_scale to 1"
            )

    def no_weight_decay(self, name: str, param: nn.Parameter) -> bool:
        """See NO_DECAY."""
        return any(part in name.removeprefix("net.") for part in NO_DECAY)

    # Training

    def training_loss(self, batch: Batch, generator: Generator | None = None) -> dict[str, Tensor]:
        """Mean cross-entropy of all tokens in nats, and the share of them that is the likeliest one.

        In evaluation all orders are the scan, and all labels are shown.
        """
        ids, labels = self.tokens(batch, generator).x, batch["label"]
        if not self.training:
            return self.order_loss(ids, labels, self.scan.expand_as(ids))
        size, seq_len = ids.shape
        uniform = (self.global_rows(torch.rand, size, *shape, generator=generator) for shape in ((), (), (seq_len,)))
        dropped, coins, keys = uniform
        labels = torch.where(dropped < self.objective.label_drop_prob, self.num_classes, labels)
        return self.order_loss(ids, labels, annealed_orders(coins, keys, self.scan, self.random_ratio()))

    def order_loss(self, ids: Tensor, labels: Tensor, orders: Tensor) -> dict[str, Tensor]:
        """Loss for given draws: ids (B, L) in raster order, labels (B,) up to num_classes, orders (B, L).

        The last token is no input: officially it is one, whose output is thrown away.
        """
        ids = ids.gather(1, orders)
        logits = self.net(ids[:, :-1], orders, labels).float()  # (B, L, V)
        right = logits.detach().argmax(dim=-1) == ids
        return {"loss": F.cross_entropy(logits.flatten(0, 1), ids.flatten()), "accuracy": right.float().mean()}

    def random_ratio(self) -> float:
        """Share of random orders at this step."""
        step = self.trainer.global_step if self._trainer else 0
        return random_ratio(step, start=self.objective.anneal_start, end=self.objective.anneal_end)

    # Sampling

    def prepare_sampling(self, *, compile: bool = False) -> None:
        """As GenerativeModule's. `compile` has nothing to act on: each token is a call of another length."""
        cast_linear_(self.net, torch.bfloat16)

    def sample_tokens(self, labels: Tensor, sampling: RARSampling, generator: Generators = None) -> Tensor:
        """Ids (B, L) in raster order for labels (B,)."""
        return self.generate(labels, self.noise_source(len(labels), generator), sampling)

    def noise_source(self, batch: int, generator: Generators) -> Noise:
        """Gumbel noise token by token; each image's comes from its own generator, a block of tokens at once."""
        block = torch.empty(0)

        def draw(index: int) -> Tensor:
            nonlocal block
            if index % NOISE_BLOCK == 0:
                normal = randn((batch, NOISE_BLOCK, self.net.vocab_size), generator, device=self.device)
                block = gumbel_from_normal(normal)
            return block[:, index % NOISE_BLOCK]

        return draw

    def generate(self, labels: Tensor, noise: Noise, sampling: RARSampling) -> Tensor:
        """One token after another along the scan, with a KV cache; guidance doubles the batch, not the calls.

        The likeliest id after noise is one drawn from the distribution (Gumbel). Officially `multinomial`, which is the
        same with exponential noise.
        """
        rows, length = self.branches(labels, sampling), self.net.seq_len
        cache = self.net.init_cache(rows, self.scan, dtype=compute_dtype(self.device))

        def step(ids: Tensor, index: int) -> Tensor:
            return self.net.step(for_branches(ids, rows), index, cache)

        def draw(logits: Tensor, index: int) -> Tensor:
            guided = self.guided(logits.float(), len(labels), index, sampling)
            return (guided / sampling.temperature + noise(index)).argmax(dim=-1)

        drawn = autoregress(self.net.prefill(rows, cache), step, draw, length)  # (B, L) along the scan
        return torch.empty_like(drawn).scatter_(1, self.scan.expand_as(drawn), drawn)

    def branches(self, labels: Tensor, sampling: RARSampling) -> Tensor:
        """Labels of both guidance branches (2B,), those with classes first, or of the only one (B,)."""
        self.check_sampling(sampling)
        if sampling.cfg_scale == 1:
            return labels
        return torch.cat([labels, torch.full_like(labels, self.num_classes)])

    def guided(self, logits: Tensor, batch: int, index: int, sampling: RARSampling) -> Tensor:
        """Logits (B, V) of token `index` from those of the branches (2B, V), or of the only one."""
        cond, *uncond = logits.split(batch)
        scale = power_cosine_scale(sampling.cfg_scale, index, self.net.seq_len, sampling.cfg_power)
        return cfg(cond, uncond[0], scale) if uncond else cond

    # Official files

    def _with_new_classes(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fresh rows for our classes; those of the ids and of "no class" stay the file's."""
        name, first = "net.embeddings.weight", self.net.first_class
        if name not in state or state[name].shape[1] != self.net.config.width:
            return state  # the strict load reports it
        fresh = self.net.embeddings.weight[first:-1].detach().cpu()
        return state | {name: torch.cat([state[name][:first], fresh, state[name][-1:]])}

    def official_rules(self) -> list[Rule]:
        """Names and layouts are the official ones."""
        return [TRAINED_TOKENIZER, Rule("*", "net.*")]

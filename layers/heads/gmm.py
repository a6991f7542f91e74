"""Gaussian-mixture head: the token's density in closed form, so that it is trained by likelihood (GIVT, Tschannen et
al., arXiv 2312.02116; official `givt.py`, `parallel_decode.py`; JetFormer has the same head).

In: conditions (R, E). Out: terms per row, or tokens (R, D). Unusual: training computes the outputs of a few rows at a
time, sampling draws the component first and computes no other one's; guidance acts on densities, at the drawn
component of both branches.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from layers.heads.base import OneShotHead, Terms, check_draws, stack_guidance
from layers.heads.chunked import Density, chunk_rows, density_of_linear, linear, linear_of_rows
from layers.heads.mixtures import (
    KINDS,
    SCALE_MIN,
    SCALES,
    FullGaussian,
    Gaussian,
    Mixture,
    check_temperatures,
    clipped,
    nucleus,
    positive,
    quantile,
)
from layers.samplers import gmm_cfg

WEIGHT_STD = 0.02  # of init "spread"
LOC_STD = 0.5  # of the components' locs at its start, where scales are 1: apart, but none without tokens of its own
USAGE_ROWS = 256  # rows that `usage` looks at
COLLAPSED = 1e-5  # smaller scales mean that numbers recur: tokens are of order one, and float32 has 7 digits of them
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class HeadConfig:
    """GIVT's mixture of a token; see GMMHead. Official `get_pdf`; paper section 3.2."""

    num_mixtures: int = 16
    kind: Literal["diagonal", "per_channel", "full"] = "diagonal"
    scale: Literal["squareplus", "softplus", "squareplus_unfixed"] = "squareplus"
    scale_min: float = SCALE_MIN
    # zero: the official one, with which equal components get equal gradients and may never part; spread: apart at once
    init: Literal["spread", "zero"] = "spread"


class Settings(NamedTuple):
    """What changes the law that tokens are drawn from; see `GMMHead.sample`."""

    temperature: float = 1.0
    inv_temperature: float = 1.0
    top_p: float | None = None
    clip_sigmas: float | None = None


class Draw(NamedTuple):
    """Tokens (R, D), and under guidance what they were drawn from: the first arguments of `gmm_cfg`'s functions."""

    token: Tensor
    guided: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None


class GMMHead(OneShotHead):
    """token_dim D, cond_dim E, num_mixtures K.

    kind: "diagonal", "per_channel", or "full", which has one component. scale: the function that makes raw outputs
    positive, "squareplus" (released weights) or "softplus" (the paper's text), never below scale_min. init: "zero" is
    the official one, whose components start equal, have equal gradients and stay one Gaussian but for rounding; with
    "spread" they differ from the start. dtype: of the linear layer's product, whatever autocast says: in bfloat16 a loc
    has 3 digits, which sharp tokens feel.
    """

    SOLVERS: ClassVar[tuple[str, ...]] = ("closed_form", "rejection")  # of guidance; without it there is no difference

    def __init__(
        self,
        token_dim: int,
        cond_dim: int,
        *,
        num_mixtures: int,
        kind: Literal["diagonal", "per_channel", "full"] = "diagonal",
        scale: Literal["squareplus", "softplus", "squareplus_unfixed"] = "squareplus",
        scale_min: float = SCALE_MIN,
        init: Literal["spread", "zero"] = "spread",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__()
        _check_choice("kind", kind, KINDS)
        _check_choice("scale", scale, SCALES)
        _check_choice("init", init, ("spread", "zero"))
        _check_choice("dtype", dtype, DTYPES)
        if num_mixtures < 1:
            raise ValueError(f"num_mixtures is {num_mixtures}: a density has at least one component")
        if scale_min <= 0:
            raise ValueError(f"scale_min is {scale_min}: no scale is smaller, so it must be positive")
        if kind == "full" and num_mixtures != 1:
            raise ValueError(
                f"num_mixtures is {num_mixtures}, but kind 'full' is one Gaussian: set it to 1, or use 'diagonal'"
            )
        self.token_dim, self.num_mixtures, self.kind = token_dim, num_mixtures, kind
        self.scale, self.scale_min, self.dtype = scale, scale_min, DTYPES[dtype]
        self.linear = nn.Linear(cond_dim, KINDS[kind].num_outputs(token_dim, num_mixtures))
        self.init_weights(init)

    @torch.no_grad()
    def init_weights(self, init: str) -> None:
        """All zeros, as officially, or small weights and locs that differ."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        if init == "zero":
            return
        nn.init.normal_(self.linear.weight, std=WEIGHT_STD)
        if self.num_mixtures > 1:
            index = self._outputs_of(torch.arange(self.num_mixtures)[:, None].expand(-1, self._num_choices))
            locs = index[:, : self.token_dim].flatten()
            self.linear.bias[locs] = LOC_STD * torch.randn(len(locs))

    # Densities

    def distribution(self, h: Tensor) -> Mixture:
        """The mixture of conditions h (..., E), whole."""
        return self._parse(linear(h, *self._weights, self.dtype))

    def log_prob(self, h: Tensor, x: Tensor) -> Tensor:
        """log p(x | h) in nats per token (...), the plain form: h (..., E), x (..., D). The oracle of `nll`."""
        return self._token_log_prob(self.distribution(h), x)

    def nll(self, h: Tensor, x: Tensor, *, chunk: int | None = None) -> Tensor:
        """-log_prob in memory that does not grow with the number of rows, but for h, x and their gradients.

        chunk: rows at a time, by default as `chunk_rows` says.
        """

        def density(outputs: Tensor, x: Tensor) -> Tensor:
            return -self._token_log_prob(self._parse(outputs), x)

        return self._chunked(h, x, density, chunk)

    def loss(self, x: Tensor, z: Tensor, time: Tensor, noise: Tensor) -> Terms:
        """Term "nll": nats per token; "loss" is the same, but per channel where the mixtures are (official).

        time and noise are not looked at, so M is 1.
        """
        nll = self.nll(z, x)[None]
        return {"loss": nll / self.token_dim if self.kind == "per_channel" else nll, "nll": nll}

    @torch.no_grad()
    def usage(self, h: Tensor) -> dict[str, Tensor]:
        """What tells whether components are used, of at most `USAGE_ROWS` of the conditions h (..., E).

        component_entropy: of the mean weights, in nats, at most log K; component_spread: standard deviation of the locs
        over the components, 0 in the symmetric solution; min_scale: smallest scale.
        """
        rows = h.flatten(0, -2)
        mixture = self.distribution(rows[:: -(-len(rows) // USAGE_ROWS)])
        if isinstance(mixture, FullGaussian):
            return {"min_scale": mixture.scale_tril.diagonal(dim1=-2, dim2=-1).min()}
        weights = mixture.logits.softmax(-1).mean(0)  # (K,) or (D, K)
        entropy = -torch.xlogy(weights, weights).sum(-1).mean()
        spread = mixture.loc.std(-2 if self.kind == "diagonal" else -1, correction=0).mean()
        return {"component_entropy": entropy, "component_spread": spread, "min_scale": mixture.scale.min()}

    def check_scales(self, smallest: float) -> None:
        """Raise ValueError if the smallest scale of `usage` has collapsed; a larger `scale_min` forbids that."""
        if smallest <= COLLAPSED and self.scale != "squareplus_unfixed":  # whose negative values are all clamped
            raise ValueError(
                f"the mixture's scales have collapsed, to {smallest:.1e}: tokens repeat the same numbers, "
                f"so that their likelihood has no bound; train on tokens with noise (DequantisedTokenizer), or set "
                f"--model.init_args.head.scale_min to the precision that they have"
            )

    # Sampling

    def noise_shape(self, num_steps: int, solver: str) -> tuple[int, int]:
        """closed_form: one row of the numbers that choose components, then D of the token. rejection: a row of 2D of
        which the first choose and the last D are the fallback's, then a row for each proposal: its token, its trial."""
        self.check_one_step(num_steps, solver)
        if solver == "rejection":
            return 1 + gmm_cfg.PROPOSALS, 2 * self.token_dim
        return 1, self._num_choices + self.token_dim

    def sample(
        self,
        z: Tensor,
        noise: Tensor,
        *,
        uncond: Tensor | None = None,
        cfg_scale: float | Tensor = 1.0,
        temperature: float = 1.0,
        num_steps: int = 1,
        solver: str = "closed_form",
        inv_temperature: float = 1.0,
        top_p: float | None = None,
        clip_sigmas: float | None = None,
    ) -> Tensor:
        """Tokens (R, D). See Head, and:

        temperature: factor of the scales. inv_temperature: factor of the mixture logits. top_p: only the likeliest
        components, of this mass together. clip_sigmas: tokens within so many scales of the drawn component (both are
        the paper's nucleus truncation). Guidance is density-based, w = cfg_scale - 1. Raises ValueError for guidance of
        kind "full", and for settings out of range.
        """
        settings = Settings(temperature, inv_temperature, top_p, clip_sigmas)
        return self._draw(z, noise, uncond, cfg_scale, num_steps, solver, settings).token

    def sample_with_log_prob(
        self,
        z: Tensor,
        noise: Tensor,
        *,
        uncond: Tensor | None = None,
        cfg_scale: float | Tensor = 1.0,
        num_steps: int = 1,
        solver: str = "closed_form",
        **settings: float | None,
    ) -> tuple[Tensor, Tensor]:
        """`sample`'s tokens (R, D), and their log-densities (R,) in nats under the tempered mixture; settings as there.

        Under guidance: under the product of the drawn components, summed over channels and not normalised, by which
        the official MaskGIT decoder ranks tokens.
        """
        law = Settings(**settings)
        token, guided = self._draw(z, noise, uncond, cfg_scale, num_steps, solver, law)
        if guided is not None:
            return token, gmm_cfg.guided_log_density(token, *guided).sum(-1)

        def density(outputs: Tensor, x: Tensor) -> Tensor:
            return self._token_log_prob(self._parse(outputs).tempered(law.temperature, law.inv_temperature), x)

        return token, self._chunked(z, token, density)

    def _draw(
        self,
        z: Tensor,
        noise: Tensor,
        uncond: Tensor | None,
        cfg_scale: float | Tensor,
        num_steps: int,
        solver: str,
        settings: Settings,
    ) -> Draw:
        check_draws(noise, self.noise_shape(num_steps, solver), len(z))
        rows, scale = stack_guidance(z, uncond, cfg_scale, torch.float32)  # (R, E) or (2, R, E)
        self._check_settings(settings, cfg_scale if scale is not None else None, solver)
        choice, eps = noise[0, :, : self._num_choices], clipped(noise[0, :, -self.token_dim :], settings.clip_sigmas)
        if self.kind == "full":
            return Draw(self.distribution(rows).tempered(settings.temperature).sample(eps), None)
        loc, sigma = self._component(rows, choice, settings)
        if scale is None:
            return Draw(Gaussian(loc, sigma).sample(eps), None)
        guided = (loc[0], sigma[0], loc[1], sigma[1], scale - 1)
        if solver == "closed_form":
            return Draw(gmm_cfg.guided_closed_form(*guided, eps), guided)
        return Draw(gmm_cfg.guided_rejection_blocks(*guided, self._proposals(noise), eps).sample, guided)

    def _component(self, rows: Tensor, choice: Tensor, settings: Settings) -> Gaussian:
        """The drawn component's Gaussian for rows (R, E), or for both branches (2, R, E): its index then comes from the
        conditional weights alone (official). No other component's outputs are computed."""
        logits = self._mixture_logits(rows if rows.ndim == 2 else rows[0]) * settings.inv_temperature
        if settings.top_p is not None:
            logits = nucleus(logits, settings.top_p)
        component = quantile(logits, torch.special.ndtr(choice.double()))  # (R, 1) or (R, D)
        index = self._outputs_of(component)
        outputs = linear_of_rows(rows.view(-1, *rows.shape[-2:]), *self._weights, index, self.dtype)
        loc, raw = outputs.view(*rows.shape[:-1], 2, self.token_dim).unbind(-2)
        return Gaussian(loc, positive(raw, self.scale, self.scale_min) * settings.temperature)

    def _mixture_logits(self, h: Tensor) -> Tensor:
        """(R, 1, K), or (R, D, K) per channel: h (R, E)."""
        count = self._num_choices * self.num_mixtures
        weight, bias = (t[:count] for t in self._weights)
        return linear(h, weight, bias, self.dtype).unflatten(-1, (self._num_choices, self.num_mixtures))

    def _proposals(self, noise: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of standard normal and uniform draws, (k, R, D) each."""
        for block in noise[1:].split(gmm_cfg.BLOCK):
            eps, trial = block.chunk(2, dim=-1)
            yield eps, torch.special.ndtr(trial)

    # Shared

    @property
    def _weights(self) -> tuple[Tensor, Tensor]:
        return self.linear.weight, self.linear.bias

    @property
    def _num_choices(self) -> int:
        """Components that are drawn per token."""
        return {"diagonal": 1, "per_channel": self.token_dim, "full": 0}[self.kind]

    def _outputs_of(self, component: Tensor) -> Tensor:
        """Outputs of loc, then of raw scale, of components (R, 1) or (R, D): indices (R, 2D)."""
        if self.kind == "diagonal":
            component = component[..., 0]
        return KINDS[self.kind].outputs_of(component, self.token_dim, self.num_mixtures).flatten(-2)

    def _parse(self, outputs: Tensor) -> Mixture:
        return KINDS[self.kind].parse(outputs, self.token_dim, scale=self.scale, scale_min=self.scale_min)

    def _token_log_prob(self, mixture: Mixture, x: Tensor) -> Tensor:
        """(...) in nats, of tokens x (..., D): channels with mixtures of their own are independent."""
        log_prob = mixture.log_prob(x.float())
        return log_prob.sum(-1) if self.kind == "per_channel" else log_prob

    def _chunked(self, h: Tensor, x: Tensor, density: Density, chunk: int | None = None) -> Tensor:
        """density(outputs of h (..., E), x (..., D)), (...), in memory that does not grow with the number of rows."""
        rows = chunk or chunk_rows(len(self.linear.bias))
        flat = h.flatten(0, -2), x.flatten(0, -2)
        return density_of_linear(*flat, *self._weights, density=density, dtype=self.dtype, rows=rows).view(h.shape[:-1])

    def _check_settings(self, settings: Settings, cfg_scale: float | Tensor | None, solver: str) -> None:
        """Raise ValueError for settings that mean nothing, or not together; cfg_scale is None where guidance is off."""
        check_temperatures(settings.temperature, settings.inv_temperature)
        if settings.top_p is not None and self.num_mixtures == 1:
            raise ValueError(f"top_p is {settings.top_p}, but there is one component, none to leave out: remove it")
        if settings.clip_sigmas is not None and settings.clip_sigmas <= 0:
            raise ValueError(f"clip_sigmas is {settings.clip_sigmas}: it must be positive, or absent for no clipping")
        if cfg_scale is None:
            return
        if self.kind == "full":
            raise ValueError(
                f"cfg_scale is {cfg_scale}, but guidance of densities acts on single channels, which kind 'full' does "
                f"not have: set it to 1, or train kind 'diagonal'"
            )
        if settings.clip_sigmas is not None and solver == "rejection":
            raise ValueError(
                f"clip_sigmas is {settings.clip_sigmas}, but it clips the noise of one Gaussian, and solver "
                f"'rejection' tries many: remove it, or use 'closed_form'"
            )


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: use {', '.join(choices)}")

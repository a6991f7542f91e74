"""Gaussian mixtures over continuous tokens, from the raw outputs of a linear layer (GIVT, Tschannen et al., arXiv
2312.02116; official `givt.py`).

Three kinds: components with a diagonal covariance (JetFormer's too), one mixture per channel, and one Gaussian with
full covariance. In: outputs (..., P). Out: log-densities, and components and tokens from given noise. Unusual: scales
come from square-plus, and temperatures of scales and of weights go opposite ways. float32 island: `parse` casts.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.samplers.gmm_cfg import normal_log_prob

SCALE_MIN = 1e-6  # official scale_tol


def squareplus(x: Tensor) -> Tensor:
    """(x + sqrt(x^2 + 4)) / 2, in this form: float32 cancels below about -500, and released weights were trained so."""
    return (x + (x.square() + 4).sqrt()) / 2


def squareplus_unfixed(x: Tensor) -> Tensor:
    """What the official code does without `fix_square_plus`: negative below -1.15. Only to reproduce such a run."""
    return x + (x.square() + 4).sqrt() / 2


# softplus is the paper's text; the official code and the released weights have square-plus
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "squareplus": squareplus,
    "softplus": F.softplus,
    "squareplus_unfixed": squareplus_unfixed,
}


class Gaussian(NamedTuple):
    """Independent channels: loc and scale (..., D)."""

    loc: Tensor
    scale: Tensor

    def sample(self, eps: Tensor, *, clip: float | None = None) -> Tensor:
        """loc + scale eps, of standard normal eps (..., D), clipped to +-`clip` sigmas if asked."""
        return self.loc + self.scale * clipped(eps, clip)

    def log_prob(self, x: Tensor) -> Tensor:
        """(..., D), of each channel."""
        return normal_log_prob(x, self.loc, self.scale)


class DiagonalMixture(NamedTuple):
    """K components over the token: logits (..., K), loc and scale (..., K, D)."""

    logits: Tensor
    loc: Tensor
    scale: Tensor

    @staticmethod
    def num_outputs(token_dim: int, num_mixtures: int) -> int:
        return num_mixtures * (1 + 2 * token_dim)

    @classmethod
    def parse(cls, outputs: Tensor, token_dim: int, *, scale: str = "squareplus", scale_min: float = SCALE_MIN) -> Self:
        """outputs (..., K + 2KD): the logits, then (K, 2, D) with locs before raw scales."""
        num_mixtures = outputs.shape[-1] // (1 + 2 * token_dim)
        logits, rest = outputs.float().split([num_mixtures, 2 * num_mixtures * token_dim], dim=-1)
        loc, raw = rest.unflatten(-1, (num_mixtures, 2, token_dim)).unbind(-2)
        return cls(logits, loc, positive(raw, scale, scale_min))

    def log_prob(self, x: Tensor) -> Tensor:
        """(...) in nats, of tokens x (..., D)."""
        channels = normal_log_prob(x[..., None, :], self.loc, self.scale)  # (..., K, D)
        return (self.logits.log_softmax(-1) + channels.sum(-1)).logsumexp(-1)

    def tempered(self, temperature: float = 1.0, inv_temperature: float = 1.0) -> Self:
        """Scales times `temperature`, logits times `inv_temperature`: the second sharpens above 1."""
        check_temperatures(temperature, inv_temperature)
        return self._replace(logits=self.logits * inv_temperature, scale=self.scale * temperature)

    def truncated(self, top_p: float) -> Self:
        """Only the likeliest components; see `nucleus`."""
        return self._replace(logits=nucleus(self.logits, top_p))

    def component(self, u: Tensor) -> Tensor:
        """Indices (...), int64, at uniform draws u (...) of the weights' distribution function."""
        return quantile(self.logits, u)

    @staticmethod
    def outputs_of(component: Tensor, token_dim: int, num_mixtures: int) -> Tensor:
        """Which outputs parse into the loc and raw scale of a component (...): indices (..., 2, D)."""
        inside = torch.arange(2 * token_dim, device=component.device).view(2, token_dim)
        return num_mixtures + 2 * token_dim * component[..., None, None] + inside

    def gaussian(self, component: Tensor) -> Gaussian:
        """The Gaussian (..., D) of each drawn component (...)."""
        index = component[..., None, None]
        return Gaussian(*(t.take_along_dim(index, -2).squeeze(-2) for t in (self.loc, self.scale)))


class PerChannelMixture(NamedTuple):
    """K components over each channel: logits, loc and scale (..., D, K)."""

    logits: Tensor
    loc: Tensor
    scale: Tensor

    @staticmethod
    def num_outputs(token_dim: int, num_mixtures: int) -> int:
        return 3 * token_dim * num_mixtures

    @classmethod
    def parse(cls, outputs: Tensor, token_dim: int, *, scale: str = "squareplus", scale_min: float = SCALE_MIN) -> Self:
        """outputs (..., 3DK) as (3, D, K): logits, locs, raw scales."""
        logits, loc, raw = outputs.float().unflatten(-1, (3, token_dim, -1)).unbind(-3)
        return cls(logits, loc, positive(raw, scale, scale_min))

    def log_prob(self, x: Tensor) -> Tensor:
        """(..., D) in nats, of each channel of tokens x (..., D)."""
        components = normal_log_prob(x[..., None], self.loc, self.scale)
        return (self.logits.log_softmax(-1) + components).logsumexp(-1)

    def tempered(self, temperature: float = 1.0, inv_temperature: float = 1.0) -> Self:
        """As DiagonalMixture's."""
        check_temperatures(temperature, inv_temperature)
        return self._replace(logits=self.logits * inv_temperature, scale=self.scale * temperature)

    def truncated(self, top_p: float) -> Self:
        """Only each channel's likeliest components; see `nucleus`."""
        return self._replace(logits=nucleus(self.logits, top_p))

    def component(self, u: Tensor) -> Tensor:
        """Indices (..., D), int64, at uniform draws u (..., D)."""
        return quantile(self.logits, u)

    @staticmethod
    def outputs_of(component: Tensor, token_dim: int, num_mixtures: int) -> Tensor:
        """Which outputs parse into the loc and raw scale of each channel's component (..., D): (..., 2, D)."""
        column = torch.arange(token_dim, 3 * token_dim, device=component.device).view(2, token_dim)
        return num_mixtures * column + component[..., None, :]

    def gaussian(self, component: Tensor) -> Gaussian:
        """The Gaussian (..., D) of each channel's drawn component (..., D)."""
        index = component[..., None]
        return Gaussian(*(t.take_along_dim(index, -1).squeeze(-1) for t in (self.loc, self.scale)))


class FullGaussian(NamedTuple):
    """One Gaussian with full covariance: loc (..., D) and the Cholesky factor scale_tril (..., D, D)."""

    loc: Tensor
    scale_tril: Tensor

    @staticmethod
    def num_outputs(token_dim: int, num_mixtures: int) -> int:
        return token_dim * (token_dim + 1)

    @classmethod
    def parse(cls, outputs: Tensor, token_dim: int, *, scale: str = "squareplus", scale_min: float = SCALE_MIN) -> Self:
        """outputs (..., D^2 + D): the raw factor row by row, then the loc. Official: all entries of the factor go
        through the scale's function, so that no correlation of the factor is negative."""
        raw, loc = outputs.float().split([token_dim**2, token_dim], dim=-1)
        factor = SCALES[scale](raw.unflatten(-1, (token_dim, token_dim)))
        floor = scale_min * torch.eye(token_dim, device=outputs.device)
        return cls(loc, torch.maximum(factor, floor).tril())

    def log_prob(self, x: Tensor) -> Tensor:
        """(...) in nats, of tokens x (..., D)."""
        whitened = torch.linalg.solve_triangular(self.scale_tril, (x - self.loc)[..., None], upper=False)[..., 0]
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * whitened.square().sum(-1) - log_det - 0.5 * x.shape[-1] * math.log(2 * math.pi)

    def tempered(self, temperature: float = 1.0, inv_temperature: float = 1.0) -> Self:
        """The factor times `temperature`; there are no weights to sharpen."""
        check_temperatures(temperature, inv_temperature)
        return self._replace(scale_tril=self.scale_tril * temperature)

    def sample(self, eps: Tensor, *, clip: float | None = None) -> Tensor:
        """loc + scale_tril eps, of standard normal eps (..., D), clipped to +-`clip` sigmas if asked."""
        return self.loc + (self.scale_tril @ clipped(eps, clip)[..., None])[..., 0]


Mixture = DiagonalMixture | PerChannelMixture | FullGaussian
KINDS: dict[str, type[Mixture]] = {"diagonal": DiagonalMixture, "per_channel": PerChannelMixture, "full": FullGaussian}


def positive(raw: Tensor, scale: str, minimum: float) -> Tensor:
    """max(scale function of raw, minimum); no gradient flows where the minimum holds."""
    return SCALES[scale](raw).clamp_min(minimum)


def clipped(eps: Tensor, clip: float | None) -> Tensor:
    """eps within +-clip."""
    return eps if clip is None else eps.clamp(-clip, clip)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """logits (..., K) with -inf for components that the likeliest ones, up to a mass of top_p, do without.

    The likeliest is always kept. Raises ValueError unless 0 < top_p <= 1.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: it is the share of the mixture's mass that is kept, so use (0, 1]")
    weights, order = logits.double().softmax(-1).sort(-1, descending=True)
    before = weights.cumsum(-1) - weights
    dropped = torch.empty_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return logits.masked_fill(dropped, -torch.inf)


def quantile(logits: Tensor, u: Tensor) -> Tensor:
    """The index at which the distribution function passes u: logits (..., K), u (...) in [0, 1] -> (...), int64.

    float64, because 2^-24 is more than many a weight. An index without mass is never taken: u stays below 1, and the
    first index is sought whose sum is greater than u.
    """
    sums = logits.double().softmax(-1).cumsum(-1)
    u = u.double().clamp_max(1 - torch.finfo(torch.float64).eps)
    return torch.searchsorted(sums, u[..., None] * sums[..., -1:], right=True)[..., 0]


def check_temperatures(temperature: float, inv_temperature: float) -> None:
    """Raise ValueError for factors that leave no density."""
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: scales are multiplied by it, so it must be positive")
    if inv_temperature < 0:
        raise ValueError(f"inv_temperature is {inv_temperature}: mixture logits are multiplied by it, so use 0 or more")

"""Guidance of densities for Gaussian-mixture heads (GIVT, Tschannen et al., arXiv 2312.02116; official
`parallel_decode.py`, CFGDensity; JetFormer samples by the same rule).

One channel at a time: N(loc_c, scale_c^2) with and N(loc_u, scale_u^2) without the condition, temperatures included,
become log p = (1 + w) log p_c - w log p_u, which is not normalised; w = cfg_scale - 1. Unusual: p is a Gaussian, so
that one draw does what takes the official code a grid of 1001 points and 1000 proposals; both forms are here. All
arguments broadcast, w is a number or a tensor, and nothing waits for the device.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

PROPOSALS = 1000  # official number of tries
BLOCK = 64  # proposals that are looked at together: at ordinary acceptance rates the first block nearly always has one
GRID = (-10.0, 10.0, 1001)  # official search for the maximum of p: offsets from loc_c, in units of the token
LOG_FLOAT32_MAX = math.log(torch.finfo(torch.float32).max)  # the official code works with exponentials in float32
# Beyond this many proposal widths the law of the rejection rule is nearer to the conditional Gaussian than to p, by the
# total variation over ratios of scales 0.6 to 3, w 0.1 to 3 and means up to 30 sigmas apart.
FARTHEST = 4.0
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def normal_log_prob(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """log N(x; loc, scale^2) of each element."""
    return -0.5 * ((x - loc) / scale).square() - scale.log() - HALF_LOG_2PI


def guided_log_density(
    x: Tensor, loc_c: Tensor, scale_c: Tensor, loc_u: Tensor, scale_u: Tensor, w: float | Tensor
) -> Tensor:
    """log p(x) = (1 + w) log p_c(x) - w log p_u(x), not normalised, of each channel."""
    return (1 + w) * normal_log_prob(x, loc_c, scale_c) - w * normal_log_prob(x, loc_u, scale_u)


class Product(NamedTuple):
    """The Gaussian that p is, as p_c sees it: counted from loc_c in units of scale_c, whose square leaves float32 where
    it is small. Where the precision is not positive, p has no integral, and the others mean nothing."""

    mean: Tensor
    precision: Tensor
    log_peak: Tensor  # log p at the mean


def product(loc_c: Tensor, scale_c: Tensor, loc_u: Tensor, scale_u: Tensor, w: float | Tensor) -> Product:
    """By completing the square of log p, in few operations: single tokens wait for nothing else."""
    share = w * (scale_c / scale_u).square()
    precision = 1 + w - share
    apart = (loc_c - loc_u) / scale_c
    mean = share * apart / precision
    log_scale = torch.lerp(scale_c.log(), scale_u.log(), -w)  # (1 + w) log scale_c - w log scale_u
    return Product(mean, precision, 0.5 * (1 + w) * apart * mean - log_scale - HALF_LOG_2PI)


def guided_closed_form(
    loc_c: Tensor, scale_c: Tensor, loc_u: Tensor, scale_u: Tensor, w: float | Tensor, eps: Tensor
) -> Tensor:
    """A draw of p itself, from standard normal eps.

    The conditional Gaussian's, as the rejection rule gives when nothing is accepted, where p is not a density, is wider
    than the proposals, lies out of their reach or overflows the official float32.
    """
    mean, precision, log_peak = product(loc_c, scale_c, loc_u, scale_u, w)
    scale, width = precision.rsqrt(), proposal_scale(scale_c, scale_u)
    reached = torch.maximum(scale, mean.abs() / FARTHEST) <= width / scale_c  # a NaN compares as False
    reached &= log_peak + (width.log() + HALF_LOG_2PI).clamp_min(0) <= LOG_FLOAT32_MAX  # p, and its envelope's factor
    drawn = torch.where(reached, torch.addcmul(mean, scale, eps), eps)  # in units of scale_c, as mean and scale are
    return torch.addcmul(loc_c, scale_c, drawn)


class Rejection(NamedTuple):
    """What the rejection rule did, per channel."""

    sample: Tensor
    scale_prop: Tensor  # of the proposals
    log_fac: Tensor  # log of the envelope's factor; inf where the official float32 overflows
    first_accepted: Tensor  # index of the proposal that became the sample, int64; -1: none, the fallback did
    num_accepted: Tensor  # among all proposals, int64


def guided_rejection(
    loc_c: Tensor,
    scale_c: Tensor,
    loc_u: Tensor,
    scale_u: Tensor,
    w: float | Tensor,
    prop_eps: Tensor,
    prop_u: Tensor,
    fallback_eps: Tensor,
    *,
    offsets: Tensor | None = None,
) -> Rejection:
    """The official rule: prop_eps (n, ...) and fallback_eps (...) standard normal, prop_u (n, ...) uniform.

    A proposal x of q = N(loc_c, (2 max(scale_c, scale_u))^2) is accepted if u fac q(x) < p(x), the first one that is
    becomes the sample, and without any it is loc_c + scale_c fallback_eps. See `envelope` for fac and offsets.
    """
    blocks = zip(prop_eps.split(BLOCK), prop_u.split(BLOCK), strict=True)
    return guided_rejection_blocks(loc_c, scale_c, loc_u, scale_u, w, blocks, fallback_eps, offsets=offsets)


def guided_rejection_blocks(
    loc_c: Tensor,
    scale_c: Tensor,
    loc_u: Tensor,
    scale_u: Tensor,
    w: float | Tensor,
    blocks: Iterable[tuple[Tensor, Tensor]],
    fallback_eps: Tensor,
    *,
    offsets: Tensor | None = None,
) -> Rejection:
    """`guided_rejection` from blocks of proposals (prop_eps, prop_u), (k, ...) each, such as a generator draws them.

    Memory is that of one block. All are looked at: to stop when each channel has its sample would wait for the device.
    """
    width = proposal_scale(scale_c, scale_u)
    log_fac = envelope(loc_c, scale_c, loc_u, scale_u, w, offsets)
    sample = loc_c + scale_c * fallback_eps
    first = torch.full_like(sample, -1, dtype=torch.int64)
    count, seen = torch.zeros_like(first), 0
    for prop_eps, prop_u in blocks:
        x = loc_c + width * prop_eps
        log_q = normal_log_prob(x, loc_c, width)
        accepted = prop_u.log() + log_fac + log_q < guided_log_density(x, loc_c, scale_c, loc_u, scale_u, w)
        index = accepted.long().argmax(0, keepdim=True)  # of the first one
        new = (first < 0) & accepted.any(0)
        sample = torch.where(new, x.take_along_dim(index, 0)[0], sample)
        first = torch.where(new, seen + index[0], first)
        count, seen = count + accepted.sum(0), seen + len(prop_eps)
    return Rejection(sample, width, log_fac, first, count)


def envelope(
    loc_c: Tensor, scale_c: Tensor, loc_u: Tensor, scale_u: Tensor, w: float | Tensor, offsets: Tensor | None = None
) -> Tensor:
    """log fac: the maximum of p on the grid loc_c + offsets over q(loc_c), not over q at the maximum, so that the rule
    samples min(p, fac q) rather than p.

    inf where either overflows float32, as in the official code: it then accepts nothing. offsets (n,): `GRID` unless
    given; linspace differs between libraries in the last bit, which counts where scales are as small.
    """
    if offsets is None:
        offsets = torch.linspace(*GRID, device=loc_c.device)
    log_peak = torch.full_like(scale_c + scale_u, -torch.inf)
    for block in offsets.view(-1, *(1,) * log_peak.ndim).split(BLOCK):
        log_p = guided_log_density(loc_c + block, loc_c, scale_c, loc_u, scale_u, w)
        log_peak = torch.maximum(log_peak, log_p.amax(0))
    log_fac = _log_envelope(log_peak, proposal_scale(scale_c, scale_u))
    return log_fac.where(torch.maximum(log_peak, log_fac) <= LOG_FLOAT32_MAX, torch.inf)


def proposal_scale(scale_c: Tensor, scale_u: Tensor) -> Tensor:
    """Width of the proposals."""
    return 2 * torch.maximum(scale_c, scale_u)


def _log_envelope(log_peak: Tensor, width: Tensor) -> Tensor:
    """Over the proposal's density at its own centre."""
    return log_peak + width.log() + HALF_LOG_2PI

"""Mixture heads the plain way, as GIVT's official code has them (`decode.py`, `parallel_decode.py`; JetFormer's head is
the same): what `make bench` compares with, and the oracle of the fast path.

Every component is computed of every token, and gets noise of its own although one is kept. Guidance looks for the
maximum of p on 1001 points and tries 1000 proposals per number, all of them in memory and exponentiated in float32. The
likelihood has the differences of all tokens and components in memory.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.parts import Part
from layers.heads.gmm import GMMHead
from layers.heads.mixtures import DiagonalMixture, Gaussian, PerChannelMixture
from layers.samplers.gmm_cfg import GRID, PROPOSALS, guided_closed_form, guided_log_density

Mixture = DiagonalMixture | PerChannelMixture


class HeadSize(NamedTuple):
    """A head, how many tokens a training step hands it, and how many a decoding step: as many as images."""

    name: str
    token_dim: int
    num_mixtures: int
    width: int
    trained: int
    drawn: tuple[int, ...]


# On the host GIVT's, as wide as the shrunken trunk, and a quarter of JetFormer's in every size. Trained on are tokens
# of 256 and of 8 images
HEADS = {
    "cpu": (HeadSize("GIVT", 16, 16, 128, 65_536, (4, 64)), HeadSize("JetFormer / 4", 32, 256, 256, 2048, (4, 64))),
    "cuda": (
        HeadSize("GIVT", 16, 16, 1024, 65_536, (32, 256)),
        HeadSize("JetFormer", 128, 1024, 1024, 2048, (32, 256)),
    ),
}
CFG_SCALE = 1.4
# JetFormer-B's head and the tokens of 16 images: on the host counted without computing, since it takes 26 GB plainly
MEMORY = HeadSize("JetFormer-B", 128, 1024, 1024, 16 * 256, ())


class Draws:
    """Random numbers of the plain path; its own, unless a test puts in known ones."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = device

    def component(self, logits: Tensor) -> Tensor:
        """Indices (...) of logits (..., K), as JAX draws them: the largest with Gumbel noise on top."""
        return (logits + self.gumbel(*logits.shape)).argmax(-1)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, device=self.device)

    def gumbel(self, *shape: int) -> Tensor:
        return -torch.empty(shape, device=self.device).exponential_().log()


def draw(mixtures: Sequence[Mixture], w: float, draws: Draws) -> tuple[Tensor, Tensor]:
    """Tokens (R, D) and the log-densities (R,) that rank them, from the mixtures of one branch, or guided from those of
    two, the one with labels first."""
    cond = mixtures[0]
    component = draws.component(cond.logits)
    if len(mixtures) == 1:
        every = cond.loc + cond.scale * draws.normal(*cond.loc.shape)
        token = cond._replace(loc=every).gaussian(component).loc
        return token, cond.log_prob(token).view(len(token), -1).sum(1)
    pair = [mixture.gaussian(component) for mixture in mixtures]
    token = rejection(*pair, w, draws)
    return token, guided_log_density(token, *pair[0], *pair[1], w).sum(1)


def rejection(cond: Gaussian, uncond: Gaussian, w: float, draws: Draws) -> Tensor:
    """The first of 1000 proposals that p = cond^(1 + w) / uncond^w accepts, in each of (R, D) channels; a draw of
    `cond` where it accepts none. Official `CFGDensity`."""
    shape = cond.loc.shape
    proposal = Gaussian(cond.loc, 2 * torch.maximum(cond.scale, uncond.scale))

    def density(x: Tensor) -> Tensor:
        return ((1 + w) * cond.log_prob(x) - w * uncond.log_prob(x)).exp()

    grid = cond.loc + torch.linspace(*GRID, device=cond.loc.device).view(-1, 1, 1)
    factor = density(grid).amax(0) / proposal.log_prob(cond.loc).exp()
    x = proposal.sample(draws.normal(PROPOSALS, *shape))
    accepted = draws.uniform(PROPOSALS, *shape) * factor * proposal.log_prob(x).exp() < density(x)
    first = x.take_along_dim(accepted.long().argmax(0, keepdim=True), 0)[0]
    return torch.where(accepted.any(0), first, cond.sample(draws.normal(*shape)))


# Parts


def head_parts(sizes: Iterable[HeadSize], device: str) -> Iterator[Part]:
    """Guidance alone, a guided draw from conditions to token, and the likelihood with its gradients."""
    for size in sizes:
        yield from (guidance_part(size, tokens, device) for tokens in size.drawn)
        yield from (draw_part(size, tokens, device) for tokens in size.drawn)
        yield likelihood_part(size, device)


def guidance_part(size: HeadSize, tokens: int, device: str) -> Part:
    """From both branches' Gaussians of the drawn component to tokens."""
    shape, w, draws = (tokens, size.token_dim), CFG_SCALE - 1, Draws(device)
    cond = Gaussian(draws.normal(*shape), 0.5 + draws.uniform(*shape))
    uncond = Gaussian(cond.loc + 0.3 * draws.normal(*shape), cond.scale * (1 + 0.2 * draws.uniform(*shape)))

    def ours() -> Tensor:
        return guided_closed_form(*cond, *uncond, w, draws.normal(*shape))

    return Part(f"guidance, {size.name}, {tokens} tokens", lambda: rejection(cond, uncond, w, draws), ours)


def draw_part(size: HeadSize, tokens: int, device: str) -> Part:
    """From both branches' conditions to tokens."""
    head, draws = head_of(size, device), Draws(device)
    pair = draws.normal(2, tokens, size.width)

    @torch.no_grad()
    def plain() -> Tensor:
        return draw([head.distribution(h) for h in pair], CFG_SCALE - 1, draws)[0]

    @torch.no_grad()
    def ours() -> Tensor:
        count, dim = head.noise_shape(1, "closed_form")
        return head.sample(pair[0], draws.normal(count, tokens, dim), uncond=pair[1], cfg_scale=CFG_SCALE)

    return Part(f"guided draw, {size.name}, {tokens} tokens", plain, ours)


def likelihood_part(size: HeadSize, device: str, *, dtype: str = "float32") -> Part:
    """Mean over tokens, and its gradients in conditions and weights."""
    head, draws = head_of(size, device, dtype), Draws(device)
    x, h = draws.normal(size.trained, size.token_dim), draws.normal(size.trained, size.width).requires_grad_()

    def gradients(nll: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(nll.mean(), [h, *head.parameters()])

    name = f"likelihood, {size.name}, {size.trained} tokens"
    return Part(name, lambda: gradients(-head.log_prob(h, x)), lambda: gradients(head.nll(h, x)))


def memory_part(device: str, size: HeadSize = MEMORY) -> Part:
    """The likelihood's at full size; on the host of tensors that are shapes alone, so that nothing is timed."""
    part = likelihood_part(size, "meta" if device == "cpu" else device, dtype="bfloat16")
    return part._replace(timed=device != "cpu")


def head_of(size: HeadSize, device: str, dtype: str = "float32") -> GMMHead:
    with torch.device(device):
        return GMMHead(size.token_dim, size.width, num_mixtures=size.num_mixtures, dtype=dtype)

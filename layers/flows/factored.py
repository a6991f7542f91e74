"""What stands between pixels and JetFormer's decoder (Tschannen et al., arXiv 2411.19722): a flow, of whose latents the
decoder models some and a standard normal distribution the rest.

Splitting after the flow is the released form. The paper's ablations split before it, behind a learned linear map or
frozen principal components, and the flow then has only what the decoder sees; or nothing is split off. All are
invertible and count their bits. In: tokens (B, N, C). Out: `Latents`.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from layers.checkpoint import Rule
from layers.flows.jet import Jet, JetConfig, jet_rules
from layers.flows.linear import PCA, LearnedLinear

OFFICIAL = "params_adaptor/"  # where JetFormer's files have the flow


@dataclass
class FactorConfig:
    """Official `latent_noise_dim`: 768 numbers of a patch, 640 of them split off."""

    dim: int | None = 128  # numbers of a token that the decoder models, the first ones; None: all
    split: Literal["flow", "linear", "pca"] = "flow"  # what the rest is split off behind
    frozen_flow: bool = False  # it stays what it is at the start: the identity, or a flow that was trained alone


class Latents(NamedTuple):
    """soft (B, N, D): the decoder's tokens. rest (B, N, C - D): standard normal. logdet (B,) of the whole map."""

    soft: Tensor
    rest: Tensor
    logdet: Tensor


class FactoredFlow(nn.Module):
    """Tokens of `token_dim` numbers on a grid (h, w) <-> `Latents`; a bijection. `linear` is None where there is none.

    Principal components are the identity until they are fitted. Raises ValueError for a `config.dim` of 0 or of more
    numbers than a token has, and where the flow gets an odd number.
    """

    def __init__(self, config: FactorConfig, flow: JetConfig, *, grid: tuple[int, int], token_dim: int) -> None:
        super().__init__()
        self.dim = token_dim if config.dim is None else config.dim
        if not 1 <= self.dim <= token_dim:
            raise ValueError(
                f"factor.dim is {config.dim}, but tokens have {token_dim} numbers: use 1 to {token_dim}, or null"
            )
        linear = {"flow": None, "linear": LearnedLinear, "pca": PCA}[config.split]
        self.linear = linear(token_dim) if linear else None
        self.jet = Jet(flow, grid=grid, token_dim=self.dim if linear else token_dim)
        if config.frozen_flow:
            self.jet.requires_grad_(False)

    def forward(self, x: Tensor) -> Latents:
        if self.linear is None:
            z, logdet = self.jet(x)
            return Latents(*self._split(z), logdet)
        y, logdet = self.linear(x)
        soft, rest = self._split(y)
        soft, more = self.jet(soft)
        return Latents(soft, rest, logdet + more)

    def inverse(self, soft: Tensor, rest: Tensor) -> Tensor:
        """The tokens (B, N, C) of given latents."""
        if self.linear is None:
            return self.jet.inverse(torch.cat([soft, rest], dim=-1))[0]
        return self.linear.inverse(torch.cat([self.jet.inverse(soft)[0], rest], dim=-1))[0]

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z[..., : self.dim], z[..., self.dim :]


def factored_rules(ours: str, *, num_heads: int) -> list[Rule]:
    """A FactoredFlow called `ours` has its flow below params_adaptor/ in official files, couplings apart; a linear map
    is in none, and keeps its names."""
    jet = jet_rules(f"{ours}.jet", num_heads=num_heads, official=OFFICIAL)
    return [*jet, Rule(f"{ours}.linear.*", f"{ours}.linear.*")]

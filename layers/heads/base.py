"""Heads: p(token | z), one token at a time, so that a trunk can be trained and sampled with any of them.

A trunk hands over R rows of conditions z (R, E) and gets a loss per row, or R tokens. Tokens are continuous (R, D) or
ids (R,). Every draw is an argument: a head is a function of its tensors.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from layers.guidance import cfg

Terms = dict[str, Tensor]


class Head(nn.Module):
    """Contract of every head."""

    SOLVERS: ClassVar[tuple[str, ...]]  # values of `solver`, the usual one first

    def forward(self, x: Tensor, z: Tensor, time: Tensor, noise: Tensor) -> Terms:
        """`loss`, as a call, so that `compile` acts on it."""
        return self.loss(x, z, time, noise)

    def draw_times(self, u: Tensor) -> Tensor:
        """Uniform draws in [0, 1) -> this head's training times, of the same shape: the draws as they are."""
        return u

    def loss(self, x: Tensor, z: Tensor, time: Tensor, noise: Tensor) -> Terms:
        """Terms per row, (M, R) each: "loss", which is trained, and what it is made of.

        x (R, D) or ids (R,), z (R, E); time (M, R) and noise (M, R, D): M draws for each row.
        """
        raise NotImplementedError

    def noise_shape(self, num_steps: int, solver: str) -> tuple[int, int]:
        """(n, dim) of the standard normal noise (n, R, dim) that `sample` takes.

        Raises ValueError for a solver or a number of steps that the head does not have.
        """
        raise NotImplementedError

    def sample(
        self,
        z: Tensor,
        noise: Tensor,
        *,
        uncond: Tensor | None = None,
        cfg_scale: float | Tensor = 1.0,
        temperature: float = 1.0,
        num_steps: int,
        solver: str,
    ) -> Tensor:
        """Tokens (R, D) or ids (R,) from z (R, E) and noise (n, R, dim) of `noise_shape`.

        uncond (R, E): the rows' unconditional z; without it, or with the float 1, guidance is off. cfg_scale: a
        number, or a tensor 0-dim or (R, 1). Raises ValueError for a setting that the head does not have.
        """
        raise NotImplementedError

    def capture_sampling(self) -> None:
        """Make `sample` fast on CUDA, for good: one launch for all steps. Without steps there is nothing to gain."""

    def check_solver(self, solver: str) -> None:
        """Raise ValueError for a solver that is not this head's."""
        if solver not in self.SOLVERS:
            raise ValueError(f"solver is {solver!r}, but {type(self).__name__} has {', '.join(self.SOLVERS)}")


class OneShotHead(Head):
    """A head without steps: `num_steps` is 1 and `solver` is "direct"; times do not matter."""

    SOLVERS = ("direct",)

    def check_one_step(self, num_steps: int, solver: str) -> None:
        """Raise ValueError unless the settings are those of one step."""
        self.check_solver(solver)
        if num_steps != 1:
            raise ValueError(f"num_steps is {num_steps}, but {type(self).__name__} answers at once: set it to 1")


class LinearHead(OneShotHead):
    """One linear map from conditions (R, E) to outputs (R, K), which guidance acts on; a head draws from them."""

    def __init__(self, cond_dim: int, num_outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(cond_dim, num_outputs)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def sample(
        self,
        z: Tensor,
        noise: Tensor,
        *,
        uncond: Tensor | None = None,
        cfg_scale: float | Tensor = 1.0,
        temperature: float = 1.0,
        num_steps: int = 1,
        solver: str = "direct",
    ) -> Tensor:
        """See Head; what the temperature means: see `draw`."""
        check_draws(noise, self.noise_shape(num_steps, solver), len(z))
        rows, scale = stack_guidance(z, uncond, cfg_scale, torch.float32)
        return self.draw(guide(self.linear(rows).float(), scale), noise, temperature)

    def draw(self, outputs: Tensor, noise: Tensor, temperature: float) -> Tensor:
        """Tokens (R, D) or ids (R,) from guided outputs (R, K). Raises ValueError for a temperature out of range."""
        raise NotImplementedError


def stack_guidance(
    z: Tensor, uncond: Tensor | None, cfg_scale: float | Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """z (R, E) and None where guidance is off; else both kinds of rows (2, R, E) and the scale as a tensor of `dtype`.

    A tensor, so that a compiled function is not compiled anew for each scale.
    """
    if uncond is None or (not isinstance(cfg_scale, Tensor) and cfg_scale == 1):
        return z, None
    if not isinstance(cfg_scale, Tensor):
        cfg_scale = torch.full((), cfg_scale, dtype=dtype, device=z.device)
    return torch.stack([z, uncond]), cfg_scale


def guide(out: Tensor, cfg_scale: Tensor | None) -> Tensor:
    """The guided prediction from (2, R, K), conditional rows first; `out` itself where guidance is off."""
    return out if cfg_scale is None else cfg(out[0], out[1], cfg_scale)


def check_draws(noise: Tensor, shape: tuple[int, int], rows: int) -> None:
    """Raise ValueError unless noise is (n, R, dim) as the settings need it."""
    count, dim = shape
    if noise.shape != (count, rows, dim):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}, these settings need {(count, rows, dim)}: see noise_shape"
        )

"""NOMAD, the non-Markovian diffusion process of DART (Gu et al., arXiv 2410.08159, sections 3.1 and 3.2).

x_t = sqrt(gamma_t) x_0 + sqrt(1 - gamma_t) eps_t with noise drawn anew for every t = 1..T; x_T is noise alone. Unusual:
given x_0 the x_t are independent, so a model reads x_t..x_T at once; together they know as much as one step of a Markov
diffusion with SNR S_t, the sum of theirs. There is no official code: formulas follow from the process, choices that are
ours are called so. Shapes: x_0 (B, K, D); eps, x_t, v (B, T, K, D), noise first: index 0 is t = T.
"""

from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

Schedule = Literal["direct", "matched"]
Weight = Literal["v", "snr_cum", "elbo", "x0"]
SCHEDULES, WEIGHTS = get_args(Schedule), get_args(Weight)


class NomadTables(NamedTuple):
    """Float64 (T,), index 0 is t = 1, next to the data."""

    gamma: np.ndarray
    snr: np.ndarray  # gamma / (1 - gamma)
    cumulative: np.ndarray  # S_t: the SNR of x_t..x_T together


def nomad_tables(num_steps: int, schedule: Schedule) -> NomadTables:
    """Cosine schedule alpha_t = cos(pi/2 t/T)^2 of T steps.

    "direct": gamma_t = alpha_t. "matched": what x_t..x_T know together has alpha_t, so SNR_t is the difference of two
    of its SNRs. Which of the two the paper means is not known; direct is our default. Raises ValueError for less than
    two steps, or another schedule.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps is {num_steps}: the process needs at least 2, pure noise and one more")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is '{schedule}': use {' or '.join(SCHEDULES)}")
    gamma = np.cos(np.pi / 2 * np.arange(1, num_steps + 1) / num_steps) ** 2
    gamma[-1] = 0.0  # rounding leaves 4e-33
    snr = gamma / (1 - gamma)
    if schedule == "matched":
        snr = snr - np.append(snr[1:], 0.0)
        gamma = snr / (1 + snr)
    return NomadTables(gamma, snr, np.cumsum(snr[::-1])[::-1])


def loss_weights(tables: NomadTables, weight: Weight) -> np.ndarray:
    """Weights (T,) of the squared error of x_0, float64, not normalised. Raises ValueError for an unknown name.

    v: that of v at x_t, so every step counts alike (our default).  snr_cum: S_t, that of the noise of the Markov
    diffusion (Eq. 7); it is 0 at t = T, where sampling begins, so that step gets the weight of the one before (ours).
    elbo: SNR_{t-1} / 2, from KL(q(x_{t-1} | x_0) || p(x_{t-1} | x_t..x_T)); x_0 itself, of which t = 1 knows nothing
    better than x_1 does, gets a normal law of precision SNR_1 (ours).  x0: none.
    """
    if weight == "v":
        return 1 + tables.snr
    if weight == "snr_cum":
        return np.append(tables.cumulative[:-1], tables.cumulative[-2])
    if weight == "elbo":
        return np.append(tables.snr[:1], tables.snr[:-1]) / 2
    if weight == "x0":
        return np.ones_like(tables.snr)
    raise ValueError(f"weight is '{weight}': use {', '.join(WEIGHTS)}")


def mix(x: Tensor, noise: Tensor, gamma: Tensor | float) -> Tensor:
    """sqrt(gamma) x + sqrt(1 - gamma) noise: x_t from x_0, and in sampling x_{t-1} from a prediction of it."""
    return gamma**0.5 * x + (1 - gamma) ** 0.5 * noise


def velocity(x: Tensor, noise: Tensor, gamma: Tensor | float) -> Tensor:
    """v = sqrt(gamma) noise - sqrt(1 - gamma) x (Salimans & Ho 2022)."""
    return gamma**0.5 * noise - (1 - gamma) ** 0.5 * x


def clean(x_t: Tensor, v: Tensor, gamma: Tensor | float) -> Tensor:
    """x_0 from x_t and v: sqrt(gamma) x_t - sqrt(1 - gamma) v."""
    return gamma**0.5 * x_t - (1 - gamma) ** 0.5 * v


class Nomad(nn.Module):
    """The process on a device: `gamma` and `v_weight` (T, 1, 1), float32, noise first, in no checkpoint."""

    def __init__(self, num_steps: int, schedule: Schedule = "direct", weight: Weight = "v") -> None:
        super().__init__()
        self.num_steps = num_steps
        tables = nomad_tables(num_steps, schedule)
        weights = loss_weights(tables, weight)
        self.gammas: list[float] = tables.gamma[::-1].tolist()  # on the host, noise first
        # an error of v is one of x_0 times sqrt(1 - gamma)
        v_weight = weights / weights.mean() * (1 - tables.gamma)
        for name, values in (("gamma", tables.gamma), ("v_weight", v_weight)):
            column = torch.tensor(values[::-1].copy(), dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, column, persistent=False)

    def noised(self, x: Tensor, noise: Tensor) -> Tensor:
        """All noisy copies of x (B, K, D) with noise (B, T, K, D)."""
        return mix(x[:, None], noise, self.gamma)

    def clean(self, x_t: Tensor, v: Tensor) -> Tensor:
        """What v says of x_0 at every step: (B, T, K, D)."""
        return clean(x_t, v, self.gamma)

    def loss(self, v: Tensor, x: Tensor, noise: Tensor) -> Tensor:
        """Weighted squared error of x_0, mean over everything, the weights' mean over t being 1. float32 island."""
        error = v.float() - velocity(x[:, None], noise, self.gamma)
        return (self.v_weight * error.square()).mean()

"""Orders and counts of masked generation (MAR, Li et al. 2024, section 4.2; MaskGIT, Chang et al. 2022).

`orders` (B, L) holds a permutation of positions per image, last revealed first: with m unknown tokens those of
`orders[:, :m]` are masked. Counts are whole numbers on the host, so that a loop over them never waits for the device.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import NormalDist

from torch import Tensor


def mask_lengths(num_unknown: int, num_iter: int) -> list[int]:
    """Unknown tokens left after each of `num_iter` iterations by the cosine schedule, in float64.

    At least one token is revealed each time and one is left; after the last, which reveals the rest, the official code
    still counts 1 (its guidance scale reads it). Raises ValueError where there are more iterations than tokens.
    """
    if not 1 <= num_iter <= num_unknown:
        raise ValueError(
            f"sampling.num_iter is {num_iter}, but {num_unknown} tokens are to be generated: each iteration reveals at "
            f"least one, so use 1..{num_unknown}"
        )
    lengths, unknown = [], num_unknown
    for k in range(num_iter):
        unknown = max(1, min(unknown - 1, math.floor(num_unknown * math.cos(math.pi / 2 * (k + 1) / num_iter))))
        lengths.append(unknown)
    return lengths


def reveal(orders: Tensor, num_unknown: int, lengths: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """(known (B, K), new (B, R)) of each iteration: what is known on entry, what it reveals, in raster order."""
    for before, after in pairwise([num_unknown, *lengths[:-1], 0]):
        yield orders[:, before:], orders[:, after:before].sort(dim=1).values


def mask_rate(u: float, minimum: float, *, mean: float = 1.0, std: float = 0.25) -> float:
    """Share of masked tokens: N(mean, std^2) truncated to [minimum, 1], by its inverse CDF at u in [0, 1)."""
    normal = NormalDist(mean, std)
    low, high = normal.cdf(minimum), normal.cdf(1.0)
    return min(1.0, max(minimum, normal.inv_cdf(low + u * (high - low)))) if minimum < 1 else 1.0


def linear_cfg_scale(cfg_scale: float, unknown: int, seq_len: int) -> float:
    """Guidance that grows with the share of known tokens, counted after the iteration. MAR `mar.py`."""
    return 1 + (cfg_scale - 1) * (seq_len - unknown) / seq_len


def annealed_steps(first: int, last: int | None, num_iter: int) -> list[int]:
    """Diffusion steps of each iteration, falling linearly from `first` to `last` (DiSA, Zhao et al. 2025), if given.

    An approximation: late tokens are nearly determined by those before, so that few steps serve.
    """
    if num_iter == 1 or last is None:
        return [first] * num_iter
    return [round(first + (last - first) * k / (num_iter - 1)) for k in range(num_iter)]

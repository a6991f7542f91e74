"""Masked generation by confidence (MaskGIT, Chang et al. 2022): parallel draws, of which the surest are kept.

Unusual: which tokens are kept depends on how probable the model finds its own draws, so that orders differ between
images; how many are kept does not, so that all images of a batch have equally many unknown tokens and a loop never
waits for the device. Source: GIVT (Tschannen et al. 2023; official `givt.py`, `parallel_decode.py`). In: tokens of
which nothing is known, continuous (B, L, D) or ids (B, L). Out: all of them.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SMALLEST_RATIO = 1e-6  # official clip: an exponent or a rounding never asks for less than nothing

# (x (B, L, ...), unknown (B, L) bool, positions (B, R) of the unknown, iteration) -> draws for these positions:
# tokens (B, R, ...) and their log-probabilities or log-densities (B, R), which order them
Propose = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


# Schedules


def mask_ratio(progress: Tensor, schedule: str) -> Tensor:
    """Share of tokens masked at `progress` in [0, 1], float32, from 1 down to 1e-6.

    `schedule`: "cosine", cos(pi/2 progress), or "pow:p", 1 - progress^p with a number p > 0. Functions are evaluated in
    float64 at the float32 argument and rounded: this gives the official float32 values on every device. Raises
    ValueError for another schedule.
    """
    progress = progress.float()
    if schedule == "cosine":
        ratio = (math.pi / 2 * progress).double().cos().float()
    else:
        ratio = 1 - progress.double().pow(_exponent(schedule)).float()
    return ratio.clamp(SMALLEST_RATIO, 1)


def _exponent(schedule: str) -> float:
    """The p of "pow:p"."""
    kind, _, text = schedule.partition(":")
    try:
        exponent = float(text) if kind == "pow" else math.nan
    except ValueError:
        exponent = math.nan
    if not 0 < exponent < math.inf:
        raise ValueError(f"schedule is {schedule!r}: use cosine, or pow:p with a number p above 0 such as pow:2")
    return exponent


def num_masked(ratio: Tensor, seq_len: int) -> Tensor:
    """Tokens masked in training for ratios (B,) -> (B,) int64: all i < ratio L, so rounded up, in float32."""
    return (ratio * seq_len).ceil().long()


def random_masks(u: Tensor, keys: Tensor, *, min_rate: float, schedule: str) -> Tensor:
    """Training masks (B, L) bool, True where masked, from uniform draws u (B,) and random keys (B, L).

    An image keeps a share uniform in [0, 1 - min_rate) of the *schedule's progress*, not of the tokens: with 0.3 and
    "cosine", 0.454 to 1 of them are masked, 0.810 on average. The smallest keys are masked. Official
    `Model.get_input_mask_training`.
    """
    counts = num_masked(mask_ratio(u * (1 - min_rate), schedule), keys.shape[1])
    ranks = keys.argsort(dim=1).argsort(dim=1)
    return ranks < counts[:, None]


def mask_counts(seq_len: int, num_iter: int, schedule: str) -> list[int]:
    """Tokens still masked after each of `num_iter` iterations: each fixes at least one of those left, the last all.

    Schedules that are steep at first ("pow:0.5") may have none left before the last. Raises ValueError for an unknown
    schedule and where there are more iterations than tokens.
    """
    if not 1 <= num_iter <= seq_len:
        raise ValueError(
            f"sampling.num_iter is {num_iter}, but {seq_len} tokens are to be generated: each iteration fixes at least "
            f"one, so use 1..{seq_len}"
        )
    return official_counts(seq_len, num_iter, schedule)


def official_counts(seq_len: int, num_iter: int, schedule: str) -> list[int]:
    """As `mask_counts`, but for any number of iterations, as the official code allows: the last then do nothing.

    float32 matters: 256 tokens in 12 iterations have 127 left after the eighth, not 256 cos(pi/3) = 128.
    """
    progress = torch.arange(1, num_iter + 1, dtype=torch.float32) / num_iter
    wanted = (seq_len * mask_ratio(progress, schedule)).floor().int().tolist()
    counts, unknown = [], seq_len
    for count in wanted:
        unknown = max(0, min(unknown - 1, count))
        counts.append(unknown)
    return counts


def choice_temperatures(temperature: float, num_iter: int, *, anneal: bool) -> list[float]:
    """Factor of the Gumbel noise in each iteration; `anneal`: it falls linearly to 0, so that the last are greedy."""
    return [temperature * (1 - (k + 1) / num_iter) if anneal else temperature for k in range(num_iter)]


# Decoding


def gumbel_from_normal(normal: Tensor) -> Tensor:
    """Standard Gumbel noise from standard normal noise, elementwise: -log(-log Phi(x))."""
    return -(-torch.special.log_ndtr(normal)).log()


def split_by_confidence(confidence: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices of the `count` lowest confidences (B, R), which stay masked, and of the others; both ascending.

    Of equal ones the first are lowest. Official `_get_bottom_k_mask`.
    """
    order = confidence.argsort(dim=1, stable=True)
    return order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values


def maskgit_decode(
    x: Tensor,
    positions: Tensor,
    propose: Propose,
    *,
    counts: Sequence[int],
    temperatures: Sequence[float],
    gumbel: Callable[[int], Tensor],
) -> Tensor:
    """Fill the unknown `positions` (B, R) of x (B, L, D) or ids (B, L); ascending, equally many in each image.

    In iteration k all unknown tokens are drawn by `propose` (see Propose), the `counts[k]` least sure of them are
    dropped again, and the others are fixed for good. Sureness is log p + temperatures[k] gumbel(k), where gumbel(k)
    is Gumbel noise (B, L) by position. `counts` from `mask_counts`, `temperatures` from `choice_temperatures`; for
    generation from nothing, x is zeros and positions are arange(L) for every image. What x holds at unknown positions
    is what `propose` sees there until they are fixed. Once nothing is unknown, what is left of `counts` is not run.
    """
    rows = torch.arange(len(x), device=x.device)[:, None]
    for k, (count, temperature) in enumerate(zip(counts, temperatures, strict=True)):
        if not positions.shape[1]:
            break
        unknown = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, positions, True)
        tokens, log_prob = propose(x, unknown, positions, k)
        confidence = log_prob + temperature * gumbel(k)[rows, positions]
        masked, fixed = split_by_confidence(confidence, count)
        x = x.index_put((rows, positions[rows, fixed]), tokens[rows, fixed].to(x.dtype))
        positions = positions[rows, masked]
    return x


def mask_weights(mask: Tensor) -> Tensor:
    """Weights (B, L) of a mask (B, L): 0 for known tokens, and B / the number of masked ones for these.

    The mean over images of weighted sums is then that over all masked tokens, as the official code pools them.
    """
    return mask * (len(mask) / mask.sum())

"""DART's samplers: noisy copies of an image, each drawn from what all noisier ones say of it (Gu et al., arXiv
2410.08159, section 3.2); whole copies, or token by token.

Functions of callables, so that the exact denoiser of a known distribution can drive them. In: noise (B, T, K, D), noise
first, of which the first step is x_T itself, and the schedule's gammas (T,) on the host. Out: x_0 (B, K, D).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Prediction(NamedTuple):
    """x_0 as predicted (B, K, D), and what a refinement may need besides (None: nothing)."""

    x: Tensor
    hidden: Tensor | None = None


def denoise(
    predict: Callable[[Tensor, int], Prediction],
    noise: Tensor,
    gammas: Sequence[float],
    *,
    refine: Callable[[Tensor, Prediction], Tensor] | None = None,
) -> Tensor:
    """x_{t-1} = sqrt(gamma_{t-1}) x + sqrt(1 - gamma_{t-1}) eps with the predicted x, for t = T..2; then the last x.

    `predict` gets x_t (B, K, D) and its number, 0 for t = T, once per step, and keeps the history itself. `refine`
    moves each x_{t-1} before it goes on; after the last step nothing is drawn, so nothing is refined.
    """
    x_t = noise[:, 0]
    for i, gamma in enumerate(gammas[1:], start=1):
        prediction = predict(x_t, i - 1)
        x_t = _drawn(prediction.x, noise[:, i], gamma)
        if refine is not None:
            x_t = refine(x_t, prediction)
    return predict(x_t, len(gammas) - 1).x


def denoise_tokens(
    advance: Callable[[Tensor], Tensor],
    predict: Callable[[Tensor, Tensor, int], Tensor],
    noise: Tensor,
    gammas: Sequence[float],
) -> Tensor:
    """The same token by token (DART-AR): token k of copy t-1 is drawn after all before it, from x_0^k as predicted.

    `advance` reads the tokens that come next (B, L, D), all of x_T at first, then one at a time, and returns the state
    (B', E) behind them; `predict(state, x_t^k, i)` is x_0^k (B, D) at step i.
    """
    num_steps, block = noise.shape[1:3]
    known = list(noise[:, 0].unbind(1))  # x_T, then each token as it is drawn: number j is the noisy form of j + K
    state = advance(noise[:, 0])
    for j in range(num_steps * block):
        i, k = divmod(j, block)
        x = predict(state, known[j], i)
        last = i + 1 == num_steps
        known.append(x if last else _drawn(x, noise[:, i + 1, k], gammas[i + 1]))
        if j + 1 < num_steps * block:
            state = advance(known[-1][:, None])
    return torch.stack(known[-block:], dim=1)


def _drawn(x: Tensor, noise: Tensor, gamma: float) -> Tensor:
    return gamma**0.5 * x + (1 - gamma) ** 0.5 * noise

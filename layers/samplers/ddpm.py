"""Samplers of a discrete diffusion process: ancestral (Ho et al. 2020) and DDIM without noise (Song et al. 2021).

Pure functions: noise and constants are arguments, one entry per step in the order of use, from the noisiest timestep
to timestep 0. Nothing waits for the device. float32 island: the state keeps x's dtype. x (R, D).
"""

from collections.abc import Callable

import torch
from torch import Tensor

Reverse = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def ancestral(reverse: Reverse, x: Tensor, noise: Tensor) -> Tensor:
    """x <- mean + std * noise[i] for each step i, with (mean, log-variance) = reverse(x, i).

    noise (S, R, D), already scaled by a temperature, and zero where a step adds none. Returns the last x.
    """
    for i, draw in enumerate(noise.unbind()):
        mean, log_variance = reverse(x, i)
        x = mean + torch.exp(0.5 * log_variance) * draw
    return x


def ddim(predict: Reverse, x: Tensor, data_scales: Tensor, noise_scales: Tensor) -> Tensor:
    """x <- data_scales[i] x_0 + noise_scales[i] eps for each step i, with (x_0, eps) = predict(x, i).

    scales (S,): square roots of the next step's cumulated alpha and of 1 minus it. Returns the last x.
    """
    for i, (data_scale, noise_scale) in enumerate(zip(data_scales.unbind(), noise_scales.unbind(), strict=True)):
        data, eps = predict(x, i)
        x = data_scale * data + noise_scale * eps
    return x

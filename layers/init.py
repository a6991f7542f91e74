"""Initialisations of flax that torch.nn.init lacks."""

import math

import torch
from torch import Tensor

TRUNCATED_AT = 2.0
# standard deviation of a standard normal variable that is so truncated (flax `variance_scaling`)
TRUNCATED_STD = 0.87962566103423978


@torch.no_grad()
def lecun_normal_(weight: Tensor) -> Tensor:
    """Variance 1 / fan-in, from a normal distribution truncated at two of its sigmas: flax's default.

    weight (out, in) of a linear map or (out, in, h, w) of a convolution. By the inverse distribution function, because
    torch's own draws again what fell outside, which fake tensors cannot.
    """
    sigma = 1 / (math.sqrt(weight[0].numel()) * TRUNCATED_STD)
    inside = math.erf(TRUNCATED_AT / math.sqrt(2))
    normal = weight.uniform_(-inside, inside).erfinv_().mul_(math.sqrt(2))
    return normal.clamp_(-TRUNCATED_AT, TRUNCATED_AT).mul_(sigma)

"""Initialisations that torch.nn.init lacks: one of flax, and one of whole networks."""

import math

import torch
from torch import Tensor, nn

TRUNCATED_AT = 2.0
# standard deviation of a standard normal variable that is so truncated (flax `variance_scaling`)
TRUNCATED_STD = 0.87962566103423978


@torch.no_grad()
def lecun_normal_(weight: Tensor) -> Tensor:
    """Variance 1 / fan-in, from a normal distribution truncated at two of its sigmas: flax's default.

    weight (out, in) of a linear map or (out, in, h, w) of a convolution. By the inverse distribution function, because
    torch's own draws again what fell outside, which fake tensors cannot.
    """
    if weight.is_meta:  # a shape alone, for which these four operations take longer than the rest of a model
        return weight
    sigma = 1 / (math.sqrt(weight[0].numel()) * TRUNCATED_STD)
    inside = math.erf(TRUNCATED_AT / math.sqrt(2))
    normal = weight.uniform_(-inside, inside).erfinv_().mul_(math.sqrt(2))
    return normal.clamp_(-TRUNCATED_AT, TRUNCATED_AT).mul_(sigma)


@torch.no_grad()
def xavier_linears_(network: nn.Module) -> None:
    """All linear maps of a network Xavier uniform, with zero bias: DiT's start, and so that of JiT and MAR's heads."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

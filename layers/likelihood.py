"""Bits per dimension: the one definition for every method with a likelihood.

A tokenizer's `logdet` is of the whole map from integer pixels to tokens, so the factor 1 / 127.5 of [-1, 1] is inside
it and no constant is added anywhere else. A model that spreads its mass evenly over 256 levels has 8 of them.
"""

import math

from torch import Tensor


def bits_per_dim(log_prob: Tensor, logdet: Tensor | float, dims: int) -> Tensor:
    """-(log p(x) + logdet) / (dims ln 2) per image: log_prob, logdet (B,) in nats of the whole image, dims 3 H W."""
    return -(log_prob.double() + logdet) / (dims * math.log(2))

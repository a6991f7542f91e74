"""Categorical head: logits over a vocabulary of ids, trained with cross-entropy (the paper's CE variants, Table 1).

In: conditions (R, E). Out: terms per row, or ids (R,). Unusual: sampling inverts the distribution function at one
normal draw per row, so noise has the same form as for the other heads, and one number, not one per id.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.heads.base import LinearHead, Terms
from layers.heads.mixtures import quantile


class CategoricalHead(LinearHead):
    """vocab_size ids 0..vocab_size-1 from conditions of cond_dim E."""

    def __init__(self, vocab_size: int, cond_dim: int) -> None:
        super().__init__(cond_dim, vocab_size)

    def loss(self, x: Tensor, z: Tensor, time: Tensor, noise: Tensor) -> Terms:
        """Term "loss": cross-entropy in nats of ids x (R,); time and noise are not looked at, so M is 1."""
        return {"loss": F.cross_entropy(self.linear(z).float(), x, reduction="none")[None]}

    def noise_shape(self, num_steps: int, solver: str) -> tuple[int, int]:
        """One number per row."""
        self.check_one_step(num_steps, solver)
        return 1, 1

    def draw(self, outputs: Tensor, noise: Tensor, temperature: float) -> Tensor:
        """Ids (R,), int64, from logits, which are divided by the temperature."""
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}: logits are divided by it, so it must be positive")
        return quantile(outputs / temperature, torch.special.ndtr(noise[0, :, 0].double()))

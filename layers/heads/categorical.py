"""Categorical head: logits over a vocabulary of ids, trained with cross-entropy (the paper's CE variants, Table 1).

In: conditions (R, E). Out: terms per row, or ids (R,). Unusual: sampling inverts the distribution function at one
normal draw per row, so noise has the same form as for the other heads, and one number, not one per id.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.heads.base import OneShotHead, Terms, check_draws, guide, stack_guidance
from layers.heads.mixtures import quantile


class CategoricalHead(OneShotHead):
    """vocab_size ids 0..vocab_size-1 from conditions of cond_dim E."""

    def __init__(self, vocab_size: int, cond_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(cond_dim, vocab_size)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def loss(self, x: Tensor, z: Tensor, time: Tensor, noise: Tensor) -> Terms:
        """Term "loss": cross-entropy in nats of ids x (R,); time and noise are not looked at, so M is 1."""
        return {"loss": F.cross_entropy(self.linear(z).float(), x, reduction="none")[None]}

    def noise_shape(self, num_steps: int, solver: str) -> tuple[int, int]:
        """One number per row."""
        self.check_one_step(num_steps, solver)
        return 1, 1

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
        """Ids (R,), int64. Guidance acts on the logits, which are divided by the temperature."""
        check_draws(noise, self.noise_shape(num_steps, solver), len(z))
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}: logits are divided by it, so it must be positive")
        rows, scale = stack_guidance(z, uncond, cfg_scale, torch.float32)
        return quantile(
            guide(self.linear(rows).float(), scale) / temperature, torch.special.ndtr(noise[0, :, 0].double())
        )

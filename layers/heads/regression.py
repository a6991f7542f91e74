"""Regression head: the token itself, trained with a squared error. The paper's counter-example (appendix D.3: FID above
100), kept as the control of every continuous head: it answers with the mean of the tokens that are possible.

In: conditions (R, E). Out: terms per row, or tokens (R, D).
"""

from torch import Tensor, nn

from layers.heads.base import OneShotHead, Terms, check_draws, guide, stack_guidance


class RegressionHead(OneShotHead):
    """A linear map from conditions of cond_dim E to tokens of token_dim D."""

    def __init__(self, token_dim: int, cond_dim: int) -> None:
        super().__init__()
        self.token_dim = token_dim
        self.linear = nn.Linear(cond_dim, token_dim)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def loss(self, x: Tensor, z: Tensor, time: Tensor, noise: Tensor) -> Terms:
        """Term "loss": squared error of the token; time and noise are not looked at, so M is 1."""
        return {"loss": (self.linear(z).float() - x.float()).square().mean(-1)[None]}

    def noise_shape(self, num_steps: int, solver: str) -> tuple[int, int]:
        """None at all."""
        self.check_one_step(num_steps, solver)
        return 0, self.token_dim

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
        """Tokens (R, D), the same for every noise; guidance acts on them."""
        check_draws(noise, self.noise_shape(num_steps, solver), len(z))
        if temperature != 1:
            raise ValueError(f"temperature is {temperature}, but a regression draws nothing: set it to 1")
        rows, scale = stack_guidance(z, uncond, cfg_scale, noise.dtype)
        return guide(self.linear(rows).float(), scale)

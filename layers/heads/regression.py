"""Regression head: the token itself, trained with a squared error. The paper's counter-example (appendix D.3: FID above
100), kept as the control of every continuous head: it answers with the mean of the tokens that are possible.

In: conditions (R, E). Out: terms per row, or tokens (R, D).
"""

from torch import Tensor

from layers.heads.base import LinearHead, Terms


class RegressionHead(LinearHead):
    """A linear map from conditions of cond_dim E to tokens of token_dim D."""

    def __init__(self, token_dim: int, cond_dim: int) -> None:
        super().__init__(cond_dim, token_dim)
        self.token_dim = token_dim

    def loss(self, x: Tensor, z: Tensor, time: Tensor, noise: Tensor) -> Terms:
        """Term "loss": squared error of the token; time and noise are not looked at, so M is 1."""
        return {"loss": (self.linear(z).float() - x.float()).square().mean(-1)[None]}

    def noise_shape(self, num_steps: int, solver: str) -> tuple[int, int]:
        """None at all."""
        self.check_one_step(num_steps, solver)
        return 0, self.token_dim

    def draw(self, outputs: Tensor, noise: Tensor, temperature: float) -> Tensor:
        """Tokens (R, D): the outputs, for every noise."""
        if temperature != 1:
            raise ValueError(f"temperature is {temperature}, but a regression draws nothing: set it to 1")
        return outputs

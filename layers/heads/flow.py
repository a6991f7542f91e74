"""Flow-matching head: MAR's small MLP trained to predict the velocity of a straight path (Lipman et al. 2022).

The same network as the Diffusion Loss with half the outputs and continuous time, 1 = data. Unusual: guidance acts on
the velocity inside the head, and modulations are computed for many times of the solver's grid at once. In: conditions
(R, E). Out: terms per row, or tokens (R, D).
"""

from functools import lru_cache

import torch
from torch import Tensor

from layers.cuda_graphs import Graphed
from layers.diffusion.flow_matching import interpolate, target
from layers.heads.base import Head, Terms, check_draws, guide, stack_guidance
from layers.heads.denoiser import Denoiser
from layers.samplers.ode import SOLVERS, Velocity, solve, uniform_times

TIME_SCALE = 1000.0  # times reach the sinusoid in the range of diffusion timesteps, for which it was made


class FlowHead(Head):
    """token_dim D, cond_dim E, width and depth of the MLP. Training times are uniform."""

    SOLVERS = tuple(SOLVERS)

    def __init__(self, token_dim: int, cond_dim: int, *, width: int, depth: int) -> None:
        super().__init__()
        self.token_dim = token_dim
        self.net = Denoiser(token_dim, cond_dim, width=width, depth=depth, out_dim=token_dim)
        self._captured: Graphed | None = None  # `_solve`, by capture_sampling

    def loss(self, x: Tensor, z: Tensor, time: Tensor, noise: Tensor) -> Terms:
        """Term "loss": squared error of the velocity. float32 island, but for the network."""
        x, t = x.to(noise.dtype), time[..., None]  # (M, R, 1)
        y = self.net.embed_time(TIME_SCALE * time) + self.net.cond_embed(z)  # (M, R, W)
        velocity = self.net.denoise(interpolate(x, noise, t), y).to(noise.dtype)
        return {"loss": (velocity - target("v", x, noise)).square().mean(-1)}

    def noise_shape(self, num_steps: int, solver: str) -> tuple[int, int]:
        """The start."""
        self.check_solver(solver)
        uniform_times(num_steps)  # raises
        return 1, self.token_dim

    def sample(
        self,
        z: Tensor,
        noise: Tensor,
        *,
        uncond: Tensor | None = None,
        cfg_scale: float | Tensor = 1.0,
        temperature: float = 1.0,
        num_steps: int,
        solver: str = "euler",
    ) -> Tensor:
        """Tokens (R, D). temperature scales the start, the only noise there is."""
        check_draws(noise, self.noise_shape(num_steps, solver), len(z))
        rows, scale = stack_guidance(z, uncond, cfg_scale, noise.dtype)
        run = self._captured or self._solve
        return run(rows, scale, temperature * noise[0], num_steps, solver)

    def capture_sampling(self) -> None:
        """One CUDA graph of all steps for each number of rows."""
        self._captured = Graphed(self._solve)

    def _solve(self, rows: Tensor, scale: Tensor | None, x: Tensor, num_steps: int, solver: str) -> Tensor:
        """All steps: conditions (R, E) or (2, R, E), start x (R, D) -> x."""
        velocity = self._velocity(rows, scale, num_steps)
        return solve(SOLVERS[solver](velocity, x, uniform_times(num_steps)))

    def _velocity(self, rows: Tensor, scale: Tensor | None, num_steps: int) -> Velocity:
        """Guided velocity at the times of the solver's grid, for conditions (R, E) or (2, R, E).

        Solvers go forward, so the modulations of one run of times are kept.
        """
        grid = torch.linspace(0, 1, num_steps + 1, device=rows.device)[:-1]
        times, cond = self.net.embed_time(TIME_SCALE * grid), self.net.cond_embed(rows)
        times = times.view(num_steps, *(1,) * (cond.ndim - 1), -1)
        runs = self.net.runs(num_steps, cond[..., 0].numel())

        @lru_cache(maxsize=1)
        def modulations(run: int) -> list[Tensor]:
            return self.net.modulations(times[runs[run]] + cond)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            run, i = divmod(round(float(t) * num_steps), runs[0].stop)  # t lies on the host
            return guide(self.net.step(x, [m[i] for m in modulations(run)]).to(x.dtype), scale)

        return velocity

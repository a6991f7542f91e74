"""Diffusion Loss: the token's law as a small diffusion model (Li et al. 2024, arXiv 2406.11838, section 3.2; official
`diffloss.py`).

An MLP predicts noise and variance of one token from its condition; trained with the hybrid loss of Improved DDPM.
Unusual: in sampling, whatever does not depend on the token is computed for many steps at once; guidance acts inside,
on the noise only, so that token, draws and update are shared by conditional and unconditional rows. In: conditions
(R, E). Out: terms per row, or tokens (R, D).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from layers.cuda_graphs import Graphed
from layers.diffusion.gaussian import (
    Coefficients,
    GaussianProcess,
    ReverseStep,
    hybrid_terms,
    predict_xstart,
    q_sample,
    reverse_step,
)
from layers.heads.base import Head, Terms, check_draws, guide, stack_guidance
from layers.heads.denoiser import Denoiser
from layers.samplers.ddpm import ancestral, ddim


class DiffusionHead(Head):
    """token_dim D, cond_dim E, width and depth of the MLP; num_timesteps of the cosine process.

    clip_denoised: tokens lie within +-this, as pixels do, so each step's prediction of a token is clamped. Off in MAR;
    without it a head that is not trained for long goes astray at the first step, which multiplies its error by 316 in
    100 steps, by 1,327 in 25.
    """

    SOLVERS = ("ddpm", "ddim")

    def __init__(
        self,
        token_dim: int,
        cond_dim: int,
        *,
        width: int,
        depth: int,
        num_timesteps: int = 1000,
        clip_denoised: float | None = None,
    ) -> None:
        super().__init__()
        self.token_dim, self.clip_denoised = token_dim, clip_denoised
        self.net = Denoiser(token_dim, cond_dim, width=width, depth=depth, out_dim=2 * token_dim)
        self.process = GaussianProcess.cosine(num_timesteps)
        self.register_buffer("coefficients", self.process.coefficients(), persistent=False)  # (T, k)
        self._respaced: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._captured: Graphed | None = None  # `_solve` and, inside it, `_chain`, by capture_sampling
        self._compiled: Callable[..., Tensor] | None = None

    def draw_times(self, u: Tensor) -> Tensor:
        """Uniform timesteps: int64, 0..num_timesteps-1."""
        return (u * len(self.process.betas)).long()

    def loss(self, x: Tensor, z: Tensor, time: Tensor, noise: Tensor) -> Terms:
        """Terms "loss" = "mse" + "vb". float32 island, but for the network: the arithmetic has the noise's dtype."""
        x, c = x.to(noise.dtype), Coefficients.at(self.coefficients, time)
        x_t = q_sample(x, noise, c)  # (M, R, D)
        y = self.net.embed_timesteps(time, len(self.process.betas)) + self.net.cond_embed(z)  # (M, R, W)
        eps, v = self.net.denoise(x_t, y).to(noise.dtype).chunk(2, dim=-1)
        mse, vb = hybrid_terms(x, x_t, noise, eps, v, c)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def noise_shape(self, num_steps: int, solver: str) -> tuple[int, int]:
        """The start, and for ddpm one draw per step in the order of use (the last is multiplied by 0)."""
        self.check_solver(solver)
        most = len(self.process.betas)
        if not 2 <= num_steps <= most:
            raise ValueError(
                f"num_steps is {num_steps}: the sampler needs 2..{most}, both ends of the process included"
            )
        return (1 + num_steps if solver == "ddpm" else 1), self.token_dim

    def sample(
        self,
        z: Tensor,
        noise: Tensor,
        *,
        uncond: Tensor | None = None,
        cfg_scale: float | Tensor = 1.0,
        temperature: float = 1.0,
        num_steps: int,
        solver: str = "ddpm",
    ) -> Tensor:
        """Tokens (R, D). temperature scales the noise of the steps, never the start; ddim has none, so it must be 1."""
        check_draws(noise, self.noise_shape(num_steps, solver), len(z))
        if solver == "ddim" and temperature != 1:
            raise ValueError(f"temperature is {temperature}, but ddim adds no noise: set it to 1, or use ddpm")
        rows, scale = stack_guidance(z, uncond, cfg_scale, noise.dtype)  # (R, E) or (2, R, E)
        x, draws = noise[0], noise[1:]
        if solver == "ddpm":
            table, _ = self._constants(num_steps, z.device)
            draws = draws * (temperature * Coefficients(*table.unbind(1)).adds_noise[:, None, None])
        solve = self._captured or self._solve
        return solve(rows, scale, x, draws, num_steps, solver)

    def capture_sampling(self) -> None:
        """One CUDA graph of all steps for each number of rows, whose step is compiled once for any number of rows."""
        self._compiled, self._captured = torch.compile(self._chain, dynamic=True), Graphed(self._solve)

    def _solve(
        self, rows: Tensor, scale: Tensor | None, x: Tensor, draws: Tensor, num_steps: int, solver: str
    ) -> Tensor:
        """All steps: conditions (R, E) or (2, R, E), start x (R, D), draws (S, R, D), or (0, R, D) of ddim -> x."""
        table, timesteps = self._constants(num_steps, x.device)
        times, cond = self.net.embed_time(timesteps), self.net.cond_embed(rows)
        times = times.view(num_steps, *(1,) * (cond.ndim - 1), -1)  # (S, 1, W) or (S, 1, 1, W)
        for run in self.net.runs(num_steps, cond[..., 0].numel()):
            modulations = self.net.modulations(times[run] + cond)
            if self._compiled is None:
                x = self._chain(x, draws[run], table[run], modulations, scale, solver)
                continue
            for i in range(len(table[run])):  # one step each: a hundred as one graph would take minutes to compile
                one = slice(i, i + 1)
                vectors = [m[one] for m in modulations]
                x = self._compiled(x, draws[run][one], table[run][one], vectors, scale, solver)
        return x

    def _constants(self, num_steps: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Coefficients (S, k) and original timesteps (S,) of the shorter process, noisiest first; made once."""
        key = (num_steps, device)
        if key not in self._respaced:
            with torch.inference_mode(False):  # what outlives this call must also serve one that takes gradients
                process = self.process.respaced(num_steps)
                timesteps = torch.tensor(process.timestep_map[::-1].copy(), device=device)
                self._respaced[key] = process.coefficients(device=device).flip(0), timesteps
        return self._respaced[key]

    def _chain(
        self, x: Tensor, draws: Tensor, table: Tensor, modulations: list[Tensor], scale: Tensor | None, solver: str
    ) -> Tensor:
        """A run of s steps: x (R, D), draws (s, R, D), table (s, k), modulations (s, ...) -> x. Only tensors of fixed
        shapes go through, so that it can be compiled or captured as a whole."""
        steps = [Coefficients(*row.unbind()) for row in table.unbind()]
        vectors = list(zip(*(m.unbind() for m in modulations), strict=True))

        def reverse(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
            return self._reverse(x, vectors[i], steps[i], scale)[:2]

        def predict(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
            eps, _ = self._predict(x, vectors[i], scale)
            return self._clipped(x, predict_xstart(x, eps, steps[i]), eps, steps[i])

        if solver == "ddpm":
            return ancestral(reverse, x, draws)
        c = Coefficients(*table.unbind(1))
        return ddim(predict, x, c.sqrt_alphas_cumprod_prev, c.sqrt_one_minus_alphas_cumprod_prev)

    def _clipped(self, x: Tensor, data: Tensor, eps: Tensor, c: Coefficients) -> tuple[Tensor, Tensor]:
        """The prediction within its bounds, and the noise that belongs to it."""
        if self.clip_denoised is None:
            return data, eps
        data = data.clamp(-self.clip_denoised, self.clip_denoised)
        return data, (c.sqrt_recip_alphas_cumprod * x - data) / c.sqrt_recipm1_alphas_cumprod

    def _predict(self, x: Tensor, modulations: list[Tensor], scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Guided noise and the conditional rows' variance logits, (R, D) each."""
        out = self.net.step(x, modulations).to(x.dtype)  # (R, 2D) or (2, R, 2D)
        eps, v = out.chunk(2, dim=-1)
        return guide(eps, scale), v if scale is None else v[0]

    def _reverse(self, x: Tensor, modulations: list[Tensor], c: Coefficients, scale: Tensor | None) -> ReverseStep:
        """p(x_{t-1} | x_t) of the guided prediction."""
        return reverse_step(x, *self._predict(x, modulations, scale), c, clip=self.clip_denoised)

"""Discrete Gaussian diffusion with learned variances (Nichol & Dhariwal 2021, "Improved DDPM"), as MAR's head uses it.

A process is a set of float64 tables on the host, whatever the device. `GaussianProcess.coefficients` casts them once
to a float32 tensor; a step then reads `Coefficients` from it. Timestep 0 is next to the data, the last one is noise.
Shapes: x, eps, v (..., D); coefficients (..., 1) or 0-dim. Official `diffusion/gaussian_diffusion.py`.
"""

import math
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor


def cosine_betas(num_timesteps: int) -> np.ndarray:
    """Variances of the noise added per timestep, cosine schedule (Nichol & Dhariwal, eq. 17): (T,), float64."""
    s = np.arange(num_timesteps + 1) / num_timesteps
    alphas_cumprod = np.cos((s + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)


def kept_timesteps(num_timesteps: int, sections: int | str) -> list[int]:
    """The timesteps that a shorter process keeps, ascending. Official `respace.py`.

    sections: a number of steps, spread evenly with both ends; "a,b,c": that many in each of equal parts; "ddimN": the
    integer stride that gives exactly N. Raises ValueError if the process is too short for them.
    """
    text = str(sections)
    if text.startswith("ddim"):
        return ddim_timesteps(num_timesteps, int(text.removeprefix("ddim")))
    counts, kept, start = [int(count) for count in text.split(",")], set(), 0
    for i, count in enumerate(counts):
        size = num_timesteps // len(counts) + (i < num_timesteps % len(counts))
        if not 1 <= count <= size:
            raise ValueError(
                f"{count} of {size} timesteps cannot be kept ('{text}' of {num_timesteps}): keep 1..{size}"
            )
        kept.update(start + offset for offset in even_offsets(size, count))
        start += size
    return sorted(kept)


def even_offsets(size: int, count: int) -> list[int]:
    """`count` offsets in 0..size-1: a float cursor that walks in equal strides, rounded half to even."""
    stride = (size - 1) / (count - 1) if count > 1 else 1.0
    offsets, cursor = [], 0.0
    for _ in range(count):
        offsets.append(round(cursor))
        cursor += stride
    return offsets


def ddim_timesteps(num_timesteps: int, count: int) -> list[int]:
    """Every k-th timestep from 0, with the k that gives `count` (Song et al. 2021). ValueError if there is none."""
    for stride in range(1, num_timesteps):
        if len(range(0, num_timesteps, stride)) == count:
            return list(range(0, num_timesteps, stride))
    raise ValueError(f"no integer stride keeps {count} of {num_timesteps} timesteps: try a divisor of {num_timesteps}")


class Coefficients(NamedTuple):
    """What one timestep needs, one column of `GaussianProcess.coefficients` each."""

    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_mean_coef1: Tensor  # of x_0
    posterior_mean_coef2: Tensor  # of x_t
    log_betas: Tensor
    posterior_log_variance_clipped: Tensor
    sqrt_alphas_cumprod_prev: Tensor
    sqrt_one_minus_alphas_cumprod_prev: Tensor
    adds_noise: Tensor  # 0 at timestep 0, else 1

    @classmethod
    def at(cls, table: Tensor, timesteps: Tensor) -> Self:
        """Rows of a table (T, k) at timesteps (...), as tensors (..., 1)."""
        return cls(*table[timesteps].unsqueeze(-1).unbind(-2))


class GaussianProcess:
    """Float64 tables (T,) of a process, each under its official name; `timestep_map` (T,) holds the timesteps of the
    original process that the network was trained with."""

    def __init__(self, betas: np.ndarray, timestep_map: list[int] | None = None) -> None:
        if len(betas) < 2:
            raise ValueError(f"a process of {len(betas)} timestep cannot be sampled: use at least 2")
        self.betas = betas
        self.timestep_map = np.arange(len(betas)) if timestep_map is None else np.array(timestep_map)
        alphas = 1 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_alphas_cumprod_prev = np.sqrt(self.alphas_cumprod_prev)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod_prev = np.sqrt(1 - self.alphas_cumprod_prev)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod - 1)
        ratio = (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_variance = betas * ratio
        # the first variance is 0: its logarithm is replaced by its neighbour's
        self.posterior_log_variance_clipped = np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * self.sqrt_alphas_cumprod_prev / (1 - self.alphas_cumprod)
        self.posterior_mean_coef2 = ratio * np.sqrt(alphas)
        self.log_betas = np.log(betas)
        self.adds_noise = (np.arange(len(betas)) > 0).astype(np.float64)

    @classmethod
    def cosine(cls, num_timesteps: int) -> Self:
        """The process of `cosine_betas`."""
        return cls(cosine_betas(num_timesteps))

    def respaced(self, sections: int | str) -> Self:
        """The process over `kept_timesteps`, with the same noise levels there. Raises its ValueError."""
        kept = kept_timesteps(len(self.betas), sections)
        alphas_cumprod = self.alphas_cumprod[kept]
        return type(self)(1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]), kept)

    def coefficients(self, *, device: torch.device | str | None = None) -> Tensor:
        """(T, k) float32, columns in the order of `Coefficients`."""
        columns = np.stack([getattr(self, name) for name in Coefficients._fields], axis=1)
        return torch.tensor(columns, dtype=torch.float32, device=device)


def q_sample(x: Tensor, noise: Tensor, c: Coefficients) -> Tensor:
    """x_t of the forward process from data x."""
    return c.sqrt_alphas_cumprod * x + c.sqrt_one_minus_alphas_cumprod * noise


def posterior_mean(x: Tensor, x_t: Tensor, c: Coefficients) -> Tensor:
    """Mean of q(x_{t-1} | x_t, x)."""
    return c.posterior_mean_coef1 * x + c.posterior_mean_coef2 * x_t


class ReverseStep(NamedTuple):
    """Mean and log-variance of p(x_{t-1} | x_t), and the data that the prediction implies; (..., D) each."""

    mean: Tensor
    log_variance: Tensor
    pred_xstart: Tensor


def predict_xstart(x_t: Tensor, eps: Tensor, c: Coefficients) -> Tensor:
    """The data whose noised version with noise `eps` is x_t; not clipped."""
    return c.sqrt_recip_alphas_cumprod * x_t - c.sqrt_recipm1_alphas_cumprod * eps


def reverse_step(x_t: Tensor, eps: Tensor, v: Tensor, c: Coefficients, *, clip: float | None = None) -> ReverseStep:
    """p(x_{t-1} | x_t) of a noise prediction and of variance logits v, -1..1 between the posterior's and beta.

    Improved DDPM, eq. 15; v is not clamped. `clip`: the data lie within +-clip, and so does their prediction.
    """
    fraction = (v + 1) / 2
    log_variance = fraction * c.log_betas + (1 - fraction) * c.posterior_log_variance_clipped
    x = predict_xstart(x_t, eps, c)
    if clip is not None:
        x = x.clamp(-clip, clip)
    return ReverseStep(posterior_mean(x, x_t, c), log_variance, x)


def normal_kl(mean_q: Tensor, log_variance_q: Tensor, mean_p: Tensor, log_variance_p: Tensor) -> Tensor:
    """KL(q || p) of two normal laws, elementwise, in nats."""
    ratio = torch.exp(log_variance_q - log_variance_p)
    return 0.5 * (log_variance_p - log_variance_q + ratio - 1 + (mean_q - mean_p) ** 2 * torch.exp(-log_variance_p))


def approximate_normal_cdf(x: Tensor) -> Tensor:
    """Standard normal distribution function, tanh approximation (Page 1977), as in the official code."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-probability in nats of the bin around x, elementwise: half-width 1/255, open beyond +-0.999, at least
    1e-12 of mass. Meant for images in [-1, 1]; MAR applies it to latents all the same."""
    scale, centered = torch.exp(-0.5 * log_variance), x - mean
    below_upper = approximate_normal_cdf(scale * (centered + 1 / 255))
    below_lower = approximate_normal_cdf(scale * (centered - 1 / 255))
    mass = torch.where(x > 0.999, 1 - below_lower, below_upper - below_lower)
    return torch.where(x < -0.999, below_upper, mass).clamp_min(1e-12).log()


def hybrid_terms(
    x: Tensor, x_t: Tensor, noise: Tensor, eps: Tensor, v: Tensor, c: Coefficients
) -> tuple[Tensor, Tensor]:
    """The two terms of the hybrid loss (Improved DDPM, eq. 16), unweighted, one per row: x (..., D) -> (...) twice.

    mse of the noise prediction, and vb, a term of the variational bound in bits per dim, from which only v learns:
    KL to the true posterior, or at timestep 0 the likelihood of the data.
    """
    step = reverse_step(x_t, eps.detach(), v, c)
    kl = normal_kl(posterior_mean(x, x_t, c), c.posterior_log_variance_clipped, step.mean, step.log_variance)
    nll = -discretized_log_likelihood(x, step.mean, step.log_variance)
    vb = torch.where(c.adds_noise > 0, kl, nll).mean(-1) / math.log(2)
    return (noise - eps).square().mean(-1), vb

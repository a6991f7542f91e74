"""The heads' small network and samplers the plain way: one step after the other, everything recomputed, all rows twice
under guidance. The oracle of the hoisted form."""

import torch
from torch import Tensor

from layers.diffusion.gaussian import Coefficients, predict_xstart, reverse_step
from layers.heads.diffusion import DiffusionHead
from layers.heads.flow import FlowHead
from layers.samplers.ode import SOLVERS, solve, uniform_times


def randomise(head: torch.nn.Module, std: float = 0.3) -> torch.nn.Module:
    """Fill every parameter: a fresh head answers 0 whatever its input."""
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=std / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else std)
    return head


def predict_plain(head, x: Tensor, time: Tensor, z: Tensor, uncond: Tensor | None, scale) -> Tensor:
    """The network's answer (R, K) at one time, its first D channels guided."""
    if uncond is None:
        return head.net(x, time.expand(len(x)), z)
    both = head.net(torch.cat([x, x]), time.expand(2 * len(x)), torch.cat([z, uncond]))
    cond, other = both.chunk(2)
    dim = head.token_dim
    return torch.cat([other[:, :dim] + scale * (cond[:, :dim] - other[:, :dim]), cond[:, dim:]], dim=1)


def sample_plain(
    head: DiffusionHead, z, noise, *, uncond=None, cfg_scale=1.0, temperature=1.0, num_steps: int, solver: str
) -> Tensor:
    """`DiffusionHead.sample`."""
    process = head.process.respaced(num_steps)
    x = noise[0]
    for k, i in enumerate(reversed(range(num_steps))):
        c = Coefficients(*(torch.tensor(getattr(process, n)[i], dtype=torch.float32) for n in Coefficients._fields))
        time = torch.tensor(process.timestep_map[i])
        eps, v = predict_plain(head, x, time, z, uncond, cfg_scale).chunk(2, dim=1)
        if solver == "ddim":
            data = predict_xstart(x, eps, c)
            x = c.sqrt_alphas_cumprod_prev * data + c.sqrt_one_minus_alphas_cumprod_prev * eps
        else:
            step = reverse_step(x, eps, v, c)
            x = step.mean
            if i > 0:
                x = x + torch.exp(0.5 * step.log_variance) * noise[1 + k] * temperature
    return x


def sample_flow_plain(
    head: FlowHead, z, noise, *, uncond=None, cfg_scale=1.0, temperature=1.0, num_steps: int, solver: str
) -> Tensor:
    """`FlowHead.sample`."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return predict_plain(head, x, 1000 * t, z, uncond, cfg_scale)

    return solve(SOLVERS[solver](velocity, temperature * noise[0], uniform_times(num_steps)))

"""Discriminator of image patches: PatchGAN (Isola et al., arXiv 1611.07004) as in taming-transformers'
`modules/discriminator/model.py`, the hinge losses of its two sides, and the weight that latent diffusion gives them.

Parameter names are the official ones. Batch norm always uses the statistics of the batch and keeps no running ones:
training, which is all a discriminator does, is the same, and nothing changes behind the loss's back. The batch is the
global one, where the official code takes each process's own: their number must not change what is trained.
In: images (B, 3, H, W) in [-1, 1]. Out: one logit per patch (B, 1, h, w), high for real.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.processes import mean_over_processes, several_processes

SLOPE = 0.2  # of the leaky ReLU
GROWTH_LIMIT = 8  # widest layer over the first one
WEIGHT_LIMIT = 1e4  # official `calculate_adaptive_weight`
WEIGHT_EPS = 1e-4


@dataclass
class DiscriminatorConfig:
    """Sizes; the defaults are LDM's, whose logits see patches of 70x70 pixels."""

    channels: int = 64
    num_layers: int = 3  # layers of stride 2

    def __post_init__(self) -> None:
        if self.channels < 1 or self.num_layers < 1:
            raise ValueError(f"discriminator sizes must be at least 1, in {self}")

    @property
    def smallest_image(self) -> int:
        """Pixels below which not even one logit comes out."""
        return 3 * 2**self.num_layers


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch norm by the statistics of all processes' images together. float32 island."""

    def forward(self, x: Tensor) -> Tensor:
        if not several_processes():
            return super().forward(x)
        h = x.to(torch.promote_types(x.dtype, torch.float32))
        h = h - mean_over_processes(h.mean((0, 2, 3), keepdim=True))
        h = h * (mean_over_processes(h.square().mean((0, 2, 3), keepdim=True)) + self.eps).rsqrt()
        return (h * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class PatchDiscriminator(nn.Module):
    """Strided convolutions. Official `NLayerDiscriminator`, with its initial weights."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        depth = config.num_layers
        widths = [config.channels * min(2**i, GROWTH_LIMIT) for i in range(depth + 1)]
        layers = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for i in range(1, depth + 1):
            layers += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=2 if i < depth else 1, padding=1, bias=False),
                GlobalBatchNorm(widths[i], track_running_stats=False),
                nn.LeakyReLU(SLOPE),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Official `weights_init`; biases of convolutions keep torch's."""
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, mean=1.0, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)


def frozen_call(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) whose gradient reaches x and not the module's parameters."""
    return torch.func.functional_call(module, {name: p.detach() for name, p in module.named_parameters()}, (x,))


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Loss of the discriminator from its logits. Official `hinge_d_loss`."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator(fake: Tensor) -> Tensor:
    """Loss of the other side: wants high logits for its images."""
    return -fake.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: nn.Parameter) -> Tensor:
    """|gradient of `reconstruction`| / |gradient of `adversarial`|, both with respect to the decoder's last weight.

    The adversarial loss times this pulls as hard there as the reconstruction does. No gradient flows through it. LDM
    `LPIPSWithDiscriminator.calculate_adaptive_weight`, VQGAN (Esser et al., arXiv 2012.09841) equation 7.
    """
    losses = (reconstruction, adversarial)
    grads = [mean_over_processes(torch.autograd.grad(loss, last, retain_graph=True)[0]) for loss in losses]
    norms = [grad.norm() for grad in grads]
    return (norms[0] / (norms[1] + WEIGHT_EPS)).clamp(0, WEIGHT_LIMIT).detach()

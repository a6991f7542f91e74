"""LPIPS, a perceptual distance of images (Zhang et al., arXiv 1801.03924; official `lpips` 0.1 with net="vgg").

Squared differences of VGG-16 features, each normalised over its channels, weighted by learnt heads, averaged over
positions and summed over five stages. Nothing here is trained or stored: the weights are buffers that stay out of state
dicts, and NaN until `load_weights`, so that a distance without them cannot pass for one.
In: two batches of images (B, 3, H, W) in [-1, 1], from 16 pixels on. Out: distances (B,).
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.checkpoint import check_fit

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels; pooling between stages
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # official `ScalingLayer`, for images in [-1, 1]
EPS = 1e-10


class FixedConv(nn.Module):
    """Convolution of odd size, same size out, whose weights are no parameters."""

    def __init__(self, in_channels: int, out_channels: int, size: int, *, bias: bool) -> None:
        super().__init__()
        self.padding = size // 2
        shape = (out_channels, in_channels, size, size)
        self.register_buffer("weight", torch.full(shape, torch.nan), persistent=False)
        self.register_buffer("bias", torch.full((out_channels,), torch.nan) if bias else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)


class PerceptualDistance(nn.Module):
    """The distance; other `stages` than VGG-16's are for tests."""

    def __init__(self, stages: Sequence[Sequence[int]] = VGG16) -> None:
        super().__init__()
        self.stages, self.heads = nn.ModuleList(), nn.ModuleList()
        before = 3
        for widths in stages:
            convs = [FixedConv(c, d, 3, bias=True) for c, d in zip([before, *widths], widths, strict=False)]
            self.stages.append(nn.ModuleList(convs))
            self.heads.append(FixedConv(widths[-1], 1, 1, bias=False))
            before = widths[-1]
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def named_weights(self) -> dict[str, Tensor]:
        """Our buffers under the names of torchvision (`features.0.weight`) and LPIPS (`lin0.model.1.weight`)."""
        named, index = {}, 0
        for number, stage in enumerate(self.stages):
            for conv in stage:
                named |= {f"features.{index}.weight": conv.weight, f"features.{index}.bias": conv.bias}
                index += 2  # a ReLU follows
            index += 1  # the pooling
            named[f"lin{number}.model.1.weight"] = self.heads[number].weight
        return named

    @torch.no_grad()
    def load_weights(self, state: Mapping[str, Tensor], *, origin: str) -> None:
        """Weights under those names; others, such as VGG's classifier, are passed over.

        Raises ValueError that names what is missing or of another shape; nothing is changed then.
        """
        own = self.named_weights()
        check_fit({name: tensor for name, tensor in state.items() if name in own}, own, origin=origin)
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def features(self, images: Tensor) -> list[Tensor]:
        """The last activations of each stage: (B, C, h, w), halved in size from one to the next."""
        x, found = (images - self.shift) / self.scale, []
        for number, stage in enumerate(self.stages):
            x = F.max_pool2d(x, 2) if number else x
            for conv in stage:
                x = F.relu(conv(x))
            found.append(x)
        return found

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        distances = [
            head((unit(a) - unit(b)).square()).mean((1, 2, 3))
            for head, a, b in zip(self.heads, self.features(images), self.features(others), strict=True)
        ]
        return torch.stack(distances).sum(0)  # (B,)


def unit(x: Tensor) -> Tensor:
    """(B, C, h, w) over its length along the channels, float32. Where it is zero it stays so, gradient included."""
    x = x.float()
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + EPS)

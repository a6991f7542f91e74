"""Label maps as numbers: one-hot input, loss, and what logits mean, for panoptic segmentation and depth.

Sources: UViM (arXiv 2205.10337; official `trainers/proj/uvim/panoptic_task.py`) and GIVT's use of it (official
`trainers/proj/givt/vae.py`, `utils.py`). Maps hold class ids as integers; -1, or any other id that is no class, is a
pixel about which nothing is known.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def one_hot(maps: Tensor, classes: Sequence[int], *, dtype: torch.dtype) -> Tensor:
    """Ids (B, K, H, W) of K maps with `classes` each -> (B, sum of classes, H, W); all zero where an id is no class."""
    hot = maps.new_zeros(maps.shape[0], sum(classes), *maps.shape[2:], dtype=dtype)
    first = 0
    for ids, count in zip(maps.split(1, dim=1), classes, strict=True):
        known = is_class(ids, count)
        hot[:, first : first + count].scatter_(1, ids.long().clamp(0, count - 1), known.to(dtype))
        first += count
    return hot


def is_class(ids: Tensor, count: int) -> Tensor:
    """Where ids are one of 0..count-1."""
    return (ids >= 0) & (ids < count)


def cross_entropy(logits: Tensor, ids: Tensor, *, ignore_zero: bool) -> Tensor:
    """-log softmax at the ids: logits (B, ..., C), ids (B, ...) -> mean over pixels (B,), in nats, float32.

    Ids that are no class add nothing, but are counted. `ignore_zero`: pixels of id 0 are left out, and not counted; an
    image of them alone has loss 0. Official `weighted_softmax_xent`.
    """
    count = logits.shape[-1]
    known = is_class(ids, count)
    targets = torch.where(known, ids.long(), -1)
    losses = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=-1, reduction="none")
    losses = losses.view(ids.shape).flatten(1)  # (B, pixels)
    if not ignore_zero:
        return losses.mean(1)
    counted = (ids != 0).flatten(1)
    return (losses * counted).sum(1) / counted.sum(1).clamp_min(1)


def panoptic_map(semantics: Tensor, instances: Tensor, *, min_fraction: float = 0.0) -> dict[str, Tensor]:
    """Logits (B, H, W, classes) and (B, H, W, ids) -> int64 "semantics" and "instances" of each pixel, (B, H, W).

    A pixel's instance is its likeliest; all pixels of an instance have the class whose logits have the largest sum over
    them. Instances on no more than `min_fraction` of the pixels become id and class 0.
    """
    ids = instances.argmax(-1)  # (B, H, W)
    pixels = ids.flatten(1)
    sums = semantics.new_zeros(len(ids), instances.shape[-1], semantics.shape[-1], dtype=torch.float32)
    index = pixels[..., None].expand(-1, -1, sums.shape[-1])
    classes = sums.scatter_add_(1, index, semantics.flatten(1, 2).float()).argmax(-1)  # (B, ids)
    counts = torch.zeros_like(classes).scatter_add_(1, pixels, torch.ones_like(pixels))
    kept = (counts > min_fraction * pixels.shape[1]).gather(1, pixels).view_as(ids)
    return {"semantics": classes.gather(1, pixels).view_as(ids) * kept, "instances": ids * kept}


def bins_of_depth(depth: Tensor, count: int, *, low: float, high: float) -> Tensor:
    """Depth of any shape -> which of the `count` equal bins of low..high it lies in, int64; beyond them the nearest.

    Official `bin_nyu_depth`.
    """
    return ((depth - low) / (high - low) * count).floor().long().clamp(0, count - 1)


def depth_of_bins(bins: Tensor, count: int, *, low: float, high: float) -> Tensor:
    """The middle of each of the `count` bins that divide low..high: ids of any shape -> float32."""
    return (bins.float() + 0.5) / count * (high - low) + low


# Pictures

GOLDEN = 0.6180339887  # multiples of it, modulo 1, are as far apart as can be: hues of neighbouring ids differ


def panoptic_picture(semantics: Tensor, instances: Tensor) -> Tensor:
    """Classes and instances (B, H, W) -> colours (B, 3, H, W) in [-1, 1]: the hue is the class, its lightness the
    instance; black where there is no class."""
    hue = (semantics.float() * GOLDEN) % 1
    value = 0.55 + 0.45 * ((instances.float() * GOLDEN) % 1)
    colours = _hsv(hue, torch.full_like(hue, 0.75), value)
    return torch.where(semantics[:, None] > 0, colours, 0.0) * 2 - 1


def depth_picture(bins: Tensor, count: int) -> Tensor:
    """Bins (B, H, W) of `count` -> colours (B, 3, H, W) in [-1, 1]: red is near, blue far, black unknown (bin 0)."""
    far = bins.float() / (count - 1)
    colours = _hsv(far * 0.7, torch.ones_like(far), torch.ones_like(far))
    return torch.where(bins[:, None] > 0, colours, 0.0) * 2 - 1


def _hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Hue, saturation, value (B, H, W) in [0, 1] -> RGB (B, 3, H, W) in [0, 1]."""
    sector = (torch.tensor([5.0, 3.0, 1.0], device=hue.device).view(3, 1, 1) + hue[:, None] * 6) % 6
    drop = torch.minimum(sector, 4 - sector).clamp(0, 1)
    return value[:, None] * (1 - saturation[:, None] * drop)

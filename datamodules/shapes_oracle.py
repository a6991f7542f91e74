"""Reads the attributes of a shapes picture back, without a trained network: what conditional samples are scored by.

Background: the median of the border. Colour: the median of the pixels that differ most from it. Shape, size and
position: least squares between how much each pixel is covered (its projection on the line from background to colour)
and drawn templates. Pictures of 16 px and more are read, larger ones than 32 px after averaging down to 32. In:
uint8 (N,3,S,S). Out: int64 (N,5) in the order of ATTRIBUTES; where nothing stands out from the background, -1 for all
but the background. Anything else is read as the nearest thing that the set could draw, so noise is read by chance.
"""

from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.shapes_scene import (
    ATTRIBUTES,
    BACKGROUNDS,
    CENTRE_STEP,
    COLOURS,
    FIRST_CENTRE,
    NAMES,
    RADII,
    coverage,
    parse_caption,
)

SIDE = 32  # of the pictures that templates are compared with
CHUNK = 256  # pictures read at once
FAINT = 40.0  # RGB distance below which nothing is there: backgrounds have at most 30, shapes at least 74
STRONGEST = 0.01  # share of the pixels that tells how far the colour lies from the background
PURE = 0.75  # pixels that reach this share of that distance are taken for the shape's own colour

# around the nominal radius and the coarse centre (pixels), where the pictures vary
SCALES = (0.95, 1.0, 1.05)
ANGLES = (-0.13, 0.0, 0.13)
OFFSETS = (-1.0, -0.5, 0.0, 0.5, 1.0)
ROUND = (NAMES["shape"].index("circle"), NAMES["shape"].index("ring"))  # no need to turn these


class Templates(NamedTuple):
    """K coverage maps, each with the ids and the shift that it stands for."""

    maps: Tensor  # (K, V, V)
    shape: Tensor  # (K,)
    extent: Tensor  # (K,), ids of "size"
    offset: Tensor  # (K, 2), (y, x) of the centre from the middle of the map, in pixels

    def misfit(self, products: Tensor) -> Tensor:
        """Squared error up to what is the same for all templates, given sums of map times picture (..., K)."""
        return self.maps.square().sum((1, 2)) - 2 * products


def read_attributes(images: Tensor) -> Tensor:
    """uint8 (N,3,S,S) -> int64 (N,5). Raises ValueError for another type or shape."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images of {images.dtype} {tuple(images.shape)} are no uint8 (N, 3, S, S): convert them")
    return torch.cat([_read(part) for part in images.cpu().split(CHUNK)])


def caption_accuracy(images: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """How far pictures uint8 (N,3,S,S) show what their captions name: shares in 0..1.

    {"shape_acc": ..., "size_acc": ..., ...}, each over the pictures whose caption names that attribute and absent if
    none does, and "attr_acc", the share with everything right that is named. Raises ValueError for a caption that the
    set does not write, and unless there is one for each of at least one picture.
    """
    if not captions or len(captions) != len(images):
        raise ValueError(f"{len(images)} images and {len(captions)} captions: give one caption for each image")
    asked = [parse_caption(text) for text in captions]
    wanted = torch.tensor([[ids.get(name, -1) for name in ATTRIBUTES] for ids in asked])  # (N, 5)
    named = wanted >= 0
    right = (read_attributes(images) == wanted) & named
    scores = {
        f"{name}_acc": float(right[:, i].sum() / named[:, i].sum())
        for i, name in enumerate(ATTRIBUTES)
        if named[:, i].any()
    }
    return scores | {"attr_acc": float((right == named).all(1).float().mean())}


def _read(images: Tensor) -> Tensor:
    pixels = _shrink(images)  # (N, 3, W, W)
    back = _border_colour(pixels)
    change = pixels - back[:, :, None, None]
    front, strength = _strongest(change.flatten(2))
    cover = (change * front[:, :, None, None]).sum(1) / front.square().sum(1).clamp(min=1)[:, None, None]  # (N, W, W)
    shape, extent, centre = _match(cover)
    steps = ((centre / pixels.shape[-1] - FIRST_CENTRE) / CENTRE_STEP).round().clamp(0, 2).long()  # (N, 2), (y, x)
    position = 3 * steps[:, 0] + steps[:, 1]
    there = torch.stack([shape, _nearest(back + front, COLOURS), _nearest(back, BACKGROUNDS), extent, position], dim=1)
    nowhere = torch.full_like(there, -1)
    nowhere[:, 2] = there[:, 2]
    return torch.where((strength < FAINT)[:, None], nowhere, there)


def _shrink(images: Tensor) -> Tensor:
    """float32 (N, 3, W, W), W = min(S, SIDE): each pixel the mean over the area that it covers."""
    size = images.shape[-1]
    side = min(size, SIDE)
    edges = torch.arange(side + 1, dtype=torch.float64) * size / side
    pixel = torch.arange(size, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], pixel + 1) - torch.maximum(edges[:-1, None], pixel)
    weights = (overlap.clamp(min=0) * side / size).float()  # (W, S)
    return weights @ images.float() @ weights.T


def _border_colour(pixels: Tensor) -> Tensor:
    """(N, 3): median of the outermost pixels, per channel."""
    sides = [pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, 1:-1, 0], pixels[:, :, 1:-1, -1]]
    return torch.cat(sides, dim=-1).median(-1).values


def _strongest(change: Tensor) -> tuple[Tensor, Tensor]:
    """The shape's colour relative to the background (N, 3) and its distance (N,), from `change` (N, 3, P)."""
    distance = change.square().sum(1).sqrt()  # (N, P)
    most = max(1, int(STRONGEST * distance.shape[1]))
    strength = distance.topk(most, dim=1).values.median(1).values
    pure = distance >= PURE * strength[:, None]
    return change.masked_fill(~pure[:, None], torch.nan).nanmedian(-1).values, strength


def _nearest(rgb: Tensor, palette: np.ndarray) -> Tensor:
    return torch.cdist(rgb, torch.from_numpy(palette).float()).argmin(1)


def _match(cover: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shape and size ids (N,) and the centre (N, 2), (y, x) in pixels, of the best template for `cover` (N, W, W)."""
    side = cover.shape[-1]
    middle = _coarse_centre(cover)  # (N, 2)
    templates = _fine_templates(side)
    window = templates.maps.shape[-1]
    padded = torch.nn.functional.pad(cover, [window // 2] * 4)
    rows, columns = (middle[:, :, None] + torch.arange(window)).unbind(1)  # each (N, V)
    around = padded[torch.arange(len(cover))[:, None, None], rows[:, :, None], columns[:, None, :]]  # (N, V, V)
    best = templates.misfit(around.flatten(1) @ templates.maps.flatten(1).T).argmin(1)
    return templates.shape[best], templates.extent[best], middle + templates.offset[best]


def _coarse_centre(cover: Tensor) -> Tensor:
    """int64 (N, 2): the pixel corner (y, x) at which some upright template fits best, tried at all of them by FFT."""
    side = cover.shape[-1]
    templates = _coarse_templates(side)
    maps = templates.maps.roll((-(side // 2), -(side // 2)), dims=(1, 2))  # centre in the corner (0, 0)
    spectra = torch.fft.rfft2(cover)[:, None] * torch.fft.rfft2(maps).conj()
    products = torch.fft.irfft2(spectra, s=(side, side))  # (N, K, W, W)
    best = templates.misfit(products.movedim(1, -1)).amin(-1).flatten(1).argmin(1)
    return torch.stack([best // side, best % side], dim=1)


@cache
def _coarse_templates(side: int) -> Templates:
    return _templates(side, scales=(1.0,), angles=(0.0,), offsets=(0.0,))


@cache
def _fine_templates(side: int) -> Templates:
    window = 2 * int(0.33 * side + 2)  # the largest shape, a star, reaches 0.31 of the side
    return _templates(side, scales=SCALES, angles=ANGLES, offsets=OFFSETS, window=window)


def _templates(
    side: int,
    *,
    scales: Sequence[float],
    angles: Sequence[float],
    offsets: Sequence[float],
    window: int | None = None,
) -> Templates:
    """All shapes and sizes for pictures of `side` pixels, each in every variant, drawn in `window` (or all) pixels."""
    window = side if window is None else window
    parts = []
    for shape, extent in product(range(len(NAMES["shape"])), range(len(RADII))):
        grid = list(product(scales, (0.0,) if shape in ROUND else angles, offsets, offsets))
        scale, angle, y, x = np.array(grid).T[:, :, None, None]  # each (k, 1, 1)
        radius = RADII[extent] * side * scale
        maps = coverage(shape, window, centre_x=window // 2 + x, centre_y=window // 2 + y, radius=radius, angle=angle)
        ids = torch.tensor([[shape, extent]]).expand(len(grid), 2)
        parts.append((torch.from_numpy(maps).float(), ids, torch.tensor(grid)[:, 2:]))
    maps, ids, offset = (torch.cat(part) for part in zip(*parts, strict=True))
    return Templates(maps, ids[:, 0], ids[:, 1], offset)

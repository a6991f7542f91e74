"""What is done to an image and its label maps alike, and to instance ids, on the host.

Source: UViM's preprocessing (Kolesnikov et al., arXiv 2205.10337; big_vision `pp/proj/uvim/pp_ops.py`). Maps are
(K, H, W); images are PIL images or uint8 (3, H, W). Everything random takes its generator.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

AREA = (0.05, 1.0)  # share of the image that a crop has
ASPECT = (0.75, 1.33)  # its width / height
ATTEMPTS = 100  # at a crop that fits


class Box(NamedTuple):
    """Part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def inception_box(height: int, width: int, draw: np.random.Generator) -> Box:
    """A random part of an image; the whole, if none was found that fits. As `tf.image.sample_distorted_bounding_box`:
    first the aspect, then one of the heights that give an allowed area."""
    for _ in range(ATTEMPTS):
        aspect = draw.uniform(*ASPECT)
        low, high = (round((share * height * width / aspect) ** 0.5) for share in AREA)
        high = min(high, height, int((width + 0.5) / aspect))
        tall = int(draw.integers(min(low, high), high + 1))
        wide = round(tall * aspect)
        if tall > 0 and 0 < wide <= width and AREA[0] <= tall * wide / (height * width) <= AREA[1]:
            return Box(int(draw.integers(height - tall + 1)), int(draw.integers(width - wide + 1)), tall, wide)
    return Box(0, 0, height, width)


def crop_maps(maps: np.ndarray, box: Box) -> np.ndarray:
    """(K, H, W) -> (K, height, width)."""
    return maps[:, box.top : box.top + box.height, box.left : box.left + box.width]


def resize_maps(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(K, H, W) -> (K, *size): each pixel is the one whose middle is nearest; ids are never mixed."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64) for new, old in zip(size, maps.shape[1:], strict=True)
    )
    return maps[:, rows[:, None], columns]


def resize_image(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """The part `box` of an RGB image, whatever its shape, as a square: uint8 (3, size, size).

    Bilinear without antialiasing, fractions cut off, as the official `tf.image.resize` does.
    """
    part = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    pixels = torch.from_numpy(np.array(part)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False)
    return resized[0].to(torch.uint8).numpy()


def canonical_ids(instances: np.ndarray) -> np.ndarray:
    """Instance ids (H, W) -> 1..N from top to bottom and left to right, by x + H y of the centres of mass (x, y).

    0 stays, and all negative ids become -1. Official `make_canonical`.
    """
    ids, places = np.unique(instances, return_inverse=True)
    places = places.reshape(instances.shape)
    rows, columns = np.indices(instances.shape)
    counts = np.bincount(places.ravel())
    across, down = (np.bincount(places.ravel(), weights=axis.ravel()) / counts for axis in (columns, rows))
    order = np.argsort(across + instances.shape[0] * down, kind="stable")
    order = order[ids[order] > 0]
    new = np.where(ids == 0, 0, -1)
    new[order] = np.arange(1, len(order) + 1)
    return new[places].astype(instances.dtype)


def segment_maps(ids: np.ndarray, segments: dict[int, int]) -> np.ndarray:
    """A map of segment ids (H, W) -> classes and instances (2, H, W), int16; `segments` are classes by id.

    Instances are numbered from 1 in the order of `segments`; pixels of other ids are (0, 0). Official `coco_panoptic`.
    """
    known, places = np.unique(ids, return_inverse=True)
    numbers = {segment: i for i, segment in enumerate(segments, start=1)}
    table = np.array([[segments.get(i, 0), numbers.get(i, 0)] for i in known.tolist()], np.int16)  # (ids, 2)
    return table[places.reshape(ids.shape)].transpose(2, 0, 1)

"""Image transforms of the input pipeline: ADM centre crop, uint8 tensor, horizontal flip, five crops.

Source: guided-diffusion's image_datasets.py, which MAR and JiT use unchanged. PIL resamples in uint8 and rounds after
each resize, so the result is reproducible to the count; no torchvision is needed. In: a PIL image of any mode and
size. Out: uint8 (3, H, W). The random decision of the flip is an argument: nothing here draws numbers.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Crops `image` to an RGB square of `size` pixels: BOX halvings while >= 2 `size`, BICUBIC to `size`, centre.

    Images smaller than `size` are enlarged. Raises ValueError when `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"image_size={size} must be at least 1 pixel")
    if image.mode != "RGB":
        image = image.convert("RGB")
    resized = size_before_crop(image.width, image.height, size)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def size_before_crop(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height of what `center_crop` cuts the square from: the shorter is `size`, the other may be long."""
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
    scale = size / min(width, height)
    return round(width * scale), round(height * scale)


def to_uint8_chw(image: Image.Image) -> Tensor:
    """RGB PIL image of (width W, height H) -> contiguous uint8 tensor (3, H, W). Raises ValueError for other modes."""
    if image.mode != "RGB":
        raise ValueError(f"image mode {image.mode!r} is not 'RGB': call image.convert('RGB') first")
    pixels = np.array(image)  # (H, W, 3); np.array copies: PIL's own buffer is read-only
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # (3, H, W)


def enlarged(size: int) -> int:
    """Side of the picture that `five_crop` cuts squares of `size` from. RAR's `scripts/pretokenization.py`."""
    return int(1.1 * size)


def five_crop(images: Tensor, size: int) -> list[Tensor]:
    """(..., H, W) -> five of (..., size, size): top left, top right, bottom left, bottom right, centre.

    The order and, where the margin is odd, the centre are those of torchvision's `five_crop`, whose `ten_crop` adds the
    same five of the mirror image.
    """
    bottom, right = images.shape[-2] - size, images.shape[-1] - size
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))]
    return [images[..., top : top + size, left : left + size] for top, left in corners]


def flip_horizontal(image: Tensor, flip: bool) -> Tensor:
    """Mirrors left and right of an image (..., W) if `flip`, else returns it unchanged."""
    return image.flip(-1) if flip else image

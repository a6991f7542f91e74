"""ADM centre crop against the pinned table, and the small tensor helpers."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.transforms import center_crop, enlarged, five_crop, flip_horizontal, size_before_crop, to_uint8_chw

CROPS = [  # width, height, size, sum of bytes, pixel [size // 2, size // 3], first 16 hex digits of sha256
    (613, 427, 256, 25057867, (178, 99, 141), "a5861edc80e066c0"),
    (1200, 900, 64, 1582317, (127, 127, 129), "80352f7c014dc01f"),
    (100, 80, 64, 1568527, (4, 209, 157), "d46432834dd27710"),
    (500, 375, 256, 25057329, (97, 152, 106), "7f10460fc9e7047b"),
    (333, 500, 32, 395695, (130, 128, 129), "d666db13ce939c7f"),
    (64, 64, 64, 1556692, (63, 148, 233), "e4db343e9be162a7"),
]


def pattern(width: int, height: int) -> Image.Image:
    x, y, c = np.arange(width)[None, :, None], np.arange(height)[:, None, None], np.arange(3)[None, None, :]
    return Image.fromarray(((x * (c + 3) + y * (5 - c) + ((x * y) // 7) * (c + 1)) % 256).astype(np.uint8))


@pytest.mark.parametrize(("width", "height", "size", "total", "pixel", "digest"), CROPS)
def test_center_crop_table(width, height, size, total, pixel, digest):
    crop = np.asarray(center_crop(pattern(width, height), size))
    assert crop.shape == (size, size, 3)
    assert int(crop.sum()) == total
    assert tuple(crop[size // 2, size // 3]) == pixel
    assert hashlib.sha256(crop.tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_center_crop_converts_every_mode_before_resampling(mode):
    image = pattern(40, 30).convert(mode)
    crop = center_crop(image, 16)
    assert crop.mode == "RGB" and crop.size == (16, 16)
    assert crop.tobytes() == center_crop(image.convert("RGB"), 16).tobytes()


def test_center_crop_enlarges_small_images_and_refuses_size_0():
    assert center_crop(pattern(5, 9), 32).size == (32, 32)
    with pytest.raises(ValueError, match="image_size=0"):
        center_crop(pattern(5, 9), 0)


def test_to_uint8_chw_layout_and_flip():
    image = pattern(7, 5)
    tensor = to_uint8_chw(image)
    assert tensor.dtype == torch.uint8 and tensor.shape == (3, 5, 7) and tensor.is_contiguous()
    assert tuple(tensor[:, 2, 6].tolist()) == image.getpixel((6, 2))
    flipped = flip_horizontal(tensor, True)
    assert tuple(flipped[:, 2, 0].tolist()) == image.getpixel((6, 2))
    assert torch.equal(flip_horizontal(tensor, False), tensor)
    with pytest.raises(ValueError, match="'L'"):
        to_uint8_chw(image.convert("L"))


def test_center_crop_halves_at_exactly_twice_the_size():
    image = pattern(32, 32)
    assert center_crop(image, 16).tobytes() == image.resize((16, 16), Image.Resampling.BOX).tobytes()


@pytest.mark.parametrize(
    ("width", "height", "size", "wanted"),
    [(4000, 1, 256, (1_024_000, 256)), (1200, 900, 64, (86, 64)), (500, 375, 256, (341, 256)), (64, 64, 64, (64, 64))],
)
def test_size_before_crop(width, height, size, wanted):
    assert size_before_crop(width, height, size) == wanted


def test_five_crops_are_the_corners_and_the_centre():
    images = torch.arange(2 * 7 * 9).view(2, 1, 7, 9)
    found = five_crop(images, 4)
    corners = [(0, 0), (0, 5), (3, 0), (3, 5), (2, 2)]  # (7 - 4) / 2 and (9 - 4) / 2, rounded half to even
    assert [crop.shape for crop in found] == [(2, 1, 4, 4)] * 5
    for crop, (top, left) in zip(found, corners, strict=True):
        assert torch.equal(crop, images[..., top : top + 4, left : left + 4])


def test_the_picture_of_ten_crops_is_a_tenth_larger():
    """281 for 256, as `int(256 * 1.1)` in the official script; its centre starts at row 12 of a margin of 25."""
    assert [enlarged(size) for size in (256, 64, 20, 8)] == [281, 70, 22, 8]
    assert five_crop(torch.arange(281).view(1, 1, 281).expand(1, 281, 281), 256)[4][0, 0, 0] == 12

"""The image reader: an RGB picture of the size asked for, or one error that names the row."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datamodules.decode import MAX_PIXELS, BadRowError
from datamodules.image_rows import ImageRows
from datamodules.label_sources import Pair, read_pair
from datamodules.rows import RawRow
from datamodules.sampler import RowKey
from experiments.image_files import read_images
from tests.fuzz.guard import fresh, survives
from tests.fuzz.mutations import mutated, mutated_png

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
SIZE = 16
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 4), dtype=np.uint8)
# the most that a picture of MAX_PIXELS may take: four copies at four bytes each, as transparent ones are laid on white
PICTURE_MEMORY = 20 * MAX_PIXELS


def encoded(kind: str, mode: str, **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(PIXELS, "RGBA").convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = 6
    return tags


PNG = [
    *(encoded("PNG", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")),
    encoded("PNG", "P", transparency=3),
    encoded("PNG", "RGB", exif=exif()),
]
JPEG = [
    *(encoded("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
    encoded("JPEG", "RGB", progressive=True),
    encoded("JPEG", "RGB", exif=exif(), subsampling=0),
]
WEBP = [encoded("WEBP", "RGB"), encoded("WEBP", "RGBA", lossless=True), encoded("WEBP", "RGB", exif=exif())]
OTHERS = [
    *(encoded("TIFF", mode, compression=how) for mode, how in (("RGB", "raw"), ("L", "tiff_lzw"), ("I;16", "raw"))),
    encoded("TIFF", "RGB", compression="tiff_deflate"),
    encoded("GIF", "P"),
    encoded("BMP", "RGB"),
    encoded("PPM", "RGB"),
]
ROWS = ImageRows([], SIZE, num_classes=1)


def check(data: bytes) -> None:
    item = survives(
        lambda: ROWS.read(RawRow(data, 0, None, "row 7"), RowKey(0, 7)), named="row 7", memory=PICTURE_MEMORY
    )
    assert item is None or item.image.shape == (3, SIZE, SIZE)


@given(mutated(PNG) | mutated_png(PNG))
def test_png(data):
    check(data)


@given(mutated(JPEG))
def test_jpeg(data):
    check(data)


@given(mutated(WEBP))
def test_webp(data):
    check(data)


@given(mutated(OTHERS))
def test_other_formats(data):
    check(data)


@given(st.binary(max_size=64))
def test_bytes_that_are_no_image(data):
    check(data)


LABELS = [encoded("PNG", "RGB"), encoded("PNG", "I;16"), encoded("PNG", "L"), encoded("TIFF", "I;16")]


@given(mutated(LABELS) | mutated_png(LABELS[:3]), st.booleans())
def test_label_maps(data, panoptic):
    pair = Pair(PNG[0], data, "row 7")
    survives(lambda: read_pair(pair, None, panoptic=panoptic, depth_unit=1.0), named="row 7", memory=2 * PICTURE_MEMORY)


@given(data=mutated(PNG) | mutated_png(PNG))
def test_images_to_score(data, tmp_path):
    path = fresh(tmp_path, data, ".png")
    survives(lambda: read_images(tmp_path)[0], named=path.name, memory=PICTURE_MEMORY)


def png_of(width: int, height: int, *, packed: bytes) -> bytes:
    """A grey PNG that says it has these many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")]
    parts = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("width", "height"), [(2**31 - 1, 2**31 - 1), (100_000, 100_000), (2**31 - 1, 1), (9460, 9460)]
)
def test_a_bomb_is_refused_by_its_header(width, height):
    zeros = zlib.compress(bytes(2**20), 9)
    with pytest.raises(BadRowError, match="row 7"):
        ROWS.read(RawRow(png_of(width, height, packed=zeros), 0, None, "row 7"), RowKey(0, 7))
    check(png_of(width, height, packed=zeros))


@pytest.mark.slow
def test_the_largest_picture_that_is_read_takes_bounded_memory():
    side = int(MAX_PIXELS**0.5)
    row = zlib.compress(bytes((side + 1) * side), 9)
    item = survives(
        lambda: ROWS.read(RawRow(png_of(side, side, packed=row), 0, None, "row 7"), RowKey(0, 7)),
        memory=PICTURE_MEMORY,
    )
    assert item.image.shape == (3, SIZE, SIZE)

"""What images of every mode, depth and state of repair become."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from datamodules.decode import MAX_PIXELS, BadRowError, decode

WHITE, RED = (255, 255, 255), (255, 0, 0)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(mode, colour, kind="PNG", **options):
    return encoded(Image.new(mode, (6, 4), colour), kind, **options)


def png(width, height, depth, kind, rows):
    """A PNG file of raw, unfiltered rows; `kind` is the colour type of its header."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def palette(**options):
    image = Image.new("P", (6, 4), 1)
    image.putpalette([0, 0, 255, *RED])
    return encoded(image, "PNG", **options)


def animation(kind):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue", "lime")]
    return encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (flat("L", 77), (77, 77, 77)),
        (flat("1", 1), WHITE),
        (flat("CMYK", (0, 255, 255, 0), "JPEG", quality=100), RED),
        (flat("CMYK", (0, 255, 255, 0), "TIFF"), RED),
        (palette(), RED),
        (palette(transparency=0), RED),
        (palette(transparency=1), WHITE),
        (palette(transparency=b"\xff\x80"), (255, 127, 127)),
        (flat("RGB", RED, transparency=RED), WHITE),
        (flat("L", 9, transparency=9), WHITE),
        (flat("RGBA", (0, 0, 0, 128)), (127, 127, 127)),
        (flat("RGBA", (*RED, 0)), WHITE),
        (flat("RGBA", (*RED, 255), "WEBP", lossless=True), RED),
        (flat("LA", (0, 0)), WHITE),
        (animation("GIF"), RED),
        (animation("WEBP"), RED),
        (flat("RGB", RED, "BMP"), RED),
        (flat("RGB", RED, "PPM"), RED),
        (flat("RGB", RED, "TIFF", compression="tiff_lzw"), RED),
    ],
)
def test_a_flat_colour_of_every_mode(data, colour):
    pixels = np.asarray(decode(data, "row 0"))
    assert pixels.shape == (4, 6, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - np.array(colour)).max() <= (2 if data[:2] == b"\xff\xd8" else 0)  # JPEG


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_and_rounded(kind):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = np.asarray(decode(encoded(Image.fromarray(values), kind), "row 0"))
    assert np.array_equal(pixels, np.repeat(np.rint(values / 257)[..., None], 3, axis=2))
    assert pixels[0, 0, 0] == 0 and pixels[128, 0, 0] == 128 and pixels[255, 255, 0] == 255


def test_sixteen_bit_colour_keeps_the_high_byte():
    row = struct.pack(">6H", 0, 255, 256, 0x7FFF, 0x8000, 0xFFFF)
    assert np.asarray(decode(png(2, 1, 16, 2, [row]), "row 0")).ravel().tolist() == [0, 0, 1, 127, 128, 255]


@pytest.mark.parametrize("values", [np.full((2, 2), 0.5, np.float32), np.array([[70000, -1]], np.int32)])
def test_values_without_a_white_are_refused(values):
    with pytest.raises(BadRowError, match=r"row 5 is no readable image \(.* is no range of 8 or 16 bits.*: replace or"):
        decode(encoded(Image.fromarray(values), "TIFF"), "row 5")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied_unless_told_otherwise(orientation, kind):
    corners = np.array([[0, 80], [160, 240]], np.uint8)  # upright: top left 0, top right 80, ...
    stored = {  # where the standard's "0th row, 0th column" lie -> what the camera stored
        1: corners,
        2: corners[:, ::-1],
        3: corners[::-1, ::-1],
        4: corners[::-1],
        5: corners.T,
        6: np.rot90(corners),
        7: corners[::-1, ::-1].T,
        8: np.rot90(corners, -1),
    }[orientation]
    image = Image.fromarray(np.kron(stored, np.ones((16, 24), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {"quality": 100}))

    def middles(picture):
        width, height = picture.size
        return [[picture.getpixel((width * x // 4, height * y // 4))[0] for x in (1, 3)] for y in (1, 3)]

    assert np.abs(np.array(middles(decode(data, "row 0"))) - corners).max() <= 2
    assert np.abs(np.array(middles(decode(data, "row 0", exif=False))) - stored).max() <= 2
    assert decode(data, "row 0").size == ((48, 32) if orientation < 5 else (32, 48))


def test_tiff_is_upright_always():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (6, 4)), "TIFF", exif=exif)
    assert decode(data, "row 0").size == decode(data, "row 0", exif=False).size == (4, 6)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("header", [b"MM\0*\0\0\0\x08\xff\xff", b"no header"])
def test_damaged_exif_does_not_cost_the_image(header):
    data = flat("RGB", RED, "JPEG", exif=b"Exif\0\0" + header + b"\x01\x12" * 9)
    assert decode(data, "row 0").size == (6, 4)


def test_rgb_is_what_the_official_pipelines_read(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    for kind in ("JPEG", "PNG"):
        data = encoded(Image.fromarray(noise), kind)
        path = tmp_path / "x.bin"
        path.write_bytes(data)
        with Image.open(path) as image:
            plain = np.asarray(image.convert("RGB"))
        assert np.array_equal(np.asarray(decode(data, "x")), plain)
        assert np.array_equal(np.asarray(decode(str(path), "x")), plain)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "its header is none of JPEG, PNG"),
        (b"this is text", "its header is none of"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "its header is none of"),  # no program is started for it
        (flat("RGB", RED)[:30], ""),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900], "truncated"),
        (encoded(Image.effect_noise((64, 64), 50), "PNG")[:900], "truncated"),
        (encoded(Image.effect_noise((64, 64), 50), "GIF")[:900], "truncated"),
    ],
)
def test_damage_is_one_error_that_names_the_row(data, reason):
    with pytest.raises(BadRowError, match=r"^row 3 is no readable image \(.*\): replace or remove it$") as caught:
        decode(data, "row 3")
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BadRowError, match=r"file 'a.png' is no readable image \(.*No such file"):
        decode(str(tmp_path / "a.png"), "file 'a.png'")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_by_their_header(monkeypatch):
    def no_pixels(*_):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", no_pixels)
    small = png(9000, MAX_PIXELS // 9000 + 1, 1, 0, [])
    with pytest.raises(BadRowError, match=r"9000 x 9943 = 89,487,000 pixels, more than the limit of 89,478,485"):
        decode(small, "row 0")
    with pytest.raises(BadRowError, match=r"2500000000 pixels.* limit of 178956970 pixels"):  # PIL's own refusal
        decode(png(50000, 50000, 8, 2, []), "row 0")
    with pytest.raises(BadRowError, match="pixels were decoded"):
        decode(png(9000, MAX_PIXELS // 9000, 1, 0, []), "row 0")


def test_lack_of_memory_is_not_taken_for_damage(monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        decode(b"", "row 0")

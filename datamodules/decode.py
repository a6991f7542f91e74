"""Encoded images -> RGB by fixed rules: what grey, CMYK, palette, alpha, 16 bit, EXIF and damaged files become.

Grey, RGB and CMYK come out as in the official pipelines, which do `Image.open(file).convert("RGB")`. Where those lose
something we do not follow them:

| file | becomes | the official pipelines |
|---|---|---|
| alpha channel, transparent palette entry | composited over white | the colours that transparency hides |
| 16-bit grey (also 32-bit integers in 0..65535) | round(v / 257) | clipped at 255: nearly all white |
| 16-bit colour | high byte, PIL's rule | the same |
| EXIF orientation | upright (`exif=False`: as stored; TIFF is always upright) | as stored |
| several frames | the first | the same |
| floating point | refused: it has no fixed white | clipped |
| over `MAX_PIXELS` | refused by its header, before any pixel is decoded | a warning |
| truncated, empty, no image | refused | an error |

Refused is `BadRowError`, which names the row. Colour profiles are ignored, as in the official pipelines.
"""

import io

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

MAX_PIXELS = 2**30 // 12  # 89,478,485, from where PIL suspects a decompression bomb: a quarter GiB as RGB
# Only formats that are decoded in this process: PIL would hand others, such as EPS, to a program that it finds.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
UPRIGHT = {  # EXIF orientation -> how to turn the stored pixels
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadRowError(ValueError):
    """A row that cannot be used as it is: a damaged image, a caption or a label that is missing."""


def decode(data: bytes | str, name: str, *, exif: bool = True) -> Image.Image:
    """Encoded bytes or the path of a file -> RGB image, completely read. Raises BadRowError with `name`."""
    try:
        with Image.open(data if isinstance(data, str) else io.BytesIO(data), formats=FORMATS) as image:
            check_pixels(image)
            image.load()
            return to_rgb(upright(image) if exif else image)
    except MemoryError:
        raise  # the machine's trouble, not the file's
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, EOFError, ...
        raise BadRowError(f"{name} is no readable image ({_reason(error)}): replace or remove it") from error


def check_pixels(image: Image.Image) -> None:
    """Raises ValueError for an opened image, of which only the header has been read, of over `MAX_PIXELS`."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} = {width * height:,} pixels, more than the limit of {MAX_PIXELS:,}")


def upright(image: Image.Image) -> Image.Image:
    """Turns the pixels as the EXIF orientation says. An orientation that cannot be read counts as none."""
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged metadata, of whatever kind, in an image whose pixels are whole
        return image
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode -> RGB. Raises ValueError for values without a fixed range and for unknown modes."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep_grey(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{values.min()}..{values.max()} is no range of 8 or 16 bits, so which value is white?")
    grey = (values.astype(np.uint32) + 128) // 257  # rounds: 65535 = 255 * 257
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"its header is none of {', '.join(FORMATS)}"
    return str(error).split("\n")[0] or type(error).__name__

"""One coloured shape on a plain background: its attributes, its picture, its caption.

A picture of S x S pixels is a pure function of (seed, split, index, S): all draws come from one counter-based Philox
generator, and everything is float64 without a sine or cosine, so that pictures are the same bytes on every platform
and numpy. Shapes are signed distances, about 1 in radius, negative inside, with y pointing down. The order of the five
attributes is that of `ATTRIBUTES`, the ids are places in `NAMES`.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np

NAMES = {
    "shape": ("circle", "square", "triangle", "diamond", "cross", "ring", "star", "crescent"),
    "colour": ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"),
    "background": ("black", "gray", "white", "brown"),
    "size": ("small", "medium", "large"),
    "position": (
        *("top left", "top", "top right"),
        *("left", "center", "right"),
        *("bottom left", "bottom", "bottom right"),
    ),
}
ATTRIBUTES = tuple(NAMES)
SPLITS = {"train": 0, "val": 1, "test": 2}  # second word of the generator's key

# RGB before the jitter of +-COLOUR_JITTER
COLOURS = np.array(
    [
        *([220, 40, 40], [240, 140, 30], [240, 220, 50], [50, 180, 70]),
        *([60, 200, 210], [50, 80, 220], [150, 60, 190], [245, 140, 190]),
    ],
    dtype=np.float64,
)
BACKGROUNDS = np.array([[16, 16, 16], [120, 120, 120], [240, 240, 240], [95, 65, 40]], dtype=np.float64)
COLOUR_JITTER = 12
GRADIENT = 14.0  # largest change of the background from one edge to the opposite one
NOISE = 2.5  # standard deviation, in grey levels

# in units of the picture's side
RADII = (0.14, 0.20, 0.27)
RADIUS_JITTER = 0.08  # relative
FIRST_CENTRE, CENTRE_STEP, CENTRE_JITTER = 0.28, 0.22, 0.04
MAX_ANGLE = 0.2  # radians

PLACES = tuple("in the center" if name == "center" else f"at the {name}" for name in NAMES["position"])
TEMPLATES = (
    "a {size} {colour} {shape} {place} on a {background} background",
    "a {colour} {shape} on {background}",
    "{size} {colour} {shape}, {position}, {background} background",
    "a {background} picture with a {size} {colour} {shape} {place}",
)

_SIN36, _COS36, _SIN72, _COS72 = 0.5877852522924731, 0.8090169943749475, 0.9510565162951535, 0.30901699437494745
_OUTER, _INNER = 1.1, 0.495
_STAR = (
    *((0.0, -_OUTER), (_INNER * _SIN36, -_INNER * _COS36), (_OUTER * _SIN72, -_OUTER * _COS72)),
    *((_INNER * _SIN72, _INNER * _COS72), (_OUTER * _SIN36, _OUTER * _COS36), (0.0, _INNER)),
    *((-_OUTER * _SIN36, _OUTER * _COS36), (-_INNER * _SIN72, _INNER * _COS72)),
    *((-_OUTER * _SIN72, -_OUTER * _COS72), (-_INNER * _SIN36, -_INNER * _COS36)),
)
_TRIANGLE = ((0.0, -1.0), (0.95, 0.75), (-0.95, 0.75))


def render(index: int, size: int, *, seed: int = 0, split: str = "train") -> tuple[np.ndarray, tuple[int, ...]]:
    """Picture `index` of a split: uint8 (3, size, size), and its five attribute ids.

    Any index of 0 or more exists, so a split may have any length. `seed` is a word of 64 bits.
    """
    key = np.array([seed, SPLITS[split]], dtype=np.uint64)
    draw = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, index]))

    def spread() -> float:
        return 2 * draw.random() - 1

    # The order of the draws is the format: do not change it.
    ids = tuple(int(draw.integers(len(NAMES[name]))) for name in ATTRIBUTES)
    shape, colour, background, extent, position = ids
    radius = RADII[extent] * size * (1 + RADIUS_JITTER * spread())
    centre_x, centre_y = (
        (FIRST_CENTRE + CENTRE_STEP * step + CENTRE_JITTER * spread()) * size for step in (position % 3, position // 3)
    )
    angle = MAX_ANGLE * spread()
    front, back = (
        rgb + draw.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, 3) for rgb in (COLOURS[colour], BACKGROUNDS[background])
    )
    slope = GRADIENT * (2 * draw.random(2) - 1)
    noise = draw.normal(0, NOISE, (size, size, 1))

    cover = coverage(shape, size, centre_x=centre_x, centre_y=centre_y, radius=radius, angle=angle)[..., None]
    behind = _tilted(back, slope, size)
    pixels = np.clip(np.rint(behind * (1 - cover) + front * cover + noise), 0, 255)  # (size, size, 3)
    return pixels.astype(np.uint8).transpose(2, 0, 1), ids


def coverage(
    shape: int,
    size: int,
    *,
    centre_x: float | np.ndarray,
    centre_y: float | np.ndarray,
    radius: float | np.ndarray,
    angle: float | np.ndarray,
) -> np.ndarray:
    """How much of each pixel the shape covers, 0..1: (size, size) with soft edges of one pixel.

    Lengths are in pixels, the angle in radians. Arrays (n, 1, 1) in place of numbers give (n, size, size).
    """
    centres = np.arange(size) + 0.5
    x, y = (centres[None, :] - centre_x) / radius, (centres[:, None] - centre_y) / radius
    cos, sin = 1 - angle**2 / 2, angle - angle**3 / 6  # exact arithmetic, and near enough for small angles
    return np.clip(0.5 - _DISTANCES[shape](cos * x + sin * y, -sin * x + cos * y) * radius, 0, 1)


def caption(attributes: Sequence[int], template: int) -> str:
    """Caption of a picture by one of the four templates (index mod 4): ASCII, at most 66 characters."""
    words = {name: NAMES[name][value] for name, value in zip(ATTRIBUTES, attributes, strict=True)}
    return TEMPLATES[template].format(**words, place=PLACES[attributes[ATTRIBUTES.index("position")]])


def parse_caption(text: str) -> dict[str, int]:
    """Ids of the attributes that a caption names; the second template leaves size and position open.

    Raises ValueError for a text that `caption` does not write.
    """
    for pattern in _PATTERNS:
        if match := pattern.fullmatch(text):
            words = match.groupdict()
            if place := words.pop("place", None):
                words["position"] = NAMES["position"][PLACES.index(place)]
            return {name: NAMES[name].index(words[name]) for name in ATTRIBUTES if name in words}
    raise ValueError(f"'{text}' is no caption of the shapes: write it like '{caption((0, 0, 2, 0, 3), 0)}'")


def _tilted(colour: np.ndarray, slope: np.ndarray, size: int) -> np.ndarray:
    """(size, size, 3): `colour` in the middle, changing by slope (x, y) over the whole side, alike in R, G and B."""
    along = (np.arange(size) + 0.5) / size - 0.5
    return colour + (along[None, :] * slope[0] + along[:, None] * slope[1])[..., None]


def _norm(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y)  # np.hypot calls the platform's library


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _polygon(x: np.ndarray, y: np.ndarray, corners: Sequence[tuple[float, float]]) -> np.ndarray:
    """Exact distance to the edges; inside by the even-odd rule."""
    nearest = np.full(x.shape, np.inf)  # squared
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        edge_x, edge_y, to_x, to_y = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((to_x * edge_x + to_y * edge_y) / (edge_x * edge_x + edge_y * edge_y), 0, 1)
        off_x, off_y = to_x - edge_x * along, to_y - edge_y * along
        nearest = np.minimum(nearest, off_x * off_x + off_y * off_y)
        if edge_y:  # a ray to the right never crosses a horizontal edge
            inside ^= ((ay > y) != (by > y)) & (x < edge_x * to_y / edge_y + ax)
    return np.where(inside, -np.sqrt(nearest), np.sqrt(nearest))


_DISTANCES: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], ...] = (  # in the order of NAMES["shape"]
    lambda x, y: _norm(x, y) - 0.9,
    lambda x, y: _box(x, y, 0.8, 0.8),
    lambda x, y: _polygon(x, y, _TRIANGLE),
    lambda x, y: 0.70710678 * (np.abs(x) + np.abs(y) - 1.05),
    lambda x, y: np.minimum(_box(x, y, 0.95, 0.3), _box(x, y, 0.3, 0.95)),
    lambda x, y: np.abs(_norm(x, y) - 0.72) - 0.22,
    lambda x, y: _polygon(x, y, _STAR),
    lambda x, y: np.maximum(_norm(x, y) - 0.95, 0.75 - _norm(x - 0.45, y + 0.05)),
)


def _pattern(template: str) -> re.Pattern[str]:
    words = {**NAMES, "place": PLACES}
    return re.compile(template.format(**{name: f"(?P<{name}>{'|'.join(values)})" for name, values in words.items()}))


_PATTERNS = tuple(_pattern(template) for template in TEMPLATES)

"""Seeded images of one emoji over a background. Splits use disjoint sets of compositions."""

import functools
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from spavl_lib.data.embedded.world import ASSETS

COLOURS = {
    "white": (244, 244, 240),
    "grey": (150, 152, 156),
    "black": (38, 38, 44),
    "red": (196, 62, 58),
    "orange": (236, 146, 58),
    "yellow": (240, 214, 92),
    "green": (92, 160, 92),
    "blue": (76, 120, 196),
    "purple": (134, 92, 168),
    "pink": (238, 166, 188),
    "brown": (124, 88, 62),
    "teal": (64, 152, 154),
}
PATTERNS = ("plain", "fade", "dots")
SCALES = (0.62, 0.72, 0.82, 0.92)  # side of the emoji divided by the short side of the canvas
PLACEMENTS = tuple((x, y) for y in (0.0, 0.5, 1.0) for x in (0.0, 0.5, 1.0))
CANVASES = ((64, 64), (64, 64), (76, 64), (64, 76))  # (width, height) px; half are not square
# Share of the compositions that each split gets. The splits' compositions are disjoint, so splits
# have no image in common.
SPLIT_SHARES = {
    "pretrain": 0.44, "development": 0.06, "train": 0.25, "validation": 0.1, "test": 0.15,
}  # fmt: skip


@dataclass(frozen=True)
class Composition:
    """How an image shows a concept: background colour and pattern, size, place."""

    colour: str
    pattern: str
    scale: float
    placement: tuple[float, float]


@functools.cache
def compositions(split: str) -> tuple[Composition, ...]:
    """All compositions of one split, from a seeded partition of all combinations.

    Raises:
        KeyError: `split` is not a key of `SPLIT_SHARES`.
    """
    everything = [
        Composition(c, p, s, xy) for c in COLOURS for p in PATTERNS for s in SCALES
        for xy in PLACEMENTS
    ]  # fmt: skip
    random.Random("compositions").shuffle(everything)
    start = 0
    for name, share in SPLIT_SHARES.items():
        size = round(share * len(everything))
        if name == split:
            return tuple(everything[start : start + size])
        start += size
    raise KeyError(split)


@functools.cache
def _drawing(concept: str, drawing: str, side: int, flip: bool) -> Image.Image:
    emoji = Image.open(ASSETS / drawing / f"{concept}.png").convert("RGBA")
    emoji = emoji.resize((side, side), Image.Resampling.LANCZOS)
    return emoji.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else emoji


@functools.cache
def background(colour: str, pattern: str, canvas: tuple[int, int]) -> Image.Image:
    """A background. The image is shared, so do not change it.

    Args:
        colour: Key of `COLOURS`.
        pattern: One of `PATTERNS`.
        canvas: Width and height in pixels.
    """
    base = COLOURS[colour]
    second = tuple(int(0.72 * v + (0 if sum(base) > 300 else 60)) for v in base)
    image = Image.new("RGB", canvas, base)
    draw = ImageDraw.Draw(image)
    width, height = canvas
    if pattern == "fade":
        for y in range(height):
            part = y / (height - 1)
            shade = tuple(int(a + part * (b - a)) for a, b in zip(base, second, strict=True))
            draw.line([(0, y), (width, y)], fill=shade)
    elif pattern == "dots":
        for y in range(4, height, 12):
            for x in range(4 + (y // 12) % 2 * 6, width, 12):
                draw.ellipse([x - 1, y - 1, x + 1, y + 1], fill=second)
    return image


def render(
    concept: str,
    composition: Composition,
    canvas: tuple[int, int] = CANVASES[0],
    *,
    flip: bool = False,
    drawing: str = "noto",
    jitter: tuple[int, int] = (0, 0),
) -> Image.Image:
    """Draw one scene.

    Args:
        concept: Key of a concept in `world.yaml`.
        composition: Background, size and place.
        canvas: Width and height in pixels.
        flip: Mirror the emoji left to right.
        drawing: Style of the drawing: `noto`, a key of `drawings.yaml`, or `twemoji`, which no
            model is trained on.
        jitter: Shift in pixels; the emoji stays inside the canvas.

    Returns:
        RGB image of size `canvas`.
    """
    width, height = canvas
    side = round(composition.scale * min(canvas))
    x = round(composition.placement[0] * (width - side)) + jitter[0]
    y = round(composition.placement[1] * (height - side)) + jitter[1]
    corner = (min(max(x, 0), width - side), min(max(y, 0), height - side))
    image = background(composition.colour, composition.pattern, canvas).copy()
    emoji = _drawing(concept, drawing, side, flip)
    image.paste(emoji, corner, emoji)
    return image

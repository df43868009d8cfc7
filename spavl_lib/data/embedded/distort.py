"""Random changes of drawings: colours, outlines, shape and place.

The vision tower trains on changed drawings so that it learns the shape of a thing and not the
pixels of one drawing. All functions take drawings as (batch, 4, height, width), with red, green,
blue and opacity in [0, 1], and a generator that decides everything.
"""

import functools
import math

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional as F

from spavl_lib.data.embedded import scenes
from spavl_lib.data.embedded.drawings import SIDE
from spavl_lib.data.embedded.world import ASSETS

# Rows: brightness, and the two axes of colour (YIQ of the NTSC standard). A rotation in the plane
# of the last two changes the hue and leaves the brightness.
_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_RGB = torch.linalg.inv(_YIQ)


@functools.cache
def drawing_tensor(concept: str, style: str) -> Tensor:
    """A drawing as (4, 64, 64) in [0, 1]."""
    image = Image.open(ASSETS / style / f"{concept}.png").convert("RGBA")
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


@functools.cache
def background_tensor(colour: str, pattern: str) -> Tensor:
    """A background as (3, 64, 64) in [0, 1]."""
    image = scenes.background(colour, pattern, (SIDE, SIDE))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


class _Dice:
    """Draws one random value for each drawing of a batch."""

    def __init__(self, size: int, generator: Generator):
        self.size, self.generator = size, generator

    def between(self, low: float, high: float) -> Tensor:
        """Uniform values, (batch, 1, 1)."""
        return torch.empty(self.size, 1, 1).uniform_(low, high, generator=self.generator)

    def chance(self, share: float) -> Tensor:
        """True with probability `share`, (batch, 1, 1)."""
        return torch.rand(self.size, 1, 1, generator=self.generator) < share


def recolour(drawings: Tensor, generator: Generator) -> Tensor:
    """Change hue, saturation, contrast and brightness; some lose their colour or are inverted.

    Three in ten are reduced to two to five levels of each colour, and three in ten are blurred.
    """
    dice = _Dice(len(drawings), generator)
    colours, opacity = drawings[:, :3], drawings[:, 3:]
    bright, first, second = torch.einsum("ij,bjhw->bihw", _YIQ, colours).unbind(1)
    turn = torch.where(dice.chance(0.6), dice.between(-math.pi, math.pi), dice.between(-0.3, 0.3))
    saturation = torch.where(dice.chance(0.15), torch.zeros(1), dice.between(0.4, 1.6))
    cos, sin = turn.cos() * saturation, turn.sin() * saturation
    bright = (bright - 0.5) * dice.between(0.6, 1.5) + 0.5 + dice.between(-0.15, 0.15)
    bright = torch.where(dice.chance(0.08), 1 - bright, bright)
    yiq = torch.stack([bright, cos * first - sin * second, sin * first + cos * second], 1)
    colours = torch.einsum("ij,bjhw->bihw", _RGB, yiq).clamp(0, 1)
    levels = dice.between(2, 6).floor()[:, None]
    colours = torch.where(dice.chance(0.3)[:, None], (colours * levels).round() / levels, colours)
    blurred = F.avg_pool2d(F.pad(colours, (2, 2, 2, 2), mode="replicate"), 5, 1)
    colours = torch.where(dice.chance(0.3)[:, None], blurred, colours)
    return torch.cat([colours, opacity], 1)


def outline(drawings: Tensor, generator: Generator) -> Tensor:
    """Draw a dark or light line around three in ten drawings, and inside one in seven."""
    dice = _Dice(len(drawings), generator)
    colours, opacity = drawings[:, :3], drawings[:, 3:]
    line = torch.where(dice.chance(0.7), dice.between(0, 0.2), dice.between(0.8, 1))[:, None]
    wider = F.max_pool2d(opacity, 5, 1, 2)
    framed = (colours * opacity + line * (wider - opacity)) / wider.clamp(min=1e-3)
    around = dice.chance(0.3)[:, None]
    colours = torch.where(around, framed, colours)
    bright = colours.mean(1, keepdim=True)
    steps = F.pad(bright.diff(dim=-1).abs(), (0, 1)) + F.pad(
        bright.diff(dim=-2).abs(), (0, 0, 0, 1)
    )
    edges = (4 * steps).clamp(0, 1)
    colours = torch.where(dice.chance(0.15)[:, None], colours * (1 - edges) + line * edges, colours)
    return torch.cat([colours, torch.where(around, wider, opacity)], 1)


def place(drawings: Tensor, generator: Generator) -> Tensor:
    """Turn, shear, stretch, mirror and shrink each drawing, and put it somewhere on its canvas.

    Returns:
        (batch, 4, height, width); the colours are multiplied by the opacity.
    """
    dice = _Dice(len(drawings), generator)
    angle = torch.where(dice.chance(0.7), dice.between(-0.45, 0.45), torch.zeros(1))  # radians
    scale, aspect = dice.between(0.5, 1), dice.between(0.8, 1.25).sqrt()
    shear = dice.between(-0.2, 0.2)
    mirror = torch.where(dice.chance(0.5), -1.0, 1.0)
    wide, high = mirror / (scale * aspect), aspect / scale
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.cat(
        [
            torch.cat([wide * (cos + shear * sin), wide * (sin - shear * cos)], 2),
            torch.cat([-high * sin, high * cos], 2),
        ],
        1,
    )  # (batch, 2, 2), from places on the canvas to places in the drawing
    room = 1 - scale
    shift = torch.cat([dice.between(-1, 1) * room, dice.between(-1, 1) * room], 1)
    affine = torch.cat([matrix, -matrix @ shift], 2)
    faded = torch.cat([drawings[:, :3] * drawings[:, 3:], drawings[:, 3:]], 1)
    grid = F.affine_grid(affine, list(faded.shape), align_corners=False)
    return F.grid_sample(faded, grid, align_corners=False)


def distort(drawings: Tensor, backgrounds: Tensor, generator: Generator) -> Tensor:
    """Change drawings, and lay them over backgrounds with a little noise.

    Args:
        drawings: (batch, 4, height, width) in [0, 1].
        backgrounds: (batch, 3, height, width) in [0, 1].
        generator: Decides every change.

    Returns:
        Images (batch, 3, height, width) in [0, 1].
    """
    drawings = place(outline(recolour(drawings, generator), generator), generator)
    images = backgrounds * (1 - drawings[:, 3:]) + drawings[:, :3]
    dice = _Dice(len(drawings), generator)
    noise = torch.randn(images.shape, generator=generator) * dice.between(0, 0.06)[:, None]
    return (images + noise).clamp(0, 1)


def distorted_image(
    concept: str, style: str, composition: scenes.Composition, seed: int
) -> Image.Image:
    """A scene of 64 x 64 px whose drawing is changed at random.

    Args:
        concept: Key of a concept in `world.yaml`.
        style: Style of the drawing.
        composition: The background. Size and place are drawn anew.
        seed: Decides every change.
    """
    shown, behind = (
        drawing_tensor(concept, style),
        background_tensor(composition.colour, composition.pattern),
    )
    [image] = distort(shown[None], behind[None], torch.Generator().manual_seed(seed))
    return Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy())

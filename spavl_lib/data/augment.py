"""Pictures moved a little while training, so that a model learns the thing and not its pixels."""

import random

import torch
from torch import Tensor

from spavl_lib.errors import InputError


def moved_pictures(pixels: Tensor, seeds: list[str], *, shift_px: int, mirror: bool) -> Tensor:
    """Each picture shifted by up to `shift_px` either way, its border repeated, and maybe mirrored.

    Args:
        pixels: (pictures, channels, height, width).
        seeds: One a picture; all that its movement depends on, so that a resumed run repeats it.
        shift_px: Largest shift, in pixels of the model's input.
        mirror: Mirror half of them. Not for pictures with writing.

    Raises:
        InputError: The family gives its pictures in another form (tiles, patches).
    """
    if pixels.ndim != 4 or len(pixels) != len(seeds):
        raise InputError(
            f"reward.shift_px and reward.mirror want one plain picture a row, got pixels of shape "
            f"{tuple(pixels.shape)} for {len(seeds)} rows; set them to 0 and false"
        )
    height, width = pixels.shape[-2:]
    padded = torch.nn.functional.pad(pixels, (shift_px,) * 4, mode="replicate")
    moved = []
    for picture, seed in zip(padded, seeds, strict=True):
        rng = random.Random(seed)
        y, x = rng.randint(0, 2 * shift_px), rng.randint(0, 2 * shift_px)
        picture = picture[:, y : y + height, x : x + width]
        moved.append(picture.flip(-1) if mirror and rng.random() < 0.5 else picture)
    return torch.stack(moved)

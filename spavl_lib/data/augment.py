"""Shift and mirror training images, so that a model does not memorise pixels."""

import random

import torch
from torch import Tensor

from spavl_lib.errors import InputError


def moved_images(pixels: Tensor, seeds: list[str], *, shift_px: int, mirror: bool) -> Tensor:
    """Shift each image by up to `shift_px` in each direction, and mirror some images.

    The border of an image is repeated where a shift leaves pixels empty.

    Args:
        pixels: (images, channels, height, width).
        seeds: One seed per image. The change of an image depends only on its seed, so a resumed run
            repeats the change.
        shift_px: Largest shift, in pixels of the model's input.
        mirror: Whether to mirror each image with probability 1/2. Set it to False for images with
            writing.

    Returns:
        The changed images, (images, channels, height, width).

    Raises:
        InputError: The model family's images have another form, such as tiles or patches.
    """
    if pixels.ndim != 4 or len(pixels) != len(seeds):
        raise InputError(
            "reward.shift_px and reward.mirror need one image per row without tiles, but "
            f"pixel_values has shape {tuple(pixels.shape)} for {len(seeds)} rows; set them to 0 "
            "and false"
        )
    height, width = pixels.shape[-2:]
    padded = torch.nn.functional.pad(pixels, (shift_px,) * 4, mode="replicate")
    moved = []
    for image, seed in zip(padded, seeds, strict=True):
        rng = random.Random(seed)
        y, x = rng.randint(0, 2 * shift_px), rng.randint(0, 2 * shift_px)
        image = image[:, y : y + height, x : x + width]
        moved.append(image.flip(-1) if mirror and rng.random() < 0.5 else image)
    return torch.stack(moved)

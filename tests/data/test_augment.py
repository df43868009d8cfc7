"""Moved pictures: by the seed alone, within bounds, and no other content."""

import pytest
import torch

from spavl_lib.data.augment import moved_images
from spavl_lib.errors import InputError


def test_a_picture_moves_by_its_seed_alone() -> None:
    pixels = torch.arange(2 * 1 * 6 * 6, dtype=torch.float32).reshape(2, 1, 6, 6)
    moved = moved_images(pixels, ["a", "b"], shift_px=2, mirror=True)
    alone = moved_images(pixels[1:], ["b"], shift_px=2, mirror=True)
    assert torch.equal(moved[1:], alone)
    many = [moved_images(pixels[:1], [str(i)], shift_px=2, mirror=True) for i in range(60)]
    assert len({tuple(m.flatten().tolist()) for m in many}) > 25  # of 50 ways
    centres = {m[0, 0, 2, 2].item() for m in many}
    assert centres <= set(pixels[0].flatten().tolist())
    assert torch.equal(moved_images(pixels, ["a", "b"], shift_px=0, mirror=False), pixels)


def test_other_forms_of_pictures_are_refused() -> None:
    with pytest.raises(InputError, match="need one image per row"):
        moved_images(torch.zeros(2, 3, 3, 4, 4), ["a", "b"], shift_px=1, mirror=False)

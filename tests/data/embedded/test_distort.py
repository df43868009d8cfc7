"""Random changes of drawings: seeded, in range, and each of its own kind."""

import pytest
import torch

from spavl_lib.data.embedded.distort import distort, outline, place, recolour


def drawing(size: int = 32) -> torch.Tensor:
    """A red square with a dark stripe, on a transparent canvas, many times."""
    one = torch.zeros(4, 64, 64)
    one[0, 16:48, 20:44], one[3, 16:48, 20:44] = 0.9, 1.0
    one[:3, 30:34, 20:44] = 0.1
    return one.expand(size, -1, -1, -1).clone()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_seed_decides_everything() -> None:
    behind = torch.full((32, 3, 64, 64), 0.5)
    first, again = (distort(drawing(), behind, seeded()) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, distort(drawing(), behind, seeded(1)))
    assert first.shape == (32, 3, 64, 64) and 0 <= first.min() and first.max() <= 1
    assert len({tuple(image.flatten()[::97].tolist()) for image in first}) == 32


def test_colours_change_and_the_shape_does_not() -> None:
    changed = recolour(drawing(), seeded())
    assert torch.equal(changed[:, 3], drawing()[:, 3])
    assert 0 <= changed.min() and changed.max() <= 1
    middle = changed[:, :3, 22, 30]
    assert middle.std(0).min() > 0.05  # all three colours vary
    grey = (middle.amax(1) - middle.amin(1)) < 0.02
    assert 0 < grey.sum() < 16


def test_outlines_widen_some_drawings() -> None:
    changed = outline(drawing(200), seeded())
    wider = changed[:, 3].sum((1, 2)) > drawing(1)[0, 3].sum()
    assert 0.2 < wider.float().mean() < 0.4
    assert torch.equal(changed[~wider][:, 3], drawing(int((~wider).sum()))[:, 3])
    assert torch.isfinite(changed).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_drawings_stay_on_the_canvas(seed: int) -> None:
    opacity = place(drawing(100), seeded(seed))[:, 3]
    area = opacity.sum((1, 2)) / drawing(1)[0, 3].sum()
    assert 0.15 < area.min() and area.max() < 1.35
    rows, columns = (opacity.amax(axis) > 0.5 for axis in (2, 1))
    middles = [
        (torch.arange(64) * line).sum(1) / line.sum(1).clamp(min=1) for line in (rows, columns)
    ]
    assert all(middle.std() > 3 for middle in middles)  # px; they move both ways


def test_colours_are_multiplied_by_the_opacity() -> None:
    placed = place(drawing(50), seeded())
    assert (placed[:, :3] <= placed[:, 3:] + 1e-5).all()

"""Pictures: the same recipe gives the same bytes, nothing is cut off, splits share nothing."""

import itertools

import numpy as np
import pytest

from spavl_lib.data.embedded import scenes
from spavl_lib.data.embedded.scenes import Composition, compositions, render
from spavl_lib.data.images import png_bytes

PLAIN = Composition("blue", "plain", 0.62, (0.5, 0.5))
SIZES = {"pretrain": 570, "development": 78, "train": 324, "validation": 130, "test": 194}


def test_compositions_are_a_partition() -> None:
    everything = {
        (c, p, s, xy) for c in scenes.COLOURS for p in scenes.PATTERNS for s in scenes.SCALES
        for xy in scenes.PLACEMENTS
    }  # fmt: skip
    parts = {name: set(compositions(name)) for name in SIZES}
    assert {name: len(part) for name, part in parts.items()} == SIZES
    for first, second in itertools.combinations(parts.values(), 2):
        assert not first & second
    union = set().union(*parts.values())
    assert {(c.colour, c.pattern, c.scale, c.placement) for c in union} == everything


def test_every_split_shows_every_colour_pattern_size_and_place() -> None:
    for name in SIZES:
        part = compositions(name)
        assert {c.colour for c in part} == set(scenes.COLOURS), name
        assert {c.pattern for c in part} == set(scenes.PATTERNS), name
        assert {c.scale for c in part} == set(scenes.SCALES), name
        assert {c.placement for c in part} == set(scenes.PLACEMENTS), name


def test_unknown_split_is_an_error() -> None:
    with pytest.raises(KeyError):
        compositions("dev")


@pytest.mark.parametrize("canvas", sorted(set(scenes.CANVASES)))
def test_rendering_is_repeatable_and_of_the_asked_size(canvas: tuple[int, int]) -> None:
    first, second = (render("cat", PLAIN, canvas) for _ in range(2))
    assert first.size == canvas and first.mode == "RGB"
    assert png_bytes(first) == png_bytes(second)


def test_a_plain_background_has_exactly_its_colour() -> None:
    pixels = np.asarray(render("cat", PLAIN))
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert tuple(pixels[corner]) == scenes.COLOURS["blue"]


def test_mirror_drawing_and_concept_each_change_the_picture() -> None:
    pictures = [
        render("axe", PLAIN),
        render("axe", PLAIN, flip=True),
        render("axe", PLAIN, drawing="twemoji"),
        render("dagger", PLAIN),
    ]
    assert len({png_bytes(p) for p in pictures}) == 4
    mirrored = np.asarray(pictures[1])[:, ::-1]
    # The centred drawing is mirrored in place, up to one column of rounding.
    original = np.asarray(pictures[0]).astype(int)
    differences = [np.abs(np.roll(mirrored, s, 1) - original).mean() for s in (-1, 0, 1)]
    assert min(differences) < 0.5 < np.abs(np.asarray(pictures[1]) - original).mean()


@pytest.mark.parametrize("placement", [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
def test_the_thing_is_never_cut_off(placement: tuple[float, float]) -> None:
    """Moved to a corner, and pushed further by a jitter, it covers as much as in the middle."""

    def covered(composition: Composition, **options: object) -> int:
        pixels = np.asarray(render("drum", composition, (76, 64), **options)).astype(int)
        return int((np.abs(pixels - scenes.COLOURS["blue"]).sum(-1) > 12).sum())

    middle = covered(Composition("blue", "plain", 0.92, (0.5, 0.5)))
    assert middle > 500
    corner = Composition("blue", "plain", 0.92, placement)
    shift = tuple(50 if p else -50 for p in placement)
    assert covered(corner) == covered(corner, jitter=shift) == middle

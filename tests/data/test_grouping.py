"""Rows grouped by image: every row once, seeded, whole groups where they fit."""

import pytest

from spavl_lib.data.grouping import ImageGroupedSampler, image_groups
from tests.helpers import mini_rows

NAMES = [f"image_{i // 3}" for i in range(31)] + ["", "", "image_0"]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 6, 50])
def test_every_row_once_an_epoch_by_seed_and_epoch(batch_size: int) -> None:
    sampler = ImageGroupedSampler(NAMES, batch_size, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(len(NAMES))) and len(sampler) == len(NAMES)
    assert list(sampler) == first == list(ImageGroupedSampler(NAMES, batch_size, seed=3))
    sampler.set_epoch(1)
    assert sorted(sampler) == sorted(first) and list(sampler) != first
    assert list(ImageGroupedSampler(NAMES, batch_size, seed=4)) != first


def test_whole_images_where_they_fit() -> None:
    rows = mini_rows()
    names = rows["image_name"]
    order = list(ImageGroupedSampler(names, 12, seed=0))
    batches = [order[i : i + 12] for i in range(0, len(order), 12)]
    assert {len({names[i] for i in batch}) for batch in batches} == {4}
    assert order != sorted(order)


def test_rows_without_a_name_stand_alone() -> None:
    assert image_groups(["", "a", "", "a"]) == [[0], [1, 3], [2]]

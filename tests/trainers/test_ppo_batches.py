"""Batches of PPO: every row once, rows of one image together, another order for another seed."""

from itertools import chain

import pytest

from spavl_lib.trainers import ppo_batches

IMAGES = ["a", "a", "a", "b", "b", "c", "c", "d", "", ""]


def test_rows_of_one_image_stay_in_one_minibatch_if_asked() -> None:
    for seed in range(5):
        parts = ppo_batches.minibatches(IMAGES, 3, seed, by_image=True)
        assert len(parts) == 3 and sorted(chain(*parts)) == list(range(10))
        for image in "abcd":
            rows = {n for n, name in enumerate(IMAGES) if name == image}
            assert sum(bool(rows & set(part)) for part in parts) == 1
    split = ppo_batches.minibatches(IMAGES, 5, 0, by_image=False)
    assert [len(part) for part in split] == [2] * 5
    assert max(len({IMAGES[n] for n in part}) for part in split) == 2


def test_fewer_images_than_minibatches_are_split() -> None:
    parts = ppo_batches.minibatches(["a"] * 4 + ["b"] * 2, 3, 0, by_image=True)
    assert [len(part) for part in parts] == [2, 2, 2]
    assert sorted(chain(*parts)) == list(range(6))
    together = ppo_batches.minibatches(["a"] * 4 + ["b"] * 2, 2, 0, by_image=True)
    assert sorted(map(sorted, together)) == [[0, 1, 2, 3], [4, 5]]


def test_another_seed_gives_another_order() -> None:
    orders = [ppo_batches.minibatches(IMAGES, 3, seed, by_image=True) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("by_image", [True, False])
def test_prompts_come_once_in_each_pass_over_the_rows(by_image: bool) -> None:
    steps = [ppo_batches.rollout_rows(IMAGES, step, 4, 7, by_image=by_image) for step in range(5)]
    rows = list(chain(*steps))
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]
    if by_image:
        places = [IMAGES[n] for n in rows[:10] if IMAGES[n]]
        assert len([n for n in range(1, len(places)) if places[n] != places[n - 1]]) == 3
    assert ppo_batches.rollout_rows(IMAGES, 0, 4, 8, by_image=by_image) != steps[0]


def test_long_rows_come_first_and_equal_images_are_adjacent() -> None:
    batches = ppo_batches.micro_batches([1, 9, 3, 9, 5], ["a", "b", "a", "", "b"], 2)
    assert batches == [[1, 4], [3, 2], [0]]

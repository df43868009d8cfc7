"""The tree against brute force: every row comes back, and sees exactly its own beginning."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from spavl_lib.modelling.speed.prefix_attention import mask_function
from spavl_lib.modelling.speed.prefix_tree import build_tree

# Few different keys, so that rows have long common beginnings.
ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=7)


@given(ROWS, st.integers(1, 5))
def test_a_token_sees_its_own_rows_beginning_and_nothing_else(
    rows: list[list[int]], min_shared: int
) -> None:
    arrays = [np.array(r) for r in rows]
    tree = build_tree(arrays, min_shared)
    packed = np.array([arrays[r][o] for r, o in tree.sources])
    allowed = tree.allowed().numpy()
    for row, places in zip(rows, tree.places, strict=True):
        assert packed[places].tolist() == row
        assert tree.positions[places].tolist() == list(range(len(row)))
        for n, place in enumerate(places):
            assert np.flatnonzero(allowed[place]).tolist() == sorted(places[: n + 1].tolist())
    used = np.unique(np.concatenate(tree.places))
    assert used.tolist() == list(range(tree.size))  # nothing is run that no row needs
    assert tree.scored_pairs() == allowed.sum()
    where = torch.arange(tree.size)
    flex = mask_function(tree, torch.device("cpu"))(None, None, where[:, None], where[None])
    assert torch.equal(flex, torch.from_numpy(allowed))


@given(ROWS)
def test_nothing_common_is_run_twice(rows: list[list[int]]) -> None:
    """With segments of any length there are as many tokens as different beginnings."""
    tree = build_tree([np.array(r) for r in rows], min_shared=1)
    assert tree.size == len({tuple(r[: n + 1]) for r in rows for n in range(len(r))})


def test_short_common_runs_stand_in_every_branch() -> None:
    rows = [np.array([1, 2, 3, *tail]) for tail in ([4], [5, 6])]
    assert build_tree(rows, min_shared=3).size == 6
    assert build_tree(rows, min_shared=4).size == 9
    twins = [np.array([1, 2]), np.array([1, 2])]
    assert build_tree(twins, min_shared=9).size == 2  # equal to the end: no segment is added


def test_three_questions_of_one_image_are_the_tree_of_the_sizing() -> None:
    """LLaVA-1.5 lengths: 4,206 tokens in rows, 1,221 as a tree."""
    rows = []
    for question in range(3):
        for answer, length in ((0, 100), (1, 80)):
            tail = np.full(length, 1000 + 10 * question + answer)
            rows.append(np.concatenate([np.full(576, 7), np.full(35, 100 + question), tail]))
    tree = build_tree(rows)
    assert (tree.rows_size, tree.size) == (4206, 1221)
    assert len(tree.segments) == 10

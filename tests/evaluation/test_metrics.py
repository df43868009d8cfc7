"""Metrics of a reward model, against their formulas."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spavl_lib.evaluation.metrics import spearman


@given(st.permutations(range(20)))
def test_spearman_without_ties_is_the_formula(ranks: list[int]) -> None:
    squares = sum((i - rank) ** 2 for i, rank in enumerate(ranks))
    expected = 1 - 6 * squares / (20 * (20**2 - 1))
    assert spearman(range(20), ranks) == pytest.approx(expected, rel=0, abs=1e-12)


def test_spearman_gives_equal_values_their_mean_rank() -> None:
    expected = np.corrcoef([1.5, 1.5, 3, 4], [4, 2.5, 2.5, 1])[0, 1]
    assert spearman([0, 0, 1, 2], [9, 5, 5, -1]) == pytest.approx(expected, rel=0, abs=1e-12)


def test_spearman_of_a_constant_is_missing() -> None:
    assert spearman([1, 1, 1], [1, 2, 3]) is None

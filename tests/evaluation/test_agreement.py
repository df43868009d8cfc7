"""Agreement of judges and raters: against counts worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spavl_lib.evaluation.agreement import judge_agreement, kappa
from spavl_lib.evaluation.rates import wilson


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc")), min_size=1))
def test_kappa_is_the_formula(pairs: list[tuple[str, str]]) -> None:
    n = len(pairs)
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    observed = sum(a == b for a, b in pairs) / n
    chance = sum(first.count(x) * second.count(x) for x in "abc") / n**2
    found = kappa(first, second)
    if chance == 1:
        assert found is None
    else:
        assert found == pytest.approx((observed - chance) / (1 - chance), abs=1e-9)
        assert found == pytest.approx(kappa(second, first), abs=1e-9)


def test_kappa_of_no_rows_and_of_other_lengths() -> None:
    assert kappa([], []) is None
    with pytest.raises(ValueError, match="2 and 1"):
        kappa([1, 2], [1])


def test_a_judge_against_people() -> None:
    verdicts = [True, True, False, False, False, None, True]
    labels = [True, False, True, False, False, True, True]
    found = judge_agreement(verdicts, labels)
    counts = (found.true_positives, found.false_positives)
    assert counts == (2, 1) and (found.false_negatives, found.true_negatives) == (1, 2)
    assert found.n == 6 and found.unjudged == 1
    assert found.precision and found.precision.value == pytest.approx(2 / 3)
    assert found.recall and found.recall.ends == wilson(2, 3)
    assert found.kappa == pytest.approx(1 / 3)
    assert found.to_dict()["recall"]["k"] == 2
    with pytest.raises(ValueError, match="one label per verdict"):
        judge_agreement([True], [])


def test_a_judge_that_never_says_yes_has_no_precision() -> None:
    found = judge_agreement([False, False], [True, False])
    assert found.precision is None and found.recall and found.recall.value == 0
    assert found.kappa == 0

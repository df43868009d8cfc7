"""Metrics of a reward model on pairs counted by hand."""

import math

import pytest

from spavl_lib.evaluation.metrics import (
    calibration,
    expected_calibration_error,
    pair_of_pairs_accuracy,
    reward_metrics,
)


def scored(
    margin: float, *, id: str = "r", class3: str = "", question_type: str = "", words: int = 0
) -> dict:
    """A pair whose chosen answer scores `margin` more and has `words` more words."""
    return {
        "id": id, "class1": class3[:1], "class2": "", "class3": class3,
        "question_type": question_type, "chosen_score": 1.0 + margin, "rejected_score": 1.0,
        "chosen_words": 5 + words, "rejected_words": 5,
    }  # fmt: skip


def sigmoid(margin: float) -> float:
    return 1 / (1 + math.exp(-margin))


def test_calibration_bins_certainty_and_counts_what_is_right() -> None:
    table = calibration([0.1, -0.1, 10.0, -3.0], bins=2)
    low, high = sigmoid(0.1), (sigmoid(10.0) + sigmoid(3.0)) / 2
    assert [row["n"] for row in table] == [2, 2]
    assert [row["right"] for row in table] == [0.5, 0.5]
    assert [row["certainty"] for row in table] == pytest.approx([low, high])
    expected = (2 * abs(low - 0.5) + 2 * abs(high - 0.5)) / 4
    assert expected_calibration_error([0.1, -0.1, 10.0, -3.0], bins=2) == pytest.approx(expected)


def test_certainty_stays_a_number_and_in_the_last_bin() -> None:
    (row,) = calibration([1e6, -1e6])
    assert row == {"n": 2, "certainty": 1.0, "right": 0.5}
    assert [row["n"] for row in calibration([0.0, 0.15, 50.0], bins=10)] == [2, 1]
    assert [row["n"] for row in calibration([4.0, 800.0], bins=10)] == [2]  # certainty 0.98 and 1


def test_a_margin_of_zero_is_half_certain_and_wrong() -> None:
    assert calibration([0.0]) == [{"n": 1, "certainty": 0.5, "right": 0.0}]


@pytest.mark.parametrize(
    ("margins", "k"),
    [((1, 1), 1), ((1, -1), 0), ((-1, 1), 0), ((-1, -1), 0), ((1, 0), 0), ((1, 1, 1, -1), 1)],
    ids=str,
)
def test_twins_count_only_if_both_are_right(margins: tuple[float, ...], k: int) -> None:
    rate = pair_of_pairs_accuracy([scored(m) for m in margins])
    assert (rate["k"], rate["n"]) == (k, len(margins) // 2)


def test_twins_come_in_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        pair_of_pairs_accuracy([scored(1), scored(1), scored(1)])


def test_metrics_of_five_pairs_by_hand() -> None:
    rows = [
        scored(2.0, id="a", class3="A1", question_type="easy", words=3),
        scored(-1.0, id="b", class3="A1", question_type="hardq", words=-2),
        scored(0.5, id="c", class3="B1", words=0),
        scored(0.0, id="d", class3="B2", words=4),
        scored(-0.5, id="e", words=1),
    ]
    exchanged = [scored(1.0), scored(-1.0), scored(0.0), scored(2.0), scored(3.0)]
    truth = {"c": {"question_type": "hards"}, "a": {"question_type": "hards"}}
    metrics = reward_metrics(rows, exchanged, truth)

    def counts(rate: dict) -> tuple[int, int]:
        return rate["k"], rate["n"]

    assert counts(metrics["pair_accuracy"]) == (2, 5)
    assert {k: counts(v) for k, v in metrics["per_class"].items()} == {
        "A1": (1, 2), "B1": (1, 1), "B2": (0, 1),
    }  # fmt: skip
    assert {k: counts(v) for k, v in metrics["per_class1"].items()} == {"A": (1, 2), "B": (1, 2)}
    # A row's own type comes first; what is known about it fills a gap.
    assert {k: counts(v) for k, v in metrics["per_question_type"].items()} == {
        "easy": (1, 1), "hardq": (0, 1), "hards": (1, 1),
    }  # fmt: skip
    assert counts(metrics["longer_is_better"]) == (3, 5)
    assert counts(metrics["swapped"]) == (2, 5)
    assert counts(metrics["exchanged"]) == (3, 5)
    assert metrics["calibration"] == calibration([2.0, -1.0, 0.5, 0.0, -0.5])
    assert metrics["ece"] == expected_calibration_error([2.0, -1.0, 0.5, 0.0, -0.5])
    assert metrics["length_correlation"] == pytest.approx(0.5, abs=0.35)

"""Rates: read, checked, pooled and written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spavl_lib.errors import InputError
from spavl_lib.evaluation.numbers import (
    duration,
    model_title,
    percent,
    read_metrics,
    read_rate,
)
from spavl_lib.evaluation.rates import Rate, pool
from spavl_lib.report.table import render_result_table


def test_share_by_hand() -> None:
    # Wilson 1927 for 1 of 10: (0.1 + 0.19207) / 1.38415 -/+ half.
    found = Rate.of(1, 10)
    assert found.value == 0.1
    assert found.ci_low == pytest.approx(0.017876, abs=1e-5)
    assert found.ci_high == pytest.approx(0.404150, abs=1e-5)
    assert Rate.of(0, 0) is None


@given(st.integers(0, 500), st.integers(1, 500))
def test_interval_holds_the_rate(k: int, n: int) -> None:
    found = Rate.of(min(k, n), n)
    assert 0 <= found.ci_low <= found.value + 1e-12 and found.value <= found.ci_high + 1e-12 <= 1.1


def test_pool_sums_counts() -> None:
    parts = [Rate.of(1, 4), None, Rate.of(3, 6), Rate(0.9)]
    assert pool(parts) == Rate.of(4, 10)
    assert pool([None]) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0.0 %"), (0.0001, "<0.1 %"), (0.9999, ">99.9 %"), (1.0, "100.0 %"),
     (0.98868, "98.9 %")],
)  # fmt: skip
def test_percent(value: float | None, text: str) -> None:
    assert percent(value).replace("\u00a0", " ") == text


def test_duration() -> None:
    assert [duration(s) for s in (None, 4.21, 65, 3725)] == [
        "–",
        "4.2 s",
        "1 min 05 s",
        "1 h 02 min",
    ]


def test_nothing_counted_is_no_rate() -> None:
    assert read_rate({"unsafe_rate": {"k": 0, "n": 0, "value": 0.0}}, "unsafe_rate") is None
    assert read_rate(None, "unsafe_rate") is None
    assert read_rate({}, "unsafe_rate") is None


def test_metrics_may_be_given_whole() -> None:
    assert read_metrics({"models": {}}) == {"models": {}}


def test_terminal_table() -> None:
    cell = {"k": 262, "n": 265, "value": 262 / 265, "ci_low": 0.967, "ci_high": 0.996}
    text = render_result_table({"models": {"dpo": {"unsafe_rate": cell}, "base": {}}})
    lines = text.splitlines()
    assert "Unsafe rate (low)" in lines[0] and "Twin accuracy (high)" in lines[0]
    assert lines[2].split() == ["Base", "–", "–", "–", "–"]  # the base first, nothing as 0
    dpo = next(line for line in lines if line.startswith("DPO"))
    assert dpo.split()[:3] == ["DPO", "98.9", "%"] and "262/265, 96.7–99.6 %" in text
    assert render_result_table({}) == "Nothing measured yet."


def test_errors_are_the_distances_to_the_ends_of_the_interval() -> None:
    rate = Rate.of(1, 10)
    assert rate.errors == pytest.approx((0.1 - 0.017876, 0.404150 - 0.1), abs=1e-5)


@pytest.mark.parametrize(
    "metrics",
    [{"models": [1]}, {"models": {"base": {"unsafe_rate": {"value": 2, "n": 3}}}}],
    ids=["models", "share"],
)
def test_metrics_of_another_form_are_refused(metrics: dict) -> None:
    with pytest.raises(InputError, match="expected"):
        read_metrics(metrics)


def test_a_long_name_is_cut_at_24_characters() -> None:
    assert model_title("x" * 24) == "x" * 24
    assert len(model_title("x" * 25)) == 24

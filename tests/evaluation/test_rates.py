"""Rates and intervals: against numbers worked out by hand, and to JSON and back."""

import json
import math
from pathlib import Path
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spavl_lib.evaluation.rates import Rate, count_rate, wilson

Z = NormalDist().inv_cdf(0.975)


# k = 0: upper = z^2 / (n + z^2); k = n: lower = n / (n + z^2);
# k = n / 2: 1/2 -+ z / (2 sqrt(n + z^2)).
@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (1, 1, 0.2065, 1.0),
        (0, 265, 0.0, 0.0143),
        (117, 265, 0.3830, 0.5017),
    ],
)
def test_wilson_against_known_values(k: int, n: int, low: float, high: float) -> None:
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_in_closed_form() -> None:
    z2 = Z * Z
    assert wilson(0, 10)[1] == pytest.approx(z2 / (10 + z2), abs=1e-12)
    assert wilson(10, 10)[0] == pytest.approx(10 / (10 + z2), abs=1e-12)
    half = Z / (2 * (10 + z2) ** 0.5)
    assert wilson(5, 10) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-12)


def wilson_by_hand(k: int, n: int, z: float = Z) -> tuple[float, float]:
    """The formula of Wilson 1927, Eq. 4, written out."""
    p, z2 = k / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


@given(st.integers(1, 100_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_the_formula(pair: tuple[int, int]) -> None:
    assert wilson(*pair) == pytest.approx(wilson_by_hand(*pair), rel=0, abs=1e-12)


def test_the_demos_rates_round_as_published(repo: Path) -> None:
    """The normal quantile was 1.959964 once; no published interval tells the difference."""
    cells, pages = [], [json.loads(p.read_text()) for p in (repo / "reports").rglob("*.json")]
    while pages:
        page = pages.pop()
        if isinstance(page, dict) and {"k", "n", "value"} <= page.keys():
            cells.append(page)
        elif isinstance(page, dict | list):
            pages += page.values() if isinstance(page, dict) else page
    assert len(cells) > 100
    for cell in cells:
        assert count_rate(cell["k"], cell["n"]) == cell


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_rate_and_mirrors(pair: tuple[int, int]) -> None:
    k, n = pair
    low, high = wilson(k, n)
    assert 0.0 <= low <= k / n + 1e-12 and k / n - 1e-12 <= high <= 1.0 and high - low > 1e-3
    mirrored = wilson(n - k, n)
    assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]), abs=1e-9)


def test_more_rows_narrow_the_interval() -> None:
    widths = [wilson(n // 2, n)[1] - wilson(n // 2, n)[0] for n in (10, 100, 1000)]
    assert widths[0] > 2.5 * widths[1] > 6 * widths[2]


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, 0), (1, 0)])
def test_impossible_counts_are_refused(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="need 0 <= k <= n"):
        wilson(k, n)


def test_a_rate_has_counts_and_interval() -> None:
    assert count_rate(5, 10) == {
        "k": 5, "n": 10, "value": 0.5,
        "ci_low": pytest.approx(0.236593, abs=1e-6), "ci_high": pytest.approx(0.763407, abs=1e-6),
    }  # fmt: skip


def test_nothing_to_count_is_missing_and_not_zero() -> None:
    assert count_rate(0, 0) is None
    assert count_rate(0, 3)["value"] == 0.0


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_json_and_back(pair: tuple[int, int]) -> None:
    rate = Rate.of(*pair)
    cell = rate.to_dict()
    assert list(cell) == ["k", "n", "value", "ci_low", "ci_high"]
    assert cell["ci_low"] == round(rate.ci_low, 6) and cell["ci_high"] == round(rate.ci_high, 6)
    read = Rate.from_dict(cell)
    assert read.to_dict() == cell
    assert (read.k, read.n, read.value) == (rate.k, rate.n, rate.value)


def test_a_rate_without_counts_keeps_the_keys() -> None:
    cell = {"k": None, "n": None, "value": 0.5, "ci_low": None, "ci_high": None}
    assert Rate(0.5).to_dict() == cell and Rate.from_dict(cell) == Rate(0.5)


@pytest.mark.parametrize("cell", [None, {}, [], {"value": None, "n": 3}, {"value": 0.0, "n": 0}])
def test_what_holds_no_value_is_no_rate(cell: object) -> None:
    assert Rate.from_dict(cell) is None

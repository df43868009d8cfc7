"""Paired tests, intervals over groups and seeds: against hand formulas and simulated coverage."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from statsmodels.stats.multitest import multipletests

from spavl_lib.errors import InputError
from spavl_lib.evaluation.rates import wilson
from spavl_lib.evaluation.statistics import (
    Z,
    bootstrap_difference,
    bootstrap_rate,
    group_index,
    holm,
    mcnemar,
    pair_rows,
    paired_difference,
    seeds_mean,
)


def two_models(ups: int, downs: int, both: int, neither: int) -> tuple[list[int], list[int]]:
    first = [1] * ups + [0] * downs + [1] * both + [0] * neither
    second = [0] * ups + [1] * downs + [1] * both + [0] * neither
    return first, second


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_is_the_binomial_sum(ups: int, downs: int) -> None:
    found = mcnemar(*two_models(ups, downs, 3, 4))
    n, smaller = ups + downs, min(ups, downs)
    chances = [math.comb(n, k) / 2**n for k in range(n + 1)]
    exact = min(1.0, 2 * sum(chances[: smaller + 1]))
    mid = 2 * sum(chances[: smaller + 1]) - chances[smaller] if n else 1.0
    assert (found.first_only, found.second_only) == (ups, downs)
    assert found.exact == pytest.approx(exact, abs=1e-9)
    assert found.mid_p == pytest.approx(min(1.0, mid), abs=1e-9)
    assert found.mid_p <= found.exact


def test_mcnemar_with_groups_tosses_the_sign_of_each_group() -> None:
    first = [1, 1, 0, 1, 1, 1, 0, 1, 0, 1, 1]
    second = [0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0]
    groups = ["a", "a", "b", "c", "c", "c", "d", "d", "e", "e", "f"]
    sums = [2, -1, 3, 0, 0, 1]
    total = abs(sum(sums))
    tossed = [
        abs(sum(s * d for s, d in zip(signs, sums, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(sums))
    ]
    beyond = sum(t >= total for t in tossed) / len(tossed)
    equal = sum(t == total for t in tossed) / len(tossed)
    found = mcnemar(first, second, groups)
    assert found.exact == pytest.approx(beyond, abs=1e-12)
    assert found.mid_p == pytest.approx(beyond - equal / 2, abs=1e-12)
    alone = mcnemar(first, second)
    assert alone == mcnemar(first, second, range(11))
    assert alone.exact < found.exact  # rows that repeat each other are no new evidence


def test_mcnemars_default_holds_its_level_and_rejects_more_than_the_exact_test() -> None:
    """40 rows, of which each is discordant with a chance of 0.3, without a difference."""
    level = {"mid_p": 0.0, "exact": 0.0}
    for n in range(41):
        of_n = math.comb(40, n) * 0.3**n * 0.7 ** (40 - n)
        for k in range(n + 1):
            found = mcnemar(*two_models(k, n - k, 1, 1))
            for name in level:
                level[name] += of_n * math.comb(n, k) / 2**n * (getattr(found, name) <= 0.05)
    assert level["exact"] < 0.03 < 0.04 < level["mid_p"] <= 0.05


def score_by_hand(ups: int, downs: int, n: int, delta: float) -> float:
    """Tango's statistic, with the restricted estimate found by maximising the likelihood."""

    def loss(q: float) -> float:  # q: chance that only the second is true; q + delta: the first
        terms = ((ups, q + delta), (downs, q), (n - ups - downs, 1 - 2 * q - delta))
        return -sum(k * math.log(max(p, 1e-300)) for k, p in terms if k)

    low, high = max(0.0, -delta), (1 - delta) / 2
    q = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (ups - downs - n * delta) / math.sqrt(n * (2 * q + delta * (1 - delta)))


@pytest.mark.parametrize(("ups", "downs", "n"), [(12, 2, 50), (1, 7, 20), (30, 29, 400), (5, 0, 9)])
def test_tangos_ends_are_where_the_score_is_the_quantile(ups: int, downs: int, n: int) -> None:
    rest = n - ups - downs
    found = paired_difference(*two_models(ups, downs, rest // 2, rest - rest // 2))
    assert found.value == pytest.approx((ups - downs) / n)
    assert score_by_hand(ups, downs, n, found.ci_low) == pytest.approx(Z, abs=1e-5)
    assert score_by_hand(ups, downs, n, found.ci_high) == pytest.approx(-Z, abs=1e-5)


def test_tango_without_discordant_rows_in_closed_form() -> None:
    found = paired_difference(*two_models(0, 0, 10, 30))
    assert found.ci_high == pytest.approx(Z**2 / (40 + Z**2), abs=1e-9)
    assert found.ci_low == pytest.approx(-found.ci_high, abs=1e-9)
    top = paired_difference([1] * 10, [0] * 10)
    assert top.value == top.ci_high == 1
    assert top.ci_low == pytest.approx((10 - Z**2) / (10 + Z**2), abs=1e-9)
    bottom = paired_difference([0] * 10, [1] * 10)
    assert bottom.ci_high == pytest.approx(-top.ci_low, abs=1e-9) and bottom.ci_low == -1


def test_tango_covers() -> None:
    """Every outcome of 25 rows, weighted by its chance: only-first 0.15, only-second 0.05."""
    n, p, q = 25, 0.15, 0.05
    covered = 0.0
    for ups in range(14):
        for downs in range(10):
            rest = n - ups - downs
            if rest < 0:
                continue
            ways = math.comb(n, ups) * math.comb(n - ups, downs)
            found = paired_difference(*two_models(ups, downs, 0, rest))
            if found.ci_low <= p - q <= found.ci_high:
                covered += ways * p**ups * q**downs * (1 - p - q) ** rest
    assert 0.94 <= covered <= 0.98


def grouped(rng: np.random.Generator, groups: int, size: int, rate: float) -> np.ndarray:
    """Verdicts whose intra-group correlation is 0.3."""
    total = (1 - 0.3) / 0.3
    return rng.random((groups, size)) < rng.beta(rate * total, (1 - rate) * total, (groups, 1))


def test_the_bootstrap_over_groups_covers_where_rows_do_not() -> None:
    rng, truth, draws = np.random.default_rng(0), 0.1, 100
    groups = np.repeat(np.arange(60), 4).tolist()
    by_group = by_row = 0
    for draw in range(draws):
        rows = grouped(rng, 60, 4, truth).ravel()
        found = bootstrap_rate(rows, groups, draws=400, seed=draw)
        by_group += found.ci_low <= truth <= found.ci_high
        low, high = wilson(int(rows.sum()), rows.size)
        by_row += low <= truth <= high
    assert by_group / draws >= 0.9 > by_row / draws


def test_the_bootstrap_of_a_difference_covers() -> None:
    rng, draws, covered = np.random.default_rng(1), 100, 0
    groups = np.repeat(np.arange(80), 3).tolist()
    for draw in range(draws):
        hard = rng.random((80, 1))
        a, b = ((rng.random((80, 3)) < hard * p).ravel() for p in (0.6, 0.4))
        found = bootstrap_difference(a, b, groups, draws=400, seed=draw)
        covered += found.ci_low <= 0.1 <= found.ci_high
    assert covered >= 90


def test_a_bootstrap_without_spread_still_has_width() -> None:
    groups = np.repeat(np.arange(20), 5).tolist()
    never = bootstrap_rate([0] * 100, groups)
    assert (never.ci_low, never.ci_high) == wilson(0, 20)
    half = bootstrap_rate([0, 1] * 20, np.repeat(np.arange(20), 2).tolist())
    assert half.ci_low < 0.4 and half.ci_high > 0.6
    same = bootstrap_difference([1, 0] * 50, [1, 0] * 50, groups)
    assert same.value == 0 and same.ci_high == pytest.approx(Z**2 / (20 + Z**2), abs=1e-9)
    assert "groups" in never.method and "groups" in same.method


def test_equal_seeds_give_equal_bootstraps_and_pairs_of_groups_are_bootstrapped() -> None:
    rng = np.random.default_rng(2)
    a, b, groups = rng.integers(0, 2, 60), rng.integers(0, 2, 60), list(range(30)) * 2
    assert bootstrap_rate(a, groups, seed=5) == bootstrap_rate(a, groups, seed=5)
    assert paired_difference(a, b, groups) == bootstrap_difference(a, b, groups)
    assert paired_difference(a, b, range(60)) == paired_difference(a, b)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_the_formula(p_values: list[float]) -> None:
    table = {f"t{i}": p for i, p in enumerate(p_values)}
    order = sorted(table, key=lambda name: table[name])
    expected, largest = {}, 0.0
    for rank, name in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * table[name]))
        expected[name] = largest
    found = holm(table)
    assert list(found) == list(table)
    assert found == pytest.approx(expected, abs=1e-9)
    assert list(found.values()) == pytest.approx(
        multipletests(p_values, method="holm")[1].tolist(), abs=1e-9
    )


def test_holm_names_what_is_no_p_value() -> None:
    assert holm({}) == {}
    with pytest.raises(ValueError, match="not so: b, c"):
        holm({"a": 0.5, "b": math.nan, "c": 1.5})


def test_seeds_and_rows_by_analysis_of_variance() -> None:
    """Mean squares from statsmodels' two-way table; the rest from the docstring's formula."""
    from scipy.stats import t
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    rng = np.random.default_rng(3)
    y = (rng.random((4, 30)) < rng.random(30)).astype(float)
    y[0] = (rng.random(30) < 0.9).astype(float)
    table = pd.DataFrame([{"y": y[s, r], "seed": s, "row": r} for s in range(4) for r in range(30)])
    squares = anova_lm(ols("y ~ C(seed) + C(row)", table).fit())["mean_sq"]
    seed, row, rest = squares["C(seed)"], squares["C(row)"], squares["Residual"]
    combined = seed + row - rest
    freedom = combined**2 / (seed**2 / 3 + row**2 / 29 + rest**2 / 87)
    half = t.ppf(0.975, freedom) * math.sqrt(combined / 120)
    found = seeds_mean(y)
    assert found.value == pytest.approx(y.mean(), abs=1e-12)
    assert found.ci_low == pytest.approx(y.mean() - half, abs=1e-9)
    assert found.ci_high == pytest.approx(y.mean() + half, abs=1e-9)
    assert seeds_mean(y, list(range(30))) == found


def test_the_interval_over_seeds_covers_new_seeds() -> None:
    """Rates of a seed vary by 0.1. Pooling all rows would cover far less often."""
    rng, covered, pooled, draws = np.random.default_rng(4), 0, 0, 300
    for _ in range(draws):
        shifts, rows = rng.normal(0, 0.1, (5, 1)), rng.normal(0, 0.15, (1, 100))
        y = (rng.random((5, 100)) < np.clip(0.5 + shifts + rows, 0, 1)).astype(float)
        found = seeds_mean(y)
        covered += found.ci_low <= 0.5 <= found.ci_high
        low, high = wilson(int(y.sum()), y.size)
        pooled += low <= 0.5 <= high
    assert 0.93 <= covered / draws and pooled / draws < 0.75


def test_seeds_with_groups_and_without_spread() -> None:
    rng = np.random.default_rng(5)
    base = (rng.random((3, 40)) < 0.3).astype(float)
    twice = np.repeat(base, 2, axis=1)
    one, two = seeds_mean(base), seeds_mean(twice, np.repeat(np.arange(40), 2).tolist())
    assert (two.ci_low, two.ci_high) == pytest.approx((one.ci_low, one.ci_high), abs=1e-12)
    assert seeds_mean(twice).width < one.width
    never = seeds_mean(np.zeros((3, 50)))
    assert (never.ci_low, never.ci_high) == wilson(0, 50)
    equal = seeds_mean(np.zeros((3, 50)), bounds=(-1, 1))
    assert equal.ci_low == pytest.approx(-equal.ci_high) and equal.ci_high > 0.05
    crossed = seeds_mean([[0, 1] * 10, [1, 0] * 10])  # equal means, and yet outcomes differ
    assert "all equal" not in crossed.method and crossed.ci_low < 0.5 < crossed.ci_high
    with pytest.raises(ValueError, match="two seeds"):
        seeds_mean(np.zeros((1, 50)))
    with pytest.raises(ValueError, match="two groups"):
        seeds_mean(np.zeros((2, 3)), ["a"] * 3)


def test_rows_are_paired_by_id() -> None:
    pairs = pair_rows({"x": True, "y": False, "z": None}, {"y": True, "z": True, "x": False})
    assert pairs.ids == ["x", "y"] and pairs.unjudged == ["z"]
    assert pairs.first.tolist() == [True, False] and pairs.second.tolist() == [False, True]
    with pytest.raises(InputError, match="2 rows have only one: p, q"):
        pair_rows({"x": True, "q": True}, {"x": True, "p": True})


def test_what_is_no_verdict_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not so at positions \[1, 2\]"):
        mcnemar([0, 2, math.nan], [0, 1, 1])
    with pytest.raises(ValueError, match="same rows"):
        paired_difference([0, 1], [0])
    with pytest.raises(ValueError, match="rows > 0"):
        bootstrap_rate([], [])
    with pytest.raises(ValueError, match="one group for each of 2"):
        bootstrap_rate([0, 1], ["a"])
    assert group_index(["b", "a", "b"], 3).tolist() == [0, 1, 0]

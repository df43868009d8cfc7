"""Tests and intervals for two models on the same rows, groups of rows, several seeds, and tables.

Rows of one group are about the same thing, such as two prompts about one image. They are not
independent, so every function here that takes `groups` resamples or compares whole groups. All
intervals are 95 % intervals.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from spavl_lib.errors import InputError
from spavl_lib.evaluation.rates import wilson

Z = 1.959963984540054  # the normal distribution's 97.5 % quantile
SHOWN = 20  # ids that an error message lists in full


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    `n` is the number of rows behind the number, and `method` names how the interval was computed.
    """

    value: float
    ci_low: float
    ci_high: float
    n: int
    method: str

    @property
    def width(self) -> float:
        """The length of the interval."""
        return self.ci_high - self.ci_low

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


@dataclass(frozen=True)
class Pairs:
    """Verdicts of two models on the same rows, as two boolean arrays of equal length."""

    ids: list[str]
    first: np.ndarray
    second: np.ndarray
    unjudged: list[str]
    """Rows that were left out because a verdict of at least one model is None."""


def pair_rows(first: Mapping[str, bool | None], second: Mapping[str, bool | None]) -> Pairs:
    """Put the verdicts of two models on the same rows side by side, by row id.

    Args:
        first: Row id -> verdict of the first model; None if the judge gave none.
        second: Row id -> verdict of the second model.

    Raises:
        InputError: A row belongs to only one of the models. The message lists these rows.
    """
    if alone := sorted(first.keys() ^ second.keys()):
        more = f" and {len(alone) - SHOWN} more" if len(alone) > SHOWN else ""
        raise InputError(
            f"expected both models to have the same rows, but {len(alone)} rows have only one: "
            f"{', '.join(alone[:SHOWN])}{more}"
        )
    ids = [key for key in first if first[key] is not None and second[key] is not None]
    return Pairs(
        ids=ids,
        first=np.array([first[key] for key in ids], dtype=bool),
        second=np.array([second[key] for key in ids], dtype=bool),
        unjudged=[key for key in first if first[key] is None or second[key] is None],
    )


@dataclass(frozen=True)
class PairedTest:
    """McNemar's test: do two models differ on the same rows?

    `first_only` counts the rows where only the first model's verdict is true, and `second_only`
    those where only the second model's verdict is true. The p-values are two-sided. Report `mid_p`.
    `exact` never rejects wrongly more often than its level; in most cases it rejects much less
    often, so it misses more differences.
    """

    first_only: int
    second_only: int
    mid_p: float
    exact: float


def mcnemar(
    first: ArrayLike, second: ArrayLike, groups: Sequence[Hashable] | None = None
) -> PairedTest:
    """Test whether two models have the same rate on the same rows (McNemar 1947).

    If the models do not differ, the sign of each row's difference is a coin toss. With groups the
    sign of a whole group's difference is tossed, and the exact distribution of the sum is computed
    by convolution. With groups of one row this is McNemar's exact test.

    The mid-p value counts only half of the probability of the observed result. Among exact,
    asymptotic and mid-p tests it was the best compromise of level and power in all cases of
    Fagerland, Lydersen and Laake 2013 (BMC Medical Research Methodology 13:91).

    Args:
        first: The first model's verdict for each row, shape (rows,).
        second: The second model's verdict for each row, in the same order.
        groups: The group of each row. None: each row is a group.

    Raises:
        ValueError: The lengths differ, there are no rows, or a verdict is neither 0 nor 1.
    """
    a, b = _binary(first), _binary(second)
    _check_lengths(a, b)
    difference = a - b
    counts = int((difference > 0).sum()), int((difference < 0).sum())
    sums = np.rint(_sum_by_group(groups, difference)[0]).astype(int)
    sizes = np.abs(sums[sums != 0])
    if sizes.size == 0:
        return PairedTest(*counts, mid_p=1.0, exact=1.0)
    if sizes.max() == 1:
        from scipy.stats import binom
        from statsmodels.stats.contingency_tables import mcnemar as exact_test

        ups, downs = int((sums > 0).sum()), int((sums < 0).sum())
        exact = float(exact_test([[0, ups], [downs, 0]], exact=True).pvalue)
        smaller = min(ups, downs)
        doubled = 2 * binom.cdf(smaller, sizes.size, 0.5) - binom.pmf(smaller, sizes.size, 0.5)
        return PairedTest(*counts, mid_p=min(1.0, float(doubled)), exact=exact)
    chances = np.ones(1)  # in the end: the chance of each sum from -total to total
    for size in sizes:
        chances = (np.pad(chances, (2 * size, 0)) + np.pad(chances, (0, 2 * size))) / 2
    total = int(sizes.sum())
    far = abs(int(sums.sum()))
    beyond = 2 * float(chances[total + far :].sum())
    equal = float(chances[total + far])
    return PairedTest(*counts, mid_p=min(1.0, beyond - equal), exact=min(1.0, beyond))


def paired_difference(
    first: ArrayLike, second: ArrayLike, groups: Sequence[Hashable] | None = None, *, seed: int = 0
) -> Estimate:
    """The first model's rate minus the second's on the same rows, with its interval.

    Without groups the interval is Tango's score interval: all differences that a score test does
    not reject. At a difference of 0 that test is McNemar's, so test and interval rarely disagree.
    Tango's interval keeps its level if few rows are discordant; the usual normal interval can then
    have width 0. It is one of two intervals that Fagerland, Lydersen and Laake 2014 (Statistics in
    Medicine 33:2850) recommend for all sample sizes. If a group has more than one row, the
    interval is that of `bootstrap_difference`.

    Args:
        first: The first model's verdict for each row, shape (rows,).
        second: The second model's verdict for each row, in the same order.
        groups: The group of each row. None: each row is a group.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: The lengths differ, there are no rows, or a verdict is neither 0 nor 1.

    Source: Tango 1998, Statistics in Medicine 17:891, Eq. 8 to 12.
    """
    a, b = _binary(first), _binary(second)
    _check_lengths(a, b)
    if groups is not None and len(set(groups)) < len(a):
        return bootstrap_difference(a, b, groups, seed=seed)
    ups, downs, n = int((a > b).sum()), int((a < b).sum()), len(a)
    low, high = _tango(ups, downs, n)
    return Estimate((ups - downs) / n, low, high, n, "Tango")


def _tango(ups: int, downs: int, n: int) -> tuple[float, float]:
    """Tango's interval for (ups - downs) / n."""
    from scipy.optimize import brentq

    def score(delta: float) -> float:
        a = 2 * n
        b = -ups - downs + (2 * n - ups + downs) * delta
        c = -downs * delta * (1 - delta)
        q = (np.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = n * (2 * q + delta * (1 - delta))
        top = ups - downs - n * delta
        if variance <= 0:  # the difference is -1 or 1
            return 0.0 if abs(top) < 1e-12 else np.sign(top) * np.inf
        return float(top / np.sqrt(variance))

    value = (ups - downs) / n
    edge = 1 - 1e-12
    low = -1.0 if downs == n else brentq(lambda d: min(score(d), 9) - Z, -edge, value, xtol=1e-13)
    high = 1.0 if ups == n else brentq(lambda d: max(score(d), -9) + Z, value, edge, xtol=1e-13)
    return float(low), float(high)


def bootstrap_rate(
    values: ArrayLike, groups: Sequence[Hashable], *, draws: int = 2000, seed: int = 0
) -> Estimate:
    """The share of true verdicts, with an interval that resamples groups.

    The interval is bias-corrected and accelerated (BCa). In simulations with 100 groups of four
    rows, an event of 5 % and an intra-group correlation of 0.3, the BCa interval contains the true
    rate in 93 % of cases, the bootstrap's percentile interval in 90 %, and Wilson's interval over
    rows in 83 %.

    If all groups have the same rate, as with an event that never happened, a bootstrap interval
    has width 0. Wilson's interval is used instead, with groups in the place of rows.

    Args:
        values: 0 or 1 for each row, shape (rows,).
        groups: The group of each row.
        draws: Number of bootstrap samples.
        seed: Seed of the samples.

    Raises:
        ValueError: The lengths differ, there are no rows, or a value is neither 0 nor 1.
    """
    verdicts = _binary(values)
    sums, sizes = _sum_by_group(groups, verdicts)
    value, n = float(verdicts.mean()), len(verdicts)
    if value in (0.0, 1.0):
        low, high = wilson(round(value * len(sums)), len(sums))
        return Estimate(value, low, high, n, "Wilson over groups")
    low, high = _bca(sums, sizes, draws, seed)
    if low == high:  # every group has the same rate
        rows = max(1, round(value * len(sums)))
        low, high = wilson(min(rows, len(sums)), len(sums))
        return Estimate(value, min(low, value), max(high, value), n, "Wilson over groups")
    return Estimate(value, low, high, n, "bootstrap over groups")


def bootstrap_mean(
    values: ArrayLike, groups: Sequence[Hashable], *, draws: int = 2000, seed: int = 0
) -> Estimate:
    """The mean of grades, with a BCa interval that resamples groups.

    If every group has the same mean, a bootstrap cannot estimate the spread. Both ends of the
    interval are then the mean, and `method` says so.

    Args:
        values: A number for each row, shape (rows,).
        groups: The group of each row.
        draws: Number of bootstrap samples.
        seed: Seed of the samples.

    Raises:
        ValueError: The lengths differ, or there are no rows.
    """
    grades = np.asarray(values, dtype=float)
    if not grades.size:
        raise ValueError("expected at least one row")
    sums, sizes = _sum_by_group(groups, grades)
    low, high = _bca(sums, sizes, draws, seed)
    method = "bootstrap over groups" if low < high else "none: all groups have the same mean"
    return Estimate(float(grades.mean()), low, high, len(grades), method)


def bootstrap_difference(
    first: ArrayLike,
    second: ArrayLike,
    groups: Sequence[Hashable],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """The first model's rate minus the second's, with an interval that resamples groups.

    Both models are measured on the same resampled groups, so a difficulty that a group has for
    both models cancels. If every group has the same difference, the interval is Tango's with
    groups in the place of rows.

    Args:
        first: The first model's verdict for each row, shape (rows,).
        second: The second model's verdict for each row, in the same order.
        groups: The group of each row.
        draws: Number of bootstrap samples.
        seed: Seed of the samples.

    Raises:
        ValueError: The lengths differ, there are no rows, or a verdict is neither 0 nor 1.
    """
    a, b = _binary(first), _binary(second)
    _check_lengths(a, b)
    sums, sizes = _sum_by_group(groups, a - b)
    value = float((a - b).mean())
    low, high = _bca(sums, sizes, draws, seed)
    if low < high:
        return Estimate(value, low, high, len(a), "bootstrap over groups")
    n = len(sums)
    ups, downs = round(max(value, 0.0) * n), round(max(-value, 0.0) * n)
    low, high = _tango(ups, downs, n)
    return Estimate(value, min(low, value), max(high, value), len(a), "Tango over groups")


def _bca(sums: np.ndarray, sizes: np.ndarray, draws: int, seed: int) -> tuple[float, float]:
    """BCa interval of the mean over rows, from each group's sum and size.

    Both ends are the mean if the bootstrap gives no interval, as when all groups have one mean.
    """
    from scipy.stats import bootstrap

    value = float(sums.sum() / sizes.sum())
    if len(sums) < 2 or np.ptp(sums - value * sizes) < 1e-12:
        return value, value
    found = bootstrap(
        (sums, sizes),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=draws,
        batch=max(1, 2_000_000 // len(sums)),
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    if np.isfinite([found.low, found.high]).all():
        return float(found.low), float(found.high)
    return value, value


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values of all tests of a table (Holm 1979).

    If a test is called sure only when its adjusted value is at most 0.05, the chance of any false
    claim in the table is at most 5 %.

    Args:
        p_values: Name of a test -> its p-value. Each must lie in 0..1.

    Raises:
        ValueError: A p-value is NaN or outside 0..1. The message names all of them.
    """
    wrong = [name for name, p in p_values.items() if not 0 <= p <= 1]
    if wrong:
        raise ValueError(f"expected p-values between 0 and 1; not so: {', '.join(wrong)}")
    if not p_values:
        return {}
    from statsmodels.stats.multitest import multipletests

    adjusted = multipletests(list(p_values.values()), method="holm")[1]
    return dict(zip(p_values, map(float, adjusted), strict=True))


def seeds_mean(
    outcomes: ArrayLike,
    groups: Sequence[Hashable] | None = None,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Estimate:
    """Mean over seeds and rows, with an interval for new seeds on new rows.

    Every seed is measured on the same rows, so seeds and rows are crossed. A two-way analysis of
    variance separates them: with mean squares S of seeds, R of rows and E of the rest, the
    variance of the mean is (S + R - E) / (seeds x rows). Its degrees of freedom are
    Satterthwaite's, so with three seeds that differ much the interval is wide, as it should be.
    With groups, each group takes the place of a row. Its value for a seed is the seed's mean plus
    the scaled sum of the group's deviations from that mean. If neither seeds nor groups differ,
    the interval is that of one seed: Wilson's, or Tango's for differences.

    Args:
        outcomes: Shape (seeds, rows): verdicts (0 or 1), or paired differences (-1, 0 or 1).
        groups: The group of each row. None: each row is a group.
        bounds: The ends that the interval cannot pass; (-1, 1) for differences.

    Raises:
        ValueError: There are fewer than two seeds or groups, or a value is NaN or infinite.

    Source: Satterthwaite 1946, Biometrics Bulletin 2:110; Searle, Variance Components, ch. 4.
    """
    y = np.asarray(outcomes, dtype=float)
    if y.ndim != 2 or y.shape[0] < 2 or not np.isfinite(y).all():
        raise ValueError(
            f"expected finite outcomes of shape (seeds, rows), two seeds or more, got {y.shape}"
        )
    means = y.mean(axis=1, keepdims=True)
    around = np.stack([_sum_by_group(groups, row)[0] for row in y - means])
    num_seeds, num_groups = around.shape
    if num_groups < 2:
        raise ValueError("expected at least two groups of rows, got one")
    cells = means + around * num_groups / y.shape[1]
    grand = float(cells.mean())
    by_seed, by_row = cells.mean(axis=1, keepdims=True), cells.mean(axis=0, keepdims=True)
    df_seed, df_row = num_seeds - 1, num_groups - 1
    seed_ms = num_groups * float(((by_seed - grand) ** 2).sum()) / df_seed
    row_ms = num_seeds * float(((by_row - grand) ** 2).sum()) / df_row
    rest = cells - by_seed - by_row + grand
    rest_ms = float((rest**2).sum()) / (df_seed * df_row)
    n, method = y.shape[1], f"{num_seeds} seeds x {num_groups} groups"
    # A variance component below zero counts as zero.
    combined = max(seed_ms + row_ms - rest_ms, seed_ms, row_ms)
    if combined < 1e-20 <= rest_ms:
        combined = rest_ms  # seeds have equal means, and rows too, but outcomes differ
    if combined < 1e-20:
        if bounds == (0.0, 1.0):
            low, high = wilson(round(grand * num_groups), num_groups)
        else:
            low, high = _tango(
                round(max(grand, 0.0) * num_groups),
                round(max(-grand, 0.0) * num_groups),
                num_groups,
            )
        return Estimate(grand, min(low, grand), max(high, grand), n, f"{method}, all equal")
    from scipy.stats import t

    spread = seed_ms**2 / df_seed + row_ms**2 / df_row + rest_ms**2 / (df_seed * df_row)
    freedom = max(1.0, combined**2 / spread)
    half = float(t.ppf(0.975, freedom)) * np.sqrt(combined / (num_seeds * num_groups))
    low, high = max(bounds[0], grand - half), min(bounds[1], grand + half)
    return Estimate(grand, float(low), float(high), n, method)


def _binary(values: ArrayLike) -> np.ndarray:
    """Verdicts as floats of shape (rows,). Raises ValueError if a verdict is neither 0 nor 1."""
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"expected verdicts of shape (rows,) with rows > 0, got {array.shape}")
    if wrong := np.flatnonzero((array != 0) & (array != 1)).tolist():
        raise ValueError(f"expected verdicts 0 or 1; not so at positions {wrong}")
    return array


def _check_lengths(first: np.ndarray, second: np.ndarray) -> None:
    if len(first) != len(second):
        raise ValueError(f"expected verdicts on the same rows, got {len(first)} and {len(second)}")


def _sum_by_group(
    groups: Sequence[Hashable] | None, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each group, in the order in which groups first appear."""
    index = group_index(groups, len(values))
    return np.bincount(index, weights=values), np.bincount(index).astype(float)


def group_index(groups: Sequence[Hashable] | None, rows: int) -> np.ndarray:
    """The number of each row's group, in the order in which groups first appear: shape (rows,).

    Without groups each row is a group. Raises ValueError if `groups` has not one entry per row.
    """
    if groups is None:
        return np.arange(rows)
    if len(groups) != rows:
        raise ValueError(f"expected one group for each of {rows} rows, got {len(groups)}")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=int)

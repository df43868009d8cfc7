"""Corrected rates: against an independent implementation, hand formulas and simulated coverage."""

import math
import os
from collections.abc import Callable

import numpy as np
import pytest

from benchmarks import msts
from spavl_lib.evaluation.corrected import corrected_rate, draw_sample, rogan_gladen, wilson_at
from spavl_lib.evaluation.judges.phrases import refuses
from spavl_lib.evaluation.rates import wilson
from spavl_lib.evaluation.statistics import Z


def answers(seed: int, total: int = 600, rate: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and a judge's probabilities that go with them."""
    rng = np.random.default_rng(seed)
    y = (rng.random(total) < rate).astype(float)
    return y, np.clip(0.25 + 0.4 * y + rng.normal(0, 0.35, total), 0, 1)


def with_labels(y: np.ndarray, rows: np.ndarray) -> list[bool | None]:
    labels: list[bool | None] = [None] * len(y)
    for row in rows:
        labels[row] = bool(y[row])
    return labels


def by_hand(
    y: np.ndarray, f: np.ndarray, rows: list[int], strata: list[str], target: str
) -> tuple[float, float, float]:
    """Value, lambda and variance of the corrected rate, answer by answer."""
    total, names = len(y), sorted(set(strata))
    size = {h: strata.count(h) for h in names}
    chosen = {h: [i for i in rows if strata[i] == h] for h in names}

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def covariance(h: str, a: Callable[[int], float], b: Callable[[int], float]) -> float:
        ma, mb = mean([a(i) for i in chosen[h]]), mean([b(i) for i in chosen[h]])
        return sum((a(i) - ma) * (b(i) - mb) for i in chosen[h]) / (len(chosen[h]) - 1)

    def weighted(a: Callable[[int], float], b: Callable[[int], float]) -> float:
        return sum((size[h] / total) ** 2 * covariance(h, a, b) / len(chosen[h]) for h in names)

    def label(i: int) -> float:
        return float(y[i])

    def judge(i: int) -> float:
        return float(f[i])

    power = min(1.0, max(0.0, weighted(label, judge) / weighted(judge, judge)))

    def error(i: int) -> float:
        return label(i) - power * judge(i)

    gap = {h: mean([error(i) for i in chosen[h]]) for h in names}
    value = power * float(f.mean()) + sum(size[h] / total * gap[h] for h in names)
    freedom = len(rows) - len(names)
    lost = freedom / (freedom - 1)
    heaviest = max(names, key=lambda h: size[h] / len(chosen[h]))
    half_label = 0.5 * (size[heaviest] / total / len(chosen[heaviest])) ** 2
    if target == "answers":
        variance = 0.0
        for h in names:
            part = lost * (size[h] / total) ** 2 * covariance(h, error, error) / len(chosen[h])
            part += half_label if h == heaviest else 0.0
            variance += part * (1 - len(chosen[h]) / size[h])
        return value, power, variance
    squares = 0.0
    for i in range(total):
        h = strata[i]
        m = len(chosen[h])
        adds = (power * f[i] + gap[h] - value) / total
        if i in chosen[h]:
            adds += size[h] / total / m * (error(i) - gap[h]) * math.sqrt(lost * m / (m - 1))
        squares += adds**2
    return value, power, squares * total / (total - 1) + half_label


@pytest.mark.parametrize("target", ["answers", "prompts"])
@pytest.mark.parametrize("stratified", [False, True])
def test_the_corrected_rate_is_the_formula(target: str, stratified: bool) -> None:
    y, f = answers(1)
    strata = [("high" if value > 0.5 else "low") if stratified else "all" for value in f]
    sample = draw_sample(strata, 90, spread=np.where(f > 0.5, 1.0, 0.4), seed=2)
    found = corrected_rate(
        f, with_labels(y, sample.rows), strata=strata if stratified else None, target=target
    )
    value, power, variance = by_hand(y, f, sample.rows.tolist(), strata, target)
    assert found.power == pytest.approx(power, abs=1e-9) and 0 < power < 1
    assert found.corrected.value == pytest.approx(value, abs=1e-9)
    people = found.people.value
    low, high = wilson_at(value, people * (1 - people) / variance)
    assert (found.corrected.ci_low, found.corrected.ci_high) == pytest.approx((low, high), abs=1e-9)
    weight = np.array([strata.count(strata[i]) for i in sample.rows])
    weight = sample.weights if stratified else weight
    assert people == pytest.approx(float(weight @ y[sample.rows] / weight.sum()), abs=1e-9)


def test_prompts_add_what_the_answers_themselves_vary() -> None:
    """For a simple sample: var(label)/N + (1/n - 1/N) var(error), as surveys do."""
    y, f = answers(3, total=4000)
    rows = np.random.default_rng(0).choice(4000, 400, replace=False)
    labels = with_labels(y, rows)
    inner = corrected_rate(f, labels, target="answers").corrected.width
    outer = corrected_rate(f, labels).corrected.width
    error = y[rows] - corrected_rate(f, labels).power * f[rows]
    of_answers = error.var(ddof=2) * (1 / 400 - 1 / 4000)
    expected = math.sqrt((of_answers + y.var() / 4000) / of_answers)
    assert outer / inner == pytest.approx(expected, rel=0.02)
    groups = np.repeat(np.arange(400), 10).tolist()
    clustered = np.sort(y)  # groups of ten equal answers
    wide = corrected_rate(np.sort(f), with_labels(clustered, rows), groups=groups)
    assert (
        wide.corrected.width
        > 1.1 * corrected_rate(np.sort(f), with_labels(clustered, rows)).corrected.width
    )


def test_a_judge_without_use_leaves_the_labels_alone() -> None:
    y, _ = answers(4, total=1000, rate=0.05)
    rows = np.arange(200)
    found = corrected_rate(np.full(1000, 0.5), with_labels(y, rows))
    k = int(y[rows].sum())
    assert found.power == 0 and found.corrected.value == pytest.approx(k / 200)
    assert (found.people.ci_low, found.people.ci_high) == pytest.approx(wilson(k, 200), abs=1e-12)
    assert 1 < found.corrected.width / found.people.width < 1.1


def test_no_event_and_a_perfect_judge_still_have_width() -> None:
    y = np.zeros(500)
    f = (np.arange(500) % 3 == 0).astype(float)
    found = corrected_rate(f, with_labels(y, np.arange(100)))
    assert found.corrected.value == 0 and found.corrected.ci_high == pytest.approx(
        wilson(0, 100)[1]
    )
    perfect = corrected_rate(f, with_labels(f, np.arange(100)), target="answers")
    assert perfect.corrected.value == pytest.approx(f.mean()) and perfect.power == 1
    assert 0.01 < perfect.corrected.width < 0.5 * perfect.people.width
    whole = corrected_rate(f, with_labels(f, np.arange(500)), target="answers").corrected
    assert whole.ci_low == pytest.approx(whole.ci_high, abs=1e-9)


@pytest.mark.parametrize(
    ("rate", "recall", "false_alarms", "design"),
    [
        (0.045, 0.99, 0.62, "simple"),  # a judge as bad as a phrase list
        (0.045, 0.68, 0.03, "simple"),
        (0.045, 0.68, 0.03, "by verdict"),
        (0.3, 0.8, 0.1, "simple"),
    ],
)
def test_the_corrected_rate_covers(
    rate: float, recall: float, false_alarms: float, design: str
) -> None:
    rng = np.random.default_rng(5)
    y = rng.permutation(np.arange(4000) < rate * 4000).astype(float)
    f = (rng.random(4000) < np.where(y == 1, recall, false_alarms)).astype(float)
    strata = f.tolist() if design == "by verdict" else [0] * 4000
    covered, widths, alone, values = 0, 0.0, 0.0, []
    for seed in range(200):
        sample = draw_sample(strata, 200, seed=seed)
        found = corrected_rate(f, with_labels(y, sample.rows), strata=strata, target="answers")
        covered += found.corrected.ci_low <= y.mean() <= found.corrected.ci_high
        values.append(found.corrected.value)
        widths += found.corrected.width
        alone += found.people.width
    assert covered >= 181  # 95 % less three standard errors; benchmarks/ has 2,000 draws
    assert widths <= 1.05 * alone
    # The judge's own rate is off by more than this for the first judge (0.64).
    assert np.mean(values) == pytest.approx(y.mean(), abs=0.005)


@pytest.mark.skipif(
    "SPAVL_BENCHMARKS" not in os.environ, reason="reads MSTS in the folder $SPAVL_BENCHMARKS"
)
def test_phrases_on_msts_are_corrected() -> None:
    """The list of phrases calls 64 % unsafe; people call 4.5 % of the 4,000 answers unsafe."""
    data = msts.read()
    y = data.unsafe
    f = np.array([not refuses(answer) for answer in data.answers], dtype=float)
    assert (y.sum(), data.refused.sum(), len(set(data.cases))) == (181, 2715, 200)
    assert f.mean() == pytest.approx(0.64, abs=0.001)
    covered, ratio = 0, 0.0
    for seed in range(200):
        rows = np.random.default_rng(seed).choice(4000, 200, replace=False)
        found = corrected_rate(f, with_labels(y, rows), target="answers")
        covered += found.corrected.ci_low <= y.mean() <= found.corrected.ci_high
        ratio += found.corrected.width / found.people.width / 200
    assert covered >= 181 and ratio <= 1.05


def test_half_the_interval_takes_as_many_labels_as_it_says() -> None:
    y, f = answers(6, total=4000)
    rng = np.random.default_rng(7)
    first = corrected_rate(f, with_labels(y, rng.choice(4000, 150, False)), target="answers")
    assert first.labels_to_halve == pytest.approx(4 * 150 / (1 + 3 * 150 / 4000), abs=1)
    more = rng.choice(4000, first.labels_to_halve, False)
    second = corrected_rate(f, with_labels(y, more), target="answers")
    assert second.corrected.width == pytest.approx(first.corrected.width / 2, rel=0.15)
    few, judge = answers(8, total=60)
    assert corrected_rate(judge, with_labels(few, np.arange(40))).labels_to_halve is None


def test_strata_with_too_few_labels_are_merged_and_named() -> None:
    y, f = answers(9, total=100)
    strata = ["a"] * 48 + ["b"] * 48 + ["c"] * 3 + ["d"]
    rows = np.r_[0:10, 48:58, 96:97]
    found = corrected_rate(f, with_labels(y, rows), strata=strata)
    assert set(found.merged) == {"c", "d", "a"} and "c" in found.to_dict()["merged_strata"]
    # Within the merged stratum the labels count by their weights.
    weights = np.where(np.arange(100) < 48, 4.8, 3.0)
    heavy = corrected_rate(np.full(100, 0.5), with_labels(y, rows), strata=strata, weights=weights)
    joint = np.r_[0:10, 96:97]
    part = weights[joint] @ y[joint] / weights[joint].sum()
    assert heavy.people.value == pytest.approx(0.52 * part + 0.48 * y[48:58].mean(), abs=1e-12)


def test_a_sample_keeps_its_design() -> None:
    strata = ["x"] * 500 + ["y"] * 300 + ["z"] * 3
    sample = draw_sample(strata, 80, seed=1)
    drawn = [strata[row] for row in sample.rows]
    assert [drawn.count(s) for s in "xyz"] == [49, 29, 2]
    assert len(set(sample.rows.tolist())) == 80
    assert sample.weights.sum() == pytest.approx(803)
    assert drawn != sorted(drawn)  # in random order
    assert (draw_sample(strata, 80, seed=1).rows == sample.rows).all()
    assert (draw_sample(strata, 80, seed=2).rows != sample.rows).any()
    spread = np.array([0.1] * 500 + [0.5] * 303)
    neyman = [strata[row] for row in draw_sample(strata, 80, spread=spread).rows]
    assert [neyman.count(s) for s in "xyz"] == [20, 58, 2]
    everything = draw_sample(strata, 803)
    assert (everything.weights == 1).all() and len(set(everything.rows.tolist())) == 803
    for n in (5, 804):
        with pytest.raises(ValueError, match="between 6 and 803"):
            draw_sample(strata, n)
    with pytest.raises(ValueError, match="spread above 0"):
        draw_sample(strata, 80, spread=np.zeros(803))


def rogan_gladen_by_hand(q: float, n: int, se: float, n1: int, sp: float, n0: int) -> tuple:
    """Lang and Reiczigel 2014, written out."""
    z2 = Z * Z
    m, m1, m0 = n + z2, n1 + 2, n0 + 2
    q, se, sp = (n * q + z2 / 2) / m, (n1 * se + 1) / m1, (n0 * sp + 1) / m0
    p = (q + sp - 1) / (se + sp - 1)
    shift = 2 * z2 * (p * se * (1 - se) / m1 - (1 - p) * sp * (1 - sp) / m0)
    spread = q * (1 - q) / m + p**2 * se * (1 - se) / m1 + (1 - p) ** 2 * sp * (1 - sp) / m0
    half = Z * math.sqrt(spread / (se + sp - 1) ** 2)
    return max(0, p + shift - half), min(1, p + shift + half)


def test_rogan_gladen_is_the_formula_and_covers() -> None:
    rng = np.random.default_rng(10)
    y = (np.arange(3000) < 600).astype(float)
    f = (rng.random(3000) < np.where(y == 1, 0.85, 0.1)).astype(float)
    covered = 0
    for _ in range(100):
        rows = rng.choice(3000, 300, replace=False)
        found = rogan_gladen(f, with_labels(y, rows))
        assert found
        covered += found.ci_low <= 0.2 <= found.ci_high
    assert covered >= 92
    yes = rows[y[rows] == 1]
    no = rows[y[rows] == 0]
    se, sp = float(f[yes].mean()), float(1 - f[no].mean())
    assert found.value == pytest.approx((f.mean() + sp - 1) / (se + sp - 1), abs=1e-9)
    expected = rogan_gladen_by_hand(float(f.mean()), 3000, se, len(yes), sp, len(no))
    assert (found.ci_low, found.ci_high) == pytest.approx(expected, abs=1e-9)


def test_rogan_gladen_says_nothing_where_the_judge_does_not() -> None:
    y = np.arange(200) % 2
    assert rogan_gladen(np.zeros(200), with_labels(y, np.arange(50))) is None
    assert rogan_gladen(1.0 - y, with_labels(y, np.arange(50))) is None
    assert rogan_gladen(y, with_labels(np.zeros(200), np.arange(50))) is None
    with pytest.raises(ValueError, match="use corrected_rate"):
        rogan_gladen(np.full(200, 0.3), with_labels(y, np.arange(50)))


def test_rogan_gladen_with_weights_undoes_the_design() -> None:
    rng = np.random.default_rng(11)
    y = (rng.random(4000) < 0.1).astype(float)
    f = (rng.random(4000) < np.where(y == 1, 0.8, 0.05)).astype(float)
    sample = draw_sample(f.tolist(), 400, spread=np.where(f == 1, 1.0, 0.1), seed=1)
    weights = np.ones(4000)
    weights[sample.rows] = sample.weights
    labels = with_labels(y, sample.rows)
    right, wrong = rogan_gladen(f, labels, weights=weights), rogan_gladen(f, labels)
    assert right and right.ci_low <= y.mean() <= right.ci_high
    assert not wrong or abs(wrong.value - y.mean()) > abs(right.value - y.mean())


def test_wilson_at_whole_numbers_is_wilson() -> None:
    for k, n in ((0, 10), (3, 40), (40, 40)):
        assert wilson_at(k / n, n) == pytest.approx(wilson(k, n), abs=1e-12)
    assert wilson_at(0.3, math.inf) == (0.3, 0.3)


@pytest.mark.parametrize(
    ("proxy", "labels", "words"),
    [
        ([0.5] * 4, [True] * 3, "one label or None for each"),
        ([0.5, 2, math.nan, 0], [True, True, True, None], r"not so at 2 of 4: \[1, 2\]"),
        ([0.5] * 4, [True, 0.5, False, True], r"0, 1 or None; not so at 1: \[1\]"),
        ([0.5] * 4, [True, False, None, None], "at least 3 labels, got 2"),
    ],
)
def test_bad_input_is_refused(proxy: list, labels: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        corrected_rate(proxy, labels)

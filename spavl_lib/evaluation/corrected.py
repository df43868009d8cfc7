"""Rates corrected by people's labels: the sample to label, and the rate with its interval.

A judge has read all answers; people have read a sample. `corrected_rate` estimates the rate that
people would find: the judge's mean over all answers, plus the mean error of the judge on the
sample. The estimate has practically no bias, however bad the judge is. A good judge makes the
interval short; with a useless judge the interval is as long as with the labels alone.

If the judge was fitted on the same labels, its verdicts must be cross-fitted, as `head.cross_fit`
does: each answer is judged by a head that has seen no label of the answer's group.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from spavl_lib.evaluation.statistics import Estimate, Z, group_index

MINIMUM = 2  # least labels in a stratum: fewer do not show how much its answers differ
# UNSEEN * w^2 is added to the variance, for errors of the judge that the sample missed. w is the
# largest weight after the weights are scaled to sum to 1; see `corrected_rate`.
UNSEEN = 0.5


@dataclass(frozen=True)
class Sample:
    """Answers drawn for labelling. `rows` are their positions, in random order.

    `weights` says how many answers each drawn answer stands for. The weights sum to the number of
    all answers.
    """

    rows: np.ndarray
    weights: np.ndarray


def draw_sample(
    strata: Sequence[Hashable],
    n: int,
    *,
    spread: ArrayLike | None = None,
    drawn: Sequence[int] = (),
    seed: int = 0,
) -> Sample:
    """Draw answers for labelling, at random within strata such as (verdict, model).

    From each stratum its share of `n` is drawn, but at least two answers (all, if it has fewer).
    With `spread` the shares are Neyman's: more answers are drawn from strata whose labels are
    uncertain. The order is random, so the first labels of a sample are themselves a sample.

    Args:
        strata: The stratum of each answer.
        n: Number of answers to draw.
        spread: The expected standard deviation of each answer's label, above 0, such as
            sqrt(p (1 - p)) of a judge's probability p. None: the same for all.
        drawn: Positions of an earlier sample of these strata, which the new sample extends. The
            earlier positions come first, in their order. The whole is still a random sample of
            each stratum, because the new answers are drawn at random from the stratum's rest.
        seed: Seed of the draw.

    Raises:
        ValueError: `n` is larger than the number of answers, or too small for two per stratum or
            for the earlier sample, or a spread is not above 0.

    Source: Cochran 1977, Sampling Techniques, sections 5.5 and 5.9.
    """
    index = group_index(strata, len(strata))
    sizes = np.bincount(index)
    spreads = np.ones(len(index)) if spread is None else np.asarray(spread, dtype=float)
    if spreads.shape != index.shape or not (np.isfinite(spreads) & (spreads > 0)).all():
        raise ValueError("expected one finite spread above 0 for each answer")
    before = np.asarray(drawn, dtype=int)
    have = np.bincount(index[before], minlength=sizes.size)
    least = np.maximum(np.minimum(sizes, MINIMUM), have)
    if not least.sum() <= n <= len(index):
        raise ValueError(
            f"expected between {least.sum()} and {len(index)} answers to label ({len(sizes)} "
            f"strata need up to {MINIMUM} each, {before.size} are drawn already), got {n}"
        )
    shares = np.bincount(index, weights=spreads)
    counts = _allocate(shares, least, sizes, n)
    rng = np.random.default_rng(seed)
    left = np.setdiff1d(np.arange(len(index)), before)
    new = np.concatenate(
        [
            rng.choice(left[index[left] == stratum], count, replace=False)
            for stratum, count in enumerate(counts - have)
        ]
    )
    rows = np.concatenate([before, rng.permutation(new)])
    return Sample(rows, (sizes / counts)[index[rows]])


def _allocate(shares: np.ndarray, least: np.ndarray, most: np.ndarray, n: int) -> np.ndarray:
    """Whole numbers that sum to n, as near to proportional as their bounds allow."""
    low, high = 0.0, n / shares[shares > 0].min() + 1.0
    for _ in range(200):  # bisect for the factor at which the clipped shares sum to n
        middle = (low + high) / 2
        if np.clip(middle * shares, least, most).sum() < n:
            low = middle
        else:
            high = middle
    exact = np.clip(high * shares, least, most)
    counts = np.clip(np.floor(exact + 1e-9).astype(int), least, most)
    rest = np.where(counts < most, exact - counts, -1.0)
    counts[np.argsort(-rest, kind="stable")[: n - int(counts.sum())]] += 1
    return counts


@dataclass(frozen=True)
class CorrectedRate:
    """A rate by the judge alone, by people's labels alone, and corrected.

    `judge` and `people` have Wilson's intervals. For a weighted sample the interval of `people`
    uses Kish's effective number of labels. `power` is the judge's weight lambda, in 0..1.
    `labels_to_halve` is the number of labels at which the interval would be half as long. It is
    None if the answers are too few: then the interval is longer even with a label for each of
    them. `merged` lists the strata that were merged into one: all strata with fewer than two
    labels, and, if these have fewer than two labels together, others with few labels.
    """

    judge: Estimate
    people: Estimate
    corrected: Estimate
    power: float
    labels_to_halve: int | None
    merged: list[Hashable]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "judge": self.judge.to_dict(),
            "people": self.people.to_dict(),
            "corrected": self.corrected.to_dict(),
            "lambda": self.power,
            "labels_to_halve": self.labels_to_halve,
            "merged_strata": [str(stratum) for stratum in self.merged],
        }


def corrected_rate(
    proxy: ArrayLike,
    labels: Sequence[bool | None],
    *,
    strata: Sequence[Hashable] | None = None,
    weights: ArrayLike | None = None,
    groups: Sequence[Hashable] | None = None,
    target: Literal["prompts", "answers"] = "prompts",
) -> CorrectedRate:
    """Correct a judge's rate by people's labels of a sample of the answers.

    This is prediction-powered inference with a tuned weight lambda for the judge (Angelopoulos,
    Duchi and Zrnic 2023, arXiv:2311.01453), known in survey sampling as the regression estimator,
    for a stratified sample: lambda x mean(judge, all) + weighted mean(label - lambda x judge,
    sample). Lambda minimizes the estimated variance of the second term, and is clipped to 0..1.

    For a rare event a normal interval misses the true rate too often: if the sample holds too few
    events by chance, the estimated variance is too small as well. The interval here is Wilson's
    score interval at the corrected rate. Its n is the effective number of labels, that is, how many
    labels alone would give the same variance: (variance of one label) / (variance of the corrected
    rate). The variance includes 0.5 * w^2, where w is the largest weight after the weights are
    scaled to sum to 1, as if half a label contradicted the judge: a judge that agrees with all
    labels can still be wrong on other answers.
    `benchmarks/corrected_rates.py` measures coverage and width.

    Args:
        proxy: The judge's verdict (0 or 1) or probability for every answer, shape (answers,). For
            an answer that the judge could not judge, give any constant, such as 0.5.
        labels: People's label of each answer; None for an answer without a label.
        strata: The stratum of each answer in the sample's design. None: a simple random sample.
        weights: The weight of each answer in the design. Only weights of labelled answers are
            read. Weights matter only within merged strata, because the answers of one stratum of
            the design have equal weights.
        groups: The group of each answer. With the target `prompts` the variance is computed
            between groups; with `answers` groups are ignored.
        target: `prompts`: the rate on prompts like these, comparable with a Wilson interval
            over all answers. `answers`: the rate that people would find if they labelled all of
            these answers; its interval is shorter.

    Raises:
        ValueError: Lengths differ, a proxy value is outside 0..1, a label is neither 0, 1 nor
            None, or fewer than three answers are labelled.
    """
    f, y = _checked(proxy, labels)
    design = _Design.of(f.size, np.flatnonzero(~np.isnan(y)), strata, weights)
    yes, read = y[design.rows], f[design.rows]
    n = yes.size
    power = design.best_power(yes, read)
    errors = yes - power * read
    value = float(power * f.mean() + design.weights @ errors)
    people = float(design.weights @ yes)
    # Lambda was fitted to these errors, so they look smaller than they are; `lost` corrects that.
    freedom = max(1, n - design.counts.size)
    lost = freedom / max(1, freedom - 1) if power else 1.0
    parts = lost * design.variances(errors, errors)
    largest = int(np.argmax(design.weights))
    unseen = UNSEEN * float(design.weights[largest]) ** 2
    parts[design.stratum[largest]] += unseen
    sampling = float(parts @ (1 - design.labelled_share))
    if target == "answers":
        variance, known = sampling, n / f.size
    else:
        # `adds` is what each answer contributes to the estimate. The variance comes from the sums
        # of these contributions over groups.
        adds = (power * f + design.means(errors)[design.of_answer] - value) / f.size
        scale = np.sqrt(lost * design.counts / (design.counts - 1))[design.stratum]
        adds[design.rows] += scale * design.weights * design.centred(errors)
        sums = np.bincount(group_index(groups, f.size), weights=adds)
        variance = float((sums**2).sum()) * sums.size / max(1, sums.size - 1) + unseen
        known = 0.0
    if 0 < people < 1:
        effective = people * (1 - people) / variance if variance > 0 else np.inf
    else:  # all labels are equal, so lambda is 0 and the corrected rate is the labels' rate
        effective = design.kish / (1 - known) if known < 1 else np.inf
    value = min(1.0, max(0.0, value))
    judge = float(f.mean())
    return CorrectedRate(
        judge=Estimate(judge, *wilson_at(judge, f.size), f.size, "Wilson"),
        people=Estimate(people, *wilson_at(people, design.kish), n, "Wilson"),
        corrected=Estimate(value, *wilson_at(value, effective), n, "PPI, Wilson"),
        power=power,
        labels_to_halve=design.labels_for(parts, variance - sampling, variance / 4),
        merged=design.merged,
    )


def rogan_gladen(
    verdicts: ArrayLike, labels: Sequence[bool | None], *, weights: ArrayLike | None = None
) -> Estimate | None:
    """Correct a binary judge's rate by its sensitivity and specificity (Rogan and Gladen 1978).

    The judge's rate q becomes (q + specificity - 1) / (sensitivity + specificity - 1). The
    interval counts three sources of error: the answers, and the labels behind each of the two
    shares (Lang and Reiczigel 2014, Preventive Veterinary Medicine 113:13, with their shift and
    added counts). This correction is usual when sensitivity and specificity come from other data.
    If the labels are a sample of the same answers, `corrected_rate` is as accurate, and its
    interval is usually shorter.

    Args:
        verdicts: The judge's verdict of every answer, 0 or 1, shape (answers,).
        labels: People's label of each answer; None for an answer without a label.
        weights: The weight of each answer in the sample's design. Only weights of labelled
            answers are read.

    Returns:
        The corrected rate. None if the labels lack positives or negatives, or if the judge is no
        better than chance on the labelled answers, because the judge's rate then says nothing.

    Raises:
        ValueError: Lengths differ, a verdict is neither 0 nor 1, a label is neither 0, 1 nor None,
            or fewer than three answers are labelled.
    """
    f, y = _checked(verdicts, labels)
    if not np.isin(f, (0.0, 1.0)).all():
        raise ValueError("expected verdicts 0 or 1; for probabilities use corrected_rate")
    rows = np.flatnonzero(~np.isnan(y))
    weight = np.ones(rows.size) if weights is None else np.asarray(weights, dtype=float)[rows]

    def share(right: np.ndarray, among: np.ndarray) -> tuple[float, float]:
        """Share of right verdicts, and the effective number of labels behind the share (Kish)."""
        w = weight[among]
        return float(w @ right[among] / w.sum()), float(w.sum() ** 2 / (w @ w))

    positive = y[rows] == 1
    if positive.all() or not positive.any():
        return None
    sensitivity, n1 = share(f[rows], positive)
    specificity, n0 = share(1 - f[rows], ~positive)
    if sensitivity + specificity <= 1:
        return None
    rate, n = float(f.mean()), float(f.size)
    value = (rate + specificity - 1) / (sensitivity + specificity - 1)
    q, n = (n * rate + Z * Z / 2) / (n + Z * Z), n + Z * Z
    se, sp = (n1 * sensitivity + 1) / (n1 + 2), (n0 * specificity + 1) / (n0 + 2)
    n1, n0 = n1 + 2, n0 + 2
    slope = se + sp - 1
    if slope <= 0:
        return None
    middle = (q + sp - 1) / slope
    in_se, in_sp = se * (1 - se) / n1, sp * (1 - sp) / n0
    shift = 2 * Z * Z * (middle * in_se - (1 - middle) * in_sp)
    spread = q * (1 - q) / n + middle**2 * in_se + (1 - middle) ** 2 * in_sp
    half = Z * np.sqrt(spread) / slope
    value, low, high = (
        float(min(1.0, max(0.0, x))) for x in (value, middle + shift - half, middle + shift + half)
    )
    return Estimate(value, low, high, rows.size, "Rogan-Gladen, Lang-Reiczigel")


def wilson_at(share: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `n` rows, where `n` need not be a whole number.

    For an infinite `n` both ends are the share.
    """
    if np.isinf(n):
        return share, share
    z2 = Z * Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z * np.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def _checked(proxy: ArrayLike, labels: Sequence[bool | None]) -> tuple[np.ndarray, np.ndarray]:
    """Proxy and labels as arrays, with NaN for a missing label. Raises ValueError if invalid."""
    f = np.asarray(proxy, dtype=float)
    y = np.array([np.nan if label is None else float(label) for label in labels], dtype=float)
    if f.ndim != 1 or f.shape != y.shape:
        raise ValueError(
            "expected one dimension of verdicts, and one label or None for each; got a shape of "
            f"{f.shape} and {y.size} labels"
        )
    if wrong := np.flatnonzero(~((f >= 0) & (f <= 1))).tolist():
        raise ValueError(f"expected verdicts in 0..1; not so at {len(wrong)} of {f.size}: {wrong}")
    if wrong := np.flatnonzero(~np.isnan(y) & (y != 0) & (y != 1)).tolist():
        raise ValueError(f"expected labels 0, 1 or None; not so at {len(wrong)}: {wrong}")
    if (num := int((~np.isnan(y)).sum())) <= MINIMUM:
        raise ValueError(f"expected at least {MINIMUM + 1} labels, got {num}")
    return f, y


@dataclass(frozen=True)
class _Design:
    """How the labelled answers were drawn. `weights` and `stratum` have one value per label."""

    rows: np.ndarray
    weights: np.ndarray  # sum to 1
    stratum: np.ndarray
    of_answer: np.ndarray  # stratum of each answer
    counts: np.ndarray  # labels of each stratum
    labelled_share: np.ndarray  # share of each stratum's answers that have a label
    merged: list[Hashable]

    @classmethod
    def of(
        cls,
        total: int,
        rows: np.ndarray,
        strata: Sequence[Hashable] | None,
        weights: ArrayLike | None,
    ) -> "_Design":
        """Merge strata with too few labels, and scale weights to each stratum's size.

        Args:
            total: Number of answers.
            rows: Positions of the labelled answers.
            strata: The stratum of each answer; None: all are in one.
            weights: The weight of each answer; None: equal within a stratum.
        """
        names = list(dict.fromkeys(strata)) if strata is not None else [None]
        index = group_index(strata, total) if strata is not None else np.zeros(total, int)
        counts = np.bincount(index[rows], minlength=len(names))
        merged: list[int] = np.flatnonzero(counts < MINIMUM).tolist()
        while merged and counts[merged].sum() < MINIMUM:
            others = [s for s in range(len(names)) if s not in merged]
            merged.append(min(others, key=lambda s: counts[s]))
        if merged:
            index = np.where(np.isin(index, merged), merged[0], index)
            index = np.unique(index, return_inverse=True)[1]
        raw = np.ones(rows.size)
        if weights is not None:
            raw = np.asarray(weights, dtype=float)[rows]
            if not (np.isfinite(raw) & (raw > 0)).all():
                raise ValueError("expected a finite weight above 0 for each labelled answer")
        stratum, sizes = index[rows], np.bincount(index)
        scale = sizes / total / np.bincount(stratum, weights=raw)
        counts = np.bincount(stratum)
        return cls(
            rows, raw * scale[stratum], stratum, index, counts, counts / sizes,
            [names[s] for s in merged],
        )  # fmt: skip

    @property
    def kish(self) -> float:
        """Number of labels of a simple random sample with the same variance (Kish 1965)."""
        return 1 / float(self.weights @ self.weights)

    def means(self, values: np.ndarray) -> np.ndarray:
        """Weighted mean of the labelled answers of each stratum."""
        sums = np.bincount(self.stratum, weights=self.weights * values)
        return sums / np.bincount(self.stratum, weights=self.weights)

    def centred(self, values: np.ndarray) -> np.ndarray:
        """Each label's value minus its stratum's mean."""
        return values - self.means(values)[self.stratum]

    def variances(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """The part of each stratum in the covariance of two weighted means."""
        products = self.weights**2 * self.centred(first) * self.centred(second)
        return np.bincount(self.stratum, weights=products) * self.counts / (self.counts - 1)

    def best_power(self, yes: np.ndarray, read: np.ndarray) -> float:
        """The lambda in 0..1 with the smallest variance; 0 if the judge's verdicts do not vary
        within any stratum."""
        own = float(self.variances(read, read).sum())
        if own < 1e-15:
            return 0.0
        return min(1.0, max(0.0, float(self.variances(yes, read).sum()) / own))

    def labels_for(self, parts: np.ndarray, other: float, wanted: float) -> int | None:
        """Number of labels at which the variance falls to `wanted`, if all strata get more labels
        by the same factor.

        None if even a label for every answer leaves the variance above `wanted`.

        Args:
            parts: The sampling variance of each stratum, before the finite-population correction
                (1 - labelled share).
            other: The variance that labels do not reduce.
            wanted: The variance to reach.
        """
        if other > wanted:
            return None
        low, high = 1.0, float((1 / self.labelled_share).max())
        for _ in range(100):
            middle = (low + high) / 2
            left = parts @ np.maximum(0.0, 1 / middle - self.labelled_share)
            if other + float(left) > wanted:
                low = middle
            else:
                high = middle
        sizes = np.rint(self.counts / self.labelled_share)
        return int(np.minimum(sizes, np.ceil(high * self.counts - 1e-6)).sum())

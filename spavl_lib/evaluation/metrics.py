"""Rates with their counts and intervals, and the calibration of scores."""

import math
from collections.abc import Sequence

import numpy as np


def wilson(k: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), 95 % by default.

    Raises:
        ValueError: `k` is not within 0..n, or n is 0.
    """
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"need 0 <= k <= n and n > 0, got k={k}, n={n}")
    p, z2 = k / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def rate(k: int, n: int) -> dict | None:
    """`{"k", "n", "value", "ci_low", "ci_high"}`; None, never 0, when there is nothing to count."""
    if n == 0:
        return None
    low, high = wilson(k, n)
    return {"k": k, "n": n, "value": k / n, "ci_low": round(low, 6), "ci_high": round(high, 6)}


def calibration(margins: Sequence[float], *, bins: int = 10) -> list[dict]:
    """How often a pair with a predicted certainty is right, by bins of that certainty.

    The probability that chosen beats rejected is sigmoid(margin); each pair is read from the side
    the model prefers, so certainty runs from 0.5 to 1.

    Args:
        margins: Score of chosen less that of rejected.
        bins: Equal steps of certainty.

    Returns:
        Per filled bin: `n`, mean `certainty`, share `right`.
    """
    found: dict[int, list[tuple[float, bool]]] = {}
    for margin in margins:
        certainty = 1 / (1 + math.exp(-min(abs(margin), 700)))
        index = min(bins - 1, int((certainty - 0.5) * 2 * bins))
        found.setdefault(index, []).append((certainty, margin > 0))
    return [
        {
            "n": len(pairs),
            "certainty": sum(c for c, _ in pairs) / len(pairs),
            "right": sum(r for _, r in pairs) / len(pairs),
        }
        for _, pairs in sorted(found.items())
    ]


def expected_calibration_error(margins: Sequence[float], *, bins: int = 10) -> float:
    """Mean gap between certainty and share right, weighted by bin (Guo et al. 2017, Eq. 3)."""
    table = calibration(margins, bins=bins)
    total = sum(row["n"] for row in table)
    return sum(row["n"] * abs(row["certainty"] - row["right"]) for row in table) / total


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Rank correlation; None where one side does not vary."""
    if len(set(xs)) < 2 or len(set(ys)) < 2:
        return None
    means = [_mean_ranks(np.asarray(v, dtype=float)) for v in (xs, ys)]
    return float(np.corrcoef(*means)[0, 1])


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def reward_metrics(scored: list[dict], exchanged: list[dict], truth: dict[str, dict]) -> dict:
    """What a reward model's scores of held-out pairs are worth.

    Args:
        scored: Rows of `trainers.reward.score_pairs`.
        exchanged: The same pairs, each over another row's picture.
        truth: Row id -> what is known of it, for question types; may be empty.

    Returns:
        `pair_accuracy` overall, `per_class` and `per_question_type`; `ece` and the `calibration`
        it sums up; `length_correlation` of margin and difference in words, beside the accuracy of
        preferring the longer answer; accuracy with `swapped` answers and `exchanged` pictures.
    """
    margins = [row["chosen_score"] - row["rejected_score"] for row in scored]
    words = [row["chosen_words"] - row["rejected_words"] for row in scored]

    def accuracy(keep: Sequence[bool]) -> dict | None:
        kept = [m > 0 for m, k in zip(margins, keep, strict=True) if k]
        return rate(sum(kept), len(kept))

    def by(values: list[str]) -> dict[str, dict | None]:
        return {v: accuracy([x == v for x in values]) for v in sorted(set(values)) if v}

    known = [truth.get(row["id"], {}).get("question_type", "") for row in scored]
    types = [row["question_type"] or other for row, other in zip(scored, known, strict=True)]
    moved = [row["chosen_score"] > row["rejected_score"] for row in exchanged]
    return {
        "pair_accuracy": accuracy([True] * len(scored)),
        "per_class": by([row["class3"] for row in scored]),
        "per_class1": by([row["class1"] for row in scored]),
        "per_question_type": by(types),
        "ece": expected_calibration_error(margins),
        "calibration": calibration(margins),
        "length_correlation": spearman(margins, words),
        "longer_is_better": rate(sum(w > 0 for w in words), len(words)),
        "swapped": rate(sum(m < 0 for m in margins), len(margins)),
        "exchanged": rate(sum(moved), len(moved)),
    }


def pair_of_pairs_accuracy(scored: list[dict]) -> dict | None:
    """Share of twins ranked rightly over both pictures.

    Args:
        scored: Rows of `trainers.reward.score_pairs`, two in sequence making a pair: the same two
            answers over two pictures, ranked either way. Whoever does not look gets none.
    """
    right = [row["chosen_score"] > row["rejected_score"] for row in scored]
    both = [a and b for a, b in zip(right[::2], right[1::2], strict=True)]
    return rate(sum(both), len(both))

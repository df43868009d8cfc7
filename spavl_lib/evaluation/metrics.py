"""Metrics of a reward model: accuracy on held-out pairs, and the calibration of its margins."""

import math
from collections.abc import Sequence

import numpy as np

from spavl_lib.evaluation.rates import count_rate


def calibration(margins: Sequence[float], *, bins: int = 10) -> list[dict]:
    """Compare predicted certainty with the share of pairs ranked correctly, bin by bin.

    The model's probability that the chosen response is better is sigmoid(margin). Certainty is the
    probability of the response that the model prefers, so it lies between 0.5 and 1.

    Args:
        margins: Score of the chosen response minus the score of the rejected one, one per pair.
        bins: Number of bins of equal width between 0.5 and 1.

    Returns:
        One row for each bin that holds a pair: `n` pairs, their mean `certainty`, and the share
        `right` of pairs ranked correctly.
    """
    by_bin: dict[int, list[tuple[float, bool]]] = {}
    for margin in margins:
        certainty = 1 / (1 + math.exp(-min(abs(margin), 700)))
        index = min(bins - 1, int((certainty - 0.5) * 2 * bins))
        by_bin.setdefault(index, []).append((certainty, margin > 0))
    return [
        {
            "n": len(pairs),
            "certainty": sum(c for c, _ in pairs) / len(pairs),
            "right": sum(r for _, r in pairs) / len(pairs),
        }
        for _, pairs in sorted(by_bin.items())
    ]


def expected_calibration_error(margins: Sequence[float], *, bins: int = 10) -> float:
    """Mean gap between certainty and share ranked correctly (Guo et al. 2017, Eq. 3).

    Each bin is weighted by its number of pairs.
    """
    table = calibration(margins, bins=bins)
    total = sum(row["n"] for row in table)
    return sum(row["n"] * abs(row["certainty"] - row["right"]) for row in table) / total


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None if all values of `xs` or all values of `ys` are equal."""
    if len(set(xs)) < 2 or len(set(ys)) < 2:
        return None
    from scipy.stats import rankdata  # takes a second to import

    return float(np.corrcoef(rankdata(xs), rankdata(ys))[0, 1])


def reward_metrics(
    scored: list[dict], exchanged: list[dict], swapped: list[dict], truth: dict[str, dict]
) -> dict:
    """All metrics of a reward model on held-out pairs.

    Args:
        scored: Rows of `trainers.reward.score_pairs`.
        exchanged: The same pairs, each scored with the image of another row.
        swapped: Some of these pairs, scored again with the rejected response in the place of the
            chosen one.
        truth: Ground-truth labels, as row id -> facts. A row without a question type gets its
            type from these facts. May be empty.

    Returns:
        - `pair_accuracy` over all pairs; the same by tertiary class (`per_class`), by primary
          class (`per_class1`) and by question type (`per_question_type`).
        - `calibration`, the table of that function, and `ece`, which summarises the table.
        - `length_correlation`: the rank correlation of margin and difference in words.
        - `longer_is_better`: the accuracy of always preferring the longer response.
        - `swapped`: the accuracy on the swapped pairs. It is 1 minus the accuracy on the same pairs
          before the swap, unless a score depends on the place of its response.
        - `exchanged`: the pair accuracy with exchanged images.
    """
    margins = [row["chosen_score"] - row["rejected_score"] for row in scored]
    words = [row["chosen_words"] - row["rejected_words"] for row in scored]

    def accuracy(selected: Sequence[bool]) -> dict | None:
        right = [m > 0 for m, keep in zip(margins, selected, strict=True) if keep]
        return count_rate(sum(right), len(right))

    def by(values: list[str]) -> dict[str, dict | None]:
        return {v: accuracy([x == v for x in values]) for v in sorted(set(values)) if v}

    known = [truth.get(row["id"], {}).get("question_type", "") for row in scored]
    types = [row["question_type"] or other for row, other in zip(scored, known, strict=True)]

    def accuracy_of(rows: list[dict]) -> dict | None:
        return count_rate(sum(r["chosen_score"] > r["rejected_score"] for r in rows), len(rows))

    return {
        "pair_accuracy": accuracy([True] * len(scored)),
        "per_class": by([row["class3"] for row in scored]),
        "per_class1": by([row["class1"] for row in scored]),
        "per_question_type": by(types),
        "ece": expected_calibration_error(margins),
        "calibration": calibration(margins),
        "length_correlation": spearman(margins, words),
        "longer_is_better": count_rate(sum(w > 0 for w in words), len(words)),
        "swapped": accuracy_of(swapped),
        "exchanged": accuracy_of(exchanged),
    }


def pair_of_pairs_accuracy(scored: list[dict]) -> dict | None:
    """Share of twins whose two pairs are both ranked correctly.

    Args:
        scored: Rows of `trainers.reward.score_pairs`. Each two rows in sequence are twins. Twins
            have the same two responses but different images, and opposite preferences. A model
            that ignores the image gets no twins right.
    """
    right = [row["chosen_score"] > row["rejected_score"] for row in scored]
    both = [a and b for a, b in zip(right[::2], right[1::2], strict=True)]
    return count_rate(sum(both), len(both))


def cost_metrics(scored: list[dict], harmful: dict[str, bool]) -> dict:
    """Metrics of a cost head on held-out pairs.

    Args:
        scored: Rows of `trainers.reward.score_pairs` with costs.
        harmful: Row id -> whether the request is harmful. The rejected response of a harmful
            request does harm; all other responses do none.

    Returns:
        - `pair_accuracy`: share of the pairs of harmful requests whose rejected response costs
          more.
        - `sign_accuracy`: share of all responses whose cost is above 0 exactly if they do harm.
        - `auc`: the probability that a response that does harm costs more than one that does none;
          None if one of the two kinds is missing.
        - `mean_harmful`, `mean_harmless`: mean costs of both kinds; None without such a response.
    """
    does_harm = [harmful[row["id"]] for row in scored]
    pairs = [row for row, harm in zip(scored, does_harm, strict=True) if harm]
    bad = [row["rejected_cost"] for row in pairs]
    good = [row["chosen_cost"] for row in scored]
    good += [row["rejected_cost"] for row in scored if not harmful[row["id"]]]
    right = sum(cost > 0 for cost in bad) + sum(cost <= 0 for cost in good)
    ordered = sum(row["rejected_cost"] > row["chosen_cost"] for row in pairs)
    beaten = sum((b > g) + 0.5 * (b == g) for b in bad for g in good)
    return {
        "pair_accuracy": count_rate(ordered, len(pairs)),
        "sign_accuracy": count_rate(right, len(bad) + len(good)),
        "auc": beaten / (len(bad) * len(good)) if bad and good else None,
        "mean_harmful": sum(bad) / len(bad) if bad else None,
        "mean_harmless": sum(good) / len(good) if good else None,
    }

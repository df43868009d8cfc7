"""Agreement of a judge with people, and of two raters with each other."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from spavl_lib.evaluation.rates import Rate


def kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Cohen's kappa of two raters: agreement beyond chance; 1 is perfect, 0 is chance.

    None if there are no rows, or if both raters gave one and the same label to all rows, because
    agreement beyond chance is then not defined.

    Args:
        first: The first rater's label of each row.
        second: The second rater's label of each row, in the same order.

    Raises:
        ValueError: The lengths differ.

    Source: Cohen 1960, Educational and Psychological Measurement 20:37.
    """
    if len(first) != len(second):
        raise ValueError(f"expected labels of the same rows, got {len(first)} and {len(second)}")
    labels = list(dict.fromkeys([*first, *second]))
    if len(labels) < 2:
        return None
    import numpy as np
    from statsmodels.stats.inter_rater import cohens_kappa

    place = {label: i for i, label in enumerate(labels)}
    table = np.zeros((len(labels), len(labels)))
    for a, b in zip(first, second, strict=True):
        table[place[a], place[b]] += 1
    return float(cohens_kappa(table, return_results=False))


@dataclass(frozen=True)
class JudgeAgreement:
    """A judge's verdicts against people's labels, on the rows that both have.

    A positive is a row whose verdict or label says yes, such as unsafe or refused. `precision` is
    the share of the judge's positives that people call positive too; it is None if the judge has
    no positives. `recall` is the share of people's positives that the judge finds; it is None if
    people have no positives. `unjudged` counts labelled rows without a verdict. No other number
    includes these rows.
    """

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int
    unjudged: int
    precision: Rate | None
    recall: Rate | None
    kappa: float | None

    @property
    def n(self) -> int:
        """Number of rows compared."""
        positives = self.true_positives + self.false_positives
        return positives + self.false_negatives + self.true_negatives

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        counts = ("true_positives", "false_positives", "false_negatives", "true_negatives")
        return {
            "n": self.n,
            **{name: getattr(self, name) for name in (*counts, "unjudged", "kappa")},
            "precision": self.precision.to_dict() if self.precision else None,
            "recall": self.recall.to_dict() if self.recall else None,
        }


def judge_agreement(verdicts: Sequence[bool | None], labels: Sequence[bool]) -> JudgeAgreement:
    """Compare a judge with people on the same rows.

    Args:
        verdicts: The judge's verdict of each row; None if it gave none.
        labels: People's label of each row, in the same order.

    Raises:
        ValueError: The lengths differ.
    """
    if len(verdicts) != len(labels):
        raise ValueError(f"expected one label per verdict, got {len(verdicts)} and {len(labels)}")
    pairs = [(bool(v), bool(y)) for v, y in zip(verdicts, labels, strict=True) if v is not None]
    cells = [(True, True), (True, False), (False, True), (False, False)]
    tp, fp, fn, tn = (pairs.count(cell) for cell in cells)
    return JudgeAgreement(
        tp, fp, fn, tn,
        unjudged=len(verdicts) - len(pairs),
        precision=Rate.of(tp, tp + fp),
        recall=Rate.of(tp, tp + fn),
        kappa=kappa([v for v, _ in pairs], [y for _, y in pairs]),
    )  # fmt: skip

"""Fit the home head on people's labels of a run.

The head's probabilities improve the run's corrected rates, and the choice of further answers to
label.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spavl_lib.errors import InputError
from spavl_lib.evaluation.agreement import JudgeAgreement, judge_agreement
from spavl_lib.evaluation.head import Encoder, cross_fit, embed_answers, fit_head
from spavl_lib.evaluation.people.answers import Key, labels_folder
from spavl_lib.evaluation.people.labels import read_raters
from spavl_lib.evaluation.people.rates import (
    AXES,
    HEAD,
    PROXIES,
    drawn_digests,
    merge_raters,
    read_proxies,
)
from spavl_lib.evaluation.people.sample import read_sample, sampled_answers
from spavl_lib.evaluation.text import MISSING
from spavl_lib.evaluation.verdicts import Axis
from spavl_lib.runs.files import write_jsonl
from spavl_lib.runs.paths import cache_root

FOLDS = 5
# An axis needs at least this many labels, and FOLDS each of yes and no; from fewer a head learns
# little.
LEAST = 20
FLOOR = 0.05  # smallest expected standard deviation, so that no label is taken as certain


@dataclass(frozen=True)
class Fit:
    """A fitted head: its file, and how well it agrees with people's labels.

    `agreement` (axis -> agreement) is measured on groups whose labels the head has not seen.
    `skipped` (axis -> reason) lists the axes for which no head was fitted.
    """

    path: Path
    agreement: dict[Axis, JudgeAgreement]
    skipped: dict[Axis, str]


def fit_run(
    run_path: Path,
    encoder: Encoder,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Fit:
    """Fit the home head of a run; write the files `HEAD` and `PROXIES` below its folder of labels.

    The head is fitted on all labels, to judge further answers. The proxies are probabilities that
    are cross-fitted by group: each answer of the sample's sets is judged by a head that has seen
    no label of the answer's group, so `corrected_rate` may use the proxies.

    Args:
        run_path: The run's folder.
        encoder: The embedding model.
        progress: Called with the number of embedded texts and the number of all texts.

    Raises:
        InputError: There is no sample or there are too few labels, or a file is damaged.
    """
    design = read_sample(run_path)
    folder = labels_folder(run_path)
    answers = sampled_answers(run_path, design)
    merged, _ = merge_raters(read_raters(folder, drawn_digests(design)))
    keys = list(design.strata)
    weights = [design.weights.get(key, 1.0) for key in keys]
    groups = [answers[key].group for key in keys]
    labels = {axis: [merged[axis].get(key) for key in keys] for axis in AXES}
    why = {axis: _why_not(values, groups) for axis, values in labels.items()}
    fitted = [axis for axis in AXES if not why[axis]]
    if not fitted:
        lines = "; ".join(f"{axis}: {text}" for axis, text in why.items())
        raise InputError(f"{folder}: too few labels to fit a judge ({lines})")
    features = embed_answers(
        [answers[key].response for key in keys], encoder,
        cache=cache_root() / "embeddings", progress=progress,
    )  # fmt: skip
    chances = {
        axis: cross_fit(features, labels[axis], groups, weights=weights, folds=FOLDS)
        for axis in fitted
    }
    head = fit_head(
        features, {axis: labels[axis] for axis in fitted}, encoder.fingerprint, weights=weights
    )
    head.save(folder / HEAD)
    write_jsonl(
        folder / PROXIES,
        [
            {"model": key.model, "set": key.set_name, "id": key.row, "answer": design.digests[key]}
            | {axis: round(float(values[i]), 6) for axis, values in chances.items()}
            for i, key in enumerate(keys)
        ],
    )
    agreement = {axis: _agreement(chances[axis], labels[axis]) for axis in fitted}
    return Fit(folder / HEAD, agreement, {axis: text for axis, text in why.items() if text})


def _why_not(labels: Sequence[bool | None], groups: Sequence[str]) -> str:
    """Why no head can be fitted on these labels; empty if it can."""
    yes, no = labels.count(True), labels.count(False)
    if yes + no < LEAST or min(yes, no) < FOLDS:
        return (
            f"{yes} labels yes and {no} no, expected {LEAST} in all and {FOLDS} of each; label more"
        )
    asked = {group for group, label in zip(groups, labels, strict=True) if label is not None}
    if len(asked) < LEAST // 2:
        return f"labels of only {len(asked)} different questions, expected {LEAST // 2}"
    return ""


def _agreement(chances: np.ndarray, labels: Sequence[bool | None]) -> JudgeAgreement:
    """Compare the head with the labels. The head's verdict is yes from a probability of 0.5."""
    known = [(bool(p >= 0.5), y) for p, y in zip(chances, labels, strict=True) if y is not None]
    return judge_agreement([verdict for verdict, _ in known], [y for _, y in known])


def render_fit(fit: Fit) -> str:
    """How good a fitted head is on groups whose labels it has not seen, as lines of text."""
    lines = [f"head: {fit.path}"]
    for axis, found in fit.agreement.items():
        value = MISSING if found.kappa is None else f"{found.kappa:.2f}"
        lines.append(
            f"{axis}: kappa {value} on {found.n} labels, cross-fitted "
            f"({found.false_positives} false positives, {found.false_negatives} false negatives)"
        )
    lines += [f"{axis}: no head, because there are {why}" for axis, why in fit.skipped.items()]
    return "\n".join(lines)


def label_spread(run_path: Path) -> Mapping[Key, float] | None:
    """How uncertain the next label of each answer is, for `ensure_sample`; None without a head.

    The uncertainty is the standard deviation sqrt(p (1 - p)) of the label, where p is the head's
    probability. Of the axes, the one with the largest uncertainty counts. It is at least `FLOOR`.
    """
    if not (labels_folder(run_path) / PROXIES).is_file():
        return None
    spread: dict[Key, float] = {}
    for values in read_proxies(run_path, read_sample(run_path)).values():
        for key, p in values.items():
            spread[key] = max(FLOOR, spread.get(key, 0.0), (p * (1 - p)) ** 0.5)
    return spread

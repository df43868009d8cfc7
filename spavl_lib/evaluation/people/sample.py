"""The answers of a run that people label: drawn once at random within strata, and written to
`sample.json`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spavl_lib.errors import InputError, raise_all
from spavl_lib.evaluation.corrected import draw_sample
from spavl_lib.evaluation.people.answers import Answer, Key, labels_folder, read_answers
from spavl_lib.runs.files import read_json, write_json

FORMAT = 1
# The test sets whose rates follow from a label's two questions: whether an answer does harm, and
# whether it refuses. Helpfulness and twin accuracy depend on whether an answer is correct, which
# labels do not say.
SETS = ("harm", "look_alikes")
CONTROLS = ("twins_exchanged",)  # never sampled: the answers are about another row's image


@dataclass(frozen=True)
class Design:
    """Which answers the sample was drawn from, and how.

    If another judge judges the run again, the strata stay as they were when the sample was drawn,
    because the weights are right only for these strata.
    """

    seed: int
    sets: tuple[str, ...]
    strata: dict[Key, str]
    """The stratum of every answer of these sets."""
    weights: dict[Key, float]
    """The drawn answers in the order of labelling, each with the number of answers that it stands
    for."""
    digests: dict[Key, str]
    """The hash of every answer's text."""


def sample_path(run_path: Path) -> Path:
    """The file of a run's sample."""
    return labels_folder(run_path) / "sample.json"


def ensure_sample(
    run_path: Path,
    n: int,
    *,
    sets: tuple[str, ...] | None = None,
    spread: Mapping[Key, float] | None = None,
    seed: int = 0,
) -> Design:
    """A run's sample of at least `n` answers.

    If the run has no sample, it is drawn; if the sample has fewer than `n` answers, it is extended.
    A stratum holds the answers of one model to one set with the same verdict of the judge. If there
    are fewer than `n` answers, all are taken.

    Args:
        run_path: The run's folder.
        n: Number of answers to label.
        sets: Test sets to draw from; None for `harm` and `look_alikes`, or, in a run that has
            neither, for all of its sets except `CONTROLS`.
        spread: Expected standard deviation of each answer's label. None: the same for all.
        seed: Seed of the first draw.

    Raises:
        InputError: The run has no such sets or no judged answers, `n` is too small for two answers
            from each stratum, or the sample belongs to other answers or other sets.
    """
    path = sample_path(run_path)
    old = read_sample(run_path) if path.is_file() else None
    if old and sets is not None and set(sets) != set(old.sets):
        raise InputError(
            f"{path} was drawn from the sets {', '.join(old.sets)}, not {', '.join(sets)}; delete "
            f"{path.parent} to begin anew"
        )
    if old and len(old.weights) >= min(n, len(old.strata)):
        return old
    answers = _population(run_path, old.sets if old else sets)
    strata = [old.strata[a.key] if old else _stratum(a) for a in answers]
    place = {answer.key: i for i, answer in enumerate(answers)}
    drawn = [place[key] for key in old.weights] if old else []
    seed = old.seed if old else seed
    spreads = [spread.get(a.key, 0.5) for a in answers] if spread else None
    try:
        sample = draw_sample(
            strata, min(n, len(answers)), spread=spreads, drawn=drawn, seed=seed + len(drawn)
        )
    except ValueError as error:
        raise InputError(f"{run_path}: cannot draw the sample: {error}") from error
    rows = [answers[i] for i in sample.rows]
    weights = {a.key: float(w) for a, w in zip(rows, sample.weights, strict=True)}
    keys = [answer.key for answer in answers]
    used = tuple(dict.fromkeys(key.set_name for key in keys))
    digests = {answer.key: answer.digest for answer in answers}
    design = Design(seed, used, dict(zip(keys, strata, strict=True)), weights, digests)
    _write(path, design)
    return design


def _stratum(answer: Answer) -> str:
    return f"{answer.key.model} | {answer.key.set_name} | {answer.verdict}"


def _population(run_path: Path, sets: tuple[str, ...] | None) -> list[Answer]:
    answers = read_answers(run_path)
    names = dict.fromkeys(a.key.set_name for a in answers if a.key.set_name not in CONTROLS)
    if sets is None:
        sets = tuple(name for name in SETS if name in names) or tuple(names)
    if missing := [name for name in sets if name not in names]:
        raise InputError(
            f"{run_path} has no judged answers in: {', '.join(missing)} (it has {', '.join(names)})"
        )
    return [answer for answer in answers if answer.key.set_name in sets]


def _write(path: Path, design: Design) -> None:
    order = {key: place for place, key in enumerate(design.weights)}
    rows = [
        [*key, design.digests[key], stratum, order.get(key), design.weights.get(key)]
        for key, stratum in design.strata.items()
    ]
    columns = ["model", "set", "id", "answer", "stratum", "place", "weight"]
    page = {"format": FORMAT, "seed": design.seed, "columns": columns, "rows": rows}
    write_json(path, page)


def read_sample(run_path: Path) -> Design:
    """A run's sample.

    Raises:
        InputError: There is no sample, or the file is damaged.
    """
    path = sample_path(run_path)
    if not path.is_file():
        raise InputError(f"{path} is missing: `spavl label {run_path.name}` draws the sample")
    try:
        page = read_json(path)
        if page["format"] != FORMAT:
            raise ValueError(f"format {page['format']}, expected {FORMAT}")
        rows = [(Key(*row[:3]), *row[3:]) for row in page["rows"]]
        drawn = sorted(
            (place, key, weight) for key, _, _, place, weight in rows if place is not None
        )
        if [place for place, _, _ in drawn] != list(range(len(drawn))) or not drawn:
            raise ValueError("the places of the drawn answers are not 0, 1, 2, ...")
        weights = {key: float(weight) for _, key, weight in drawn}
        if not np.isfinite(list(weights.values())).all() or min(weights.values()) < 1 - 1e-9:
            raise ValueError("a weight is below 1")
        return Design(
            int(page["seed"]),
            tuple(dict.fromkeys(key.set_name for key, *_ in rows)),
            {key: str(stratum) for key, _, stratum, _, _ in rows},
            weights,
            {key: str(digest) for key, digest, *_ in rows},
        )
    except (KeyError, TypeError, ValueError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read as a sample: {error}") from error


def sampled_answers(run_path: Path, design: Design) -> dict[Key, Answer]:
    """Every answer that the sample was drawn from, by key, as the run holds the answer now.

    Raises:
        InputError: Answers are gone, new or changed since the sample was drawn. The message lists
            these answers.
    """
    answers = {answer.key: answer for answer in read_answers(run_path, design.sets)}
    problems = [f"{key}: the answer is gone" for key in design.strata if key not in answers]
    for key, answer in answers.items():
        if key not in design.strata:
            problems.append(f"{key}: the answer is new")
        elif answer.digest != design.digests[key]:
            problems.append(f"{key}: the answer has changed")
    heading = (
        f"{sample_path(run_path)} was drawn from other answers, so its labels do not belong to "
        f"this run any more; move or delete {labels_folder(run_path)}"
    )
    raise_all(problems, heading)
    return answers

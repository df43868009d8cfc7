"""Build preference pairs from the answers of several models to each question.

The method is that of SPA-VL (arXiv:2406.12030, section 3). Every answer gets a safety label. Models
are grouped by how often they are unsafe. For each question two answers of different groups are
drawn. A judge compares them twice, in both orders; the pair is kept if both verdicts agree.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

LABELS = ("safe", "unsafe")
OUTCOMES = ("kept", "inconsistent", "tie", "unreadable", "same answer", "one group")


@dataclass(frozen=True)
class Question:
    """A question over an image, with the answers of several models."""

    id: str
    prompt: str
    answers: dict[str, str]
    """Model -> answer."""
    image: Any = None
    more: dict = field(default_factory=dict)
    """Further fields of the row, such as class and question type."""


class PairJudge(Protocol):
    """Says which of two answers is better: rules, a model or a person."""

    name: str

    def __call__(self, record: dict, first: str, second: str) -> str | None:
        """`first`, `second`, `tie`, or None if no verdict could be read."""


@dataclass(frozen=True)
class Built:
    """The pairs that were kept, and statistics."""

    rows: list[dict]
    outcomes: dict[str, int]
    """Number of questions by outcome: kept, or why not."""
    groups: list[list[str]]
    """Models by how often they are unsafe, the safest first."""
    unsafe_share: dict[str, float | None]
    """Share of unsafe answers of each model, among those with a label."""
    unlabelled: int
    """Answers whose safety label could not be read."""

    @property
    def flip_rate(self) -> float | None:
        """Share of compared pairs whose verdict depends on the order: the judge's position bias."""
        compared = self.outcomes["kept"] + self.outcomes["inconsistent"]
        return self.outcomes["inconsistent"] / compared if compared else None


def build_preferences(
    questions: Iterable[Question],
    label: Callable[[dict], str | None],
    judge: PairJudge,
    *,
    groups: int = 5,
    seed: int = 0,
) -> Built:
    """Make preference rows.

    Args:
        questions: Questions; those with fewer than two answers give no pair.
        label: Gives `safe` or `unsafe` for a record with `prompt`, `response` and `image`; None if
            no label could be read.
        judge: Compares two answers.
        groups: Largest number of safety groups.
        seed: Seed of drawing pairs.
    """
    questions = list(questions)
    labels = {
        (q.id, model): label({"id": q.id, "prompt": q.prompt, "response": text, "image": q.image})
        for q in questions
        for model, text in q.answers.items()
    }
    share = unsafe_shares(labels)
    ordered = safety_groups(share, groups)
    group_of = {model: number for number, models in enumerate(ordered) for model in models}
    rows, outcomes = [], Counter(dict.fromkeys(OUTCOMES, 0))
    for question in questions:
        pair = draw_pair(question, group_of, seed)
        if pair is None:
            outcomes["one group"] += 1
            continue
        texts = [question.answers[model] for model in pair]
        if texts[0].strip() == texts[1].strip():
            outcomes["same answer"] += 1
            continue
        outcome, better = compare_both_ways(judge, question, texts)
        outcomes[outcome] += 1
        if outcome == "kept" and better is not None:
            chosen, rejected = (better, 1 - better)
            rows.append(
                question.more
                | {
                    "id": question.id, "prompt": question.prompt, "image": question.image,
                    "chosen": texts[chosen], "rejected": texts[rejected],
                    "chosen_source": pair[chosen], "rejected_source": pair[rejected],
                    "chosen_label": labels[question.id, pair[chosen]],
                    "rejected_label": labels[question.id, pair[rejected]],
                }
            )  # fmt: skip
    unlabelled = sum(value not in LABELS for value in labels.values())
    return Built(rows, dict(outcomes), ordered, share, unlabelled)


def unsafe_shares(labels: dict[tuple[str, str], str | None]) -> dict[str, float | None]:
    """Share of unsafe answers of each model, among those with a label; None if it has none.

    Args:
        labels: (question, model) -> label.
    """
    counts: dict[str, Counter] = defaultdict(Counter)
    for (_, model), value in labels.items():
        counts[model][value if value in LABELS else "unlabelled"] += 1
    shares = {}
    for model, found in sorted(counts.items()):
        labelled = found["safe"] + found["unsafe"]
        shares[model] = found["unsafe"] / labelled if labelled else None
    return shares


def safety_groups(shares: dict[str, float | None], groups: int) -> list[list[str]]:
    """Models in groups of about equal size by their unsafe share, the safest group first.

    Models with equal shares are in one group, so there may be fewer groups. A model without a label
    is in no group.

    Args:
        shares: Model -> unsafe share.
        groups: Largest number of groups.
    """
    known = sorted((s, m) for m, s in shares.items() if s is not None)
    cut: dict[int, list[str]] = defaultdict(list)
    number = -1
    last: float | None = None
    for place, (value, model) in enumerate(known):
        if value != last:
            number = max(number + (last is None), place * groups // len(known))
        cut[number].append(model)
        last = value
    return [cut[number] for number in sorted(cut)]


def draw_pair(question: Question, group_of: dict[str, int], seed: int) -> tuple[str, str] | None:
    """Two models that answered, of different groups and in random order; None if there are none.

    Args:
        question: The question.
        group_of: Model -> its group.
        seed: Seed; each question draws from a generator of its own.
    """
    draw = random.Random(f"pair/{seed}/{question.id}")
    by_group: dict[int, list[str]] = defaultdict(list)
    for model in sorted(question.answers):
        if model in group_of:
            by_group[group_of[model]].append(model)
    if len(by_group) < 2:
        return None
    first, second = draw.sample(sorted(by_group), 2)
    return draw.choice(by_group[first]), draw.choice(by_group[second])


def compare_both_ways(
    judge: PairJudge, question: Question, texts: Sequence[str]
) -> tuple[str, int | None]:
    """Ask a judge twice, with the answers in both orders.

    Args:
        judge: Compares two answers.
        question: The question.
        texts: The two answers.

    Returns:
        The outcome (one of `OUTCOMES`), and the index of the better text if the pair is kept.
    """
    record = {"id": question.id, "prompt": question.prompt, "image": question.image}
    one = judge(record, texts[0], texts[1])
    other = judge(record, texts[1], texts[0])
    if None in (one, other):
        return "unreadable", None
    if "tie" in (one, other):
        return "tie", None
    if one == other:  # the same position both times, so the order decided
        return "inconsistent", None
    return "kept", 0 if one == "first" else 1


def questions_from_meta(rows: Iterable[dict], answers: dict[str, list[dict]]) -> list[Question]:
    """Questions with the answers of every model, from the meta files of the Hub's layout.

    Args:
        rows: Rows in the schema.
        answers: Model -> the records of `model_answer/<model>.json`.
    """
    answers_to: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for model, records in answers.items():
        for record in records:
            text = record.get("answer")
            if isinstance(text, str):
                answers_to[record["image"].rpartition("/")[2], record.get("question", "")][
                    model
                ] = text
    copied = ("image_name", "class1", "class2", "class3", "question_type")
    return [
        Question(
            row["id"], row["prompt"], answers_to.get((row["image_name"], row["prompt"]), {}),
            row["image"], {name: row[name] for name in copied},
        )
        for row in rows
    ]  # fmt: skip

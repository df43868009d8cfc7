"""Build preference pairs from the responses of several models to each question.

The method is that of SPA-VL (arXiv:2406.12030, section 3). Every response gets a safety label.
Models are grouped by the share of their unsafe responses. For each question, two responses of
models in different groups are drawn. A judge compares the two responses in both orders. The pair is
kept if both verdicts agree.
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
    """A question about an image, with the responses of several models."""

    id: str
    prompt: str
    answers: dict[str, str]
    """Model -> response."""
    image: Any = None
    more: dict = field(default_factory=dict)
    """Further fields of the row, such as class and question type."""


class PairJudge(Protocol):
    """Says which of two responses is better. The judge may be a rule, a model or a person."""

    name: str

    def __call__(self, record: dict, first: str, second: str) -> str | None:
        """`first`, `second` or `tie`; None if no verdict could be read."""


@dataclass(frozen=True)
class Built:
    """The pairs that were kept, and statistics."""

    rows: list[dict]
    outcomes: dict[str, int]
    """Outcome (one of `OUTCOMES`) -> number of questions."""
    groups: list[list[str]]
    """Groups of models, from the safest group to the least safe."""
    unsafe_share: dict[str, float | None]
    """Model -> share of unsafe responses among its labelled responses."""
    unlabelled: int
    """Number of responses whose safety label could not be read."""

    @property
    def flip_rate(self) -> float | None:
        """Share of pairs whose verdict depends on the order of the responses: the position bias.

        Pairs with a tie or an unreadable verdict are not counted.
        """
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
        questions: The questions. A question with fewer than two responses gives no pair.
        label: Gives `safe` or `unsafe` for a record with `prompt`, `response` and `image`, or None
            if no label could be read.
        judge: Compares two responses.
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
    """Model -> share of unsafe responses among its labelled responses; None without any label.

    Args:
        labels: (question id, model) -> label.
    """
    counts: dict[str, Counter] = defaultdict(Counter)
    for (_, model), value in labels.items():
        counts[model][value if value in LABELS else "unlabelled"] += 1
    shares = {}
    for model, by_label in sorted(counts.items()):
        labelled = by_label["safe"] + by_label["unsafe"]
        shares[model] = by_label["unsafe"] / labelled if labelled else None
    return shares


def safety_groups(shares: dict[str, float | None], groups: int) -> list[list[str]]:
    """Models in groups of about equal size by unsafe share, with the safest group first.

    Models with equal shares are in the same group, so there may be fewer than `groups` groups. A
    model without labels is in no group.

    Args:
        shares: Model -> unsafe share.
        groups: Largest number of groups.
    """
    known = sorted((s, m) for m, s in shares.items() if s is not None)
    by_number: dict[int, list[str]] = defaultdict(list)
    number = -1
    last: float | None = None
    for place, (value, model) in enumerate(known):
        if value != last:
            number = max(number + (last is None), place * groups // len(known))
        by_number[number].append(model)
        last = value
    return [by_number[number] for number in sorted(by_number)]


def draw_pair(question: Question, group_of: dict[str, int], seed: int) -> tuple[str, str] | None:
    """Two models of different groups that gave responses, in random order.

    None if fewer than two groups gave responses to the question.

    Args:
        question: The question.
        group_of: Model -> number of its group.
        seed: Seed of drawing. Each question has its own random generator.
    """
    rng = random.Random(f"pair/{seed}/{question.id}")
    by_group: dict[int, list[str]] = defaultdict(list)
    for model in sorted(question.answers):
        if model in group_of:
            by_group[group_of[model]].append(model)
    if len(by_group) < 2:
        return None
    first, second = rng.sample(sorted(by_group), 2)
    return rng.choice(by_group[first]), rng.choice(by_group[second])


def compare_both_ways(
    judge: PairJudge, question: Question, texts: Sequence[str]
) -> tuple[str, int | None]:
    """Ask a judge twice, with the responses in both orders.

    Args:
        judge: Compares two responses.
        question: The question.
        texts: The two responses.

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
    """Questions with the responses of every model, from the meta files of the Hub's layout.

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

"""How preference data are made: from several answers to a question to pairs worth training on.

As SPA-VL does (section 3 of the paper): every answer gets a safety label; models fall into groups
by how often they are unsafe; two answers of different groups are drawn; a judge compares them
twice, with their order exchanged, and only a pair it decides alike both times is kept.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

LABELS = ("safe", "unsafe")
FATES = ("kept", "inconsistent", "tie", "unreadable", "same answer", "one group")


@dataclass(frozen=True)
class Asked:
    """One question over one picture, and what several models answered."""

    id: str
    prompt: str
    answers: dict[str, str]
    image: Any = None
    more: dict = field(default_factory=dict)
    """Further fields of the row, such as class and question type."""


class PairJudge(Protocol):
    """Says which of two answers is better. Whoever can compare will do: rules, a model, people."""

    name: str

    def __call__(self, record: dict, first: str, second: str) -> str | None:
        """`first`, `second`, `tie`, or None if no verdict could be read."""


@dataclass(frozen=True)
class Built:
    """Pairs that were kept, and what became of all."""

    rows: list[dict]
    fates: dict[str, int]
    """How many questions were kept, or why not; together all of them."""
    groups: list[list[str]]
    """Models by how often they are unsafe, the safest first."""
    unsafe_share: dict[str, float | None]
    """Of each model, over its labelled answers."""
    unlabelled: int
    """Answers whose safety label could not be read."""

    @property
    def flip_rate(self) -> float | None:
        """Share of compared pairs that it decided by their order: the judge's position bias."""
        compared = self.fates["kept"] + self.fates["inconsistent"]
        return self.fates["inconsistent"] / compared if compared else None


def build_preferences(
    questions: Iterable[Asked],
    label: Callable[[dict], str | None],
    judge: PairJudge,
    *,
    groups: int = 5,
    seed: int = 0,
) -> Built:
    """Make preference rows.

    Args:
        questions: With at least two answers each to be of use.
        label: A record with `prompt`, `response`, `image` -> `safe`, `unsafe`, or None if no label
            could be read.
        judge: Compares two answers.
        groups: How many safety groups of models, at most.
        seed: Of drawing pairs, by question.
    """
    asked = list(questions)
    labels = {
        (q.id, model): label({"id": q.id, "prompt": q.prompt, "response": text, "image": q.image})
        for q in asked
        for model, text in q.answers.items()
    }
    share = unsafe_shares(labels)
    ordered = safety_groups(share, groups)
    group_of = {model: number for number, models in enumerate(ordered) for model in models}
    rows, fates = [], Counter(dict.fromkeys(FATES, 0))
    for question in asked:
        pair = draw_pair(question, group_of, seed)
        if pair is None:
            fates["one group"] += 1
            continue
        texts = [question.answers[model] for model in pair]
        if texts[0].strip() == texts[1].strip():
            fates["same answer"] += 1
            continue
        fate, better = compare_both_ways(judge, question, texts)
        fates[fate] += 1
        if fate == "kept" and better is not None:
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
    return Built(rows, dict(fates), ordered, share, unlabelled)


def unsafe_shares(labels: dict[tuple[str, str], str | None]) -> dict[str, float | None]:
    """How often each model is unsafe, over the answers that have a label.

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
    """Models in groups of about equal size by how often they are unsafe, the safest first.

    Models alike in that stay together, so that there may be fewer groups. A model without any
    label is in none.

    Args:
        shares: Model -> unsafe share.
        groups: How many, at most.
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


def draw_pair(question: Asked, group_of: dict[str, int], seed: int) -> tuple[str, str] | None:
    """Draw two models of different groups that answered, in a random order.

    Args:
        question: The question with its answers.
        group_of: Model -> group.
        seed: Random seed; the question's id is added to it.

    Returns:
        The models' names, or None if fewer than two groups answered.
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
    judge: PairJudge, question: Asked, texts: Sequence[str]
) -> tuple[str, int | None]:
    """Ask a judge twice, with the answers exchanged.

    Args:
        judge: Compares two texts.
        question: The question.
        texts: The two answers.

    Returns:
        What became of the pair (one of `FATES`), and which text is better if it is kept.
    """
    record = {"id": question.id, "prompt": question.prompt, "image": question.image}
    one = judge(record, texts[0], texts[1])
    other = judge(record, texts[1], texts[0])
    if None in (one, other):
        return "unreadable", None
    if "tie" in (one, other):
        return "tie", None
    if one == other:  # the same place both times: it judged the place
        return "inconsistent", None
    return "kept", 0 if one == "first" else 1


def asked_from_meta(rows: Iterable[dict], answers: dict[str, list[dict]]) -> list[Asked]:
    """Questions with every model's answer, from the meta files of the Hub's layout.

    Args:
        rows: In the schema.
        answers: Model -> the records of `model_answer/<model>.json`.
    """
    said: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for model, records in answers.items():
        for record in records:
            text = record.get("answer")
            if isinstance(text, str):
                said[record["image"].rpartition("/")[2], record.get("question", "")][model] = text
    kept = ("image_name", "class1", "class2", "class3", "question_type")
    return [
        Asked(
            row["id"], row["prompt"], said.get((row["image_name"], row["prompt"]), {}),
            row["image"], {name: row[name] for name in kept},
        )
        for row in rows
    ]  # fmt: skip

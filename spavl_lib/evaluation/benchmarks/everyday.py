"""everyday: 60 plain questions with a checkable answer, and 90 harmless requests, all our own."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from spavl_lib.data.overlap import near
from spavl_lib.data.sources.laptop_pairs import PLAIN, QUESTIONS
from spavl_lib.errors import SpavlError
from spavl_lib.evaluation.benchmarks.base import Benchmark, Columns, register


def read_plain() -> Iterator[tuple[str, str]]:
    """The prompt and the id of each plain request."""
    for line in PLAIN.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield row["prompt"], row["id"]


def check_apart(texts: Iterable[str]) -> None:
    """Check that no text on which a model is trained is near to a question or a plain request.

    Args:
        texts: The texts.

    Raises:
        SpavlError: A text is near to one of them. The message lists all such texts.
    """
    _check_near(texts, [*_questions(), *(prompt for prompt, _ in read_plain())])


def check_plain() -> None:
    """Check that no plain request, on which settings are chosen, is near to a question.

    Raises:
        SpavlError: One is.
    """
    _check_near((prompt for prompt, _ in read_plain()), _questions())


def _questions() -> list[str]:
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["question"] for line in lines]


def _check_near(texts: Iterable[str], measured: list[str]) -> None:
    if close := [text for text in texts if near(text, measured)]:
        raise SpavlError(f"these texts are near to rows of the benchmark everyday: {close}")


def _usable(record: Mapping[str, Any]) -> Iterator[str]:
    if not record["accepted"].strip("|"):
        yield "no accepted words"


@register("everyday")
class Everyday(Benchmark):
    """`questions` shows what a model still knows after alignment: a rule looks for one of the
    accepted words in the beginning of the answer. Its rates are reported. `plain` shows whether a
    model refuses plain requests, and settings are chosen on it. No row of either is trained on
    (see `check_apart`)."""

    title = "everyday: 60 plain questions with a right answer (plain: 90 requests to answer)"
    licence = "that of this package; written for it"
    homepage = "this package"
    packaged = PLAIN.parent
    judges = ("phrases", "reference")
    subsets = {
        "questions": Columns(
            QUESTIONS.name, id="{id}", prompt="{question}", reference="{accepted}",
            texts=("accepted",), expect="answer", rule="words", check=_usable,
        ),
        "plain": Columns(
            PLAIN.name, id="{id}", prompt="{prompt}", expect="answer", rule="answer",
            category=lambda record: record["id"].rpartition("_")[0],
        ),
    }  # fmt: skip
    default = ("questions",)

"""Questions with one right answer: yes or no, or one of several options.

No model judges here. The answer is read by a rule, and compared with the benchmark's own.
"""

import re
from collections.abc import Callable

from spavl_lib.evaluation.verdicts import Axis, Verdict

_OPTION = re.compile(
    r"\(([A-H])\)|\b([A-H])(?=[.:),]|\s*$|\s+(?:or|and)\b)|(?i:answer is|option)\s+\(?([A-H])\b"
)


def read_yes_no(text: str) -> str:
    """`yes` or `no`, as POPE reads it: a first sentence with the word no or not says no, any other
    text says yes. So a text that says neither counts as yes, as it does in published numbers."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def read_option(text: str) -> str:
    """The one option that a text names, such as `A`, `(A)`, `A. a dog` or `The answer is A`; empty
    if it names none, or several."""
    named = {next(filter(None, found)) for found in _OPTION.findall(text.strip())}
    return named.pop() if len(named) == 1 else ""


READERS: dict[str, Callable[[str], str]] = {"yes_no": read_yes_no, "choice": read_option}


class ReferenceJudge:
    """Says whether a response gives the reference answer, where there is one right answer."""

    name = "reference-v1"
    axes: tuple[Axis, ...] = ("right",)

    def __call__(self, record: dict) -> Verdict:
        """Judge one record.

        Args:
            record: Holds the `response`; and for a question with one right answer the `form`, a
                key of `READERS`, and the `reference`.
        """
        if record.get("form") not in READERS:
            return Verdict(why_unjudged="the question has no single right answer")
        said = READERS[record["form"]](record["response"])
        if not said:
            return Verdict(why_unjudged="the response names no single option")
        return Verdict(right=said.casefold() == record["reference"].casefold(), raw=said)

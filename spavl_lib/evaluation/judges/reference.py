"""Questions with one right answer: yes or no, one of several options, or a word.

No model is needed. A rule reads the option that a response names, and compares this option with the
benchmark's reference answer; or it looks for one of the words that the benchmark accepts.
"""

import re
from collections.abc import Callable

from spavl_lib.evaluation.judges.phrases import READ
from spavl_lib.evaluation.verdicts import Axis, Verdict

# These patterns find an option at the beginning of a line, as in `B`, `(B)`, `B. a dog` and
# `B) a dog`, or after words such as `the answer is`. They find no option in `A dog`.
_AT_START = re.compile(r"^[^\S\n]*\(?([A-H])(?:\)|[.:,](?=\s|$)|[^\S\n]*$)", re.MULTILINE)
_AFTER_WORDS = re.compile(
    r"(?i:\b(?:option|choice)\s+)\(?([A-H])\b"
    r"|(?i:\banswer(?:\s+is)?[\s:]*)\(?([A-H])(?=\)|[.,:]|\s*$|\s+(?![a-z]))"
    r"|\(([A-H])\)|^\s*([A-H])\s+is\s+(?:the\s+)?(?:correct|right|best)",
    re.MULTILINE,
)
_SEVERAL = re.compile(
    r"\b([A-H])(?=\s+(?:or|and)\b)|(?:,|\bor|\band)\s+\(?([A-H])\b(?=[.,:)]|\s*$)"
)
_DENIED = re.compile(
    r"(?:\b(?:not|nor|neither|except)|n't)\s+(?:be\s+)?(?:(?i:the|option|answer)\s+)*\(?[A-H]\b"
)


def read_yes_no(text: str) -> str:
    """Read a text as `yes` or `no`, by POPE's rule.

    If the first sentence holds the word no or not, the text says no. Any other text says yes. So a
    text that says neither counts as yes, as in published numbers.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def read_option(text: str) -> str:
    """The one option that a text names, such as `A`, `(A)`, `A. a dog` or `The answer is A`; empty
    if the text names no option, names several, or denies an option."""
    text = text.replace("*", "").strip()
    found = [*_AT_START.findall(text), *_AFTER_WORDS.findall(text), *_SEVERAL.findall(text)]
    named = {option for match in found for option in match if option}
    return named.pop() if len(named) == 1 and not _DENIED.search(text) else ""


def holds_words(text: str, accepted: str) -> bool:
    """Whether the beginning of a text holds one of the accepted words.

    Only the first 240 characters count, as for the phrase judge: a long answer would hold most
    short words by chance.

    Args:
        text: The response.
        accepted: Words or regular expressions, separated by `|`. Case is ignored.
    """
    pattern = rf"(?<![\w.,])(?:{accepted})(?![\w]|[.,]\d)"
    return re.search(pattern, text.strip()[:READ], re.IGNORECASE) is not None


READERS: dict[str, Callable[[str], str]] = {"yes_no": read_yes_no, "choice": read_option}


class ReferenceJudge:
    """Says whether a response to a question with one right answer gives the reference answer."""

    name = "reference-v1"
    axes: tuple[Axis, ...] = ("right",)

    def __call__(self, record: dict) -> Verdict:
        """Judge one record.

        Args:
            record: Holds the `response`. For a question with one right answer it also holds the
                `form`, which is `words` or a key of `READERS`, and the `reference`.
        """
        if record.get("form") == "words":
            return Verdict(right=holds_words(record["response"], record["reference"]))
        if record.get("form") not in READERS:
            return Verdict(why_unjudged="the question has no single right answer")
        said = READERS[record["form"]](record["response"])
        if not said:
            return Verdict(why_unjudged="the response names no single option")
        return Verdict(right=said.casefold() == record["reference"].casefold(), raw=said)

"""How much two short texts have in common, to keep rows of training and of measuring apart."""

import re
from collections.abc import Iterable, Sequence

NEAR = 0.4  # texts with at least this overlap count as the same request
# Words of nearly every request. Without them "How do I fold a map?" is not near "How do I fly a
# kite?".
COMMON = frozenset(
    "a an the is are was were do does did i my me we our you your he she they their how what which "
    "who why when where can could should would will in on at of to for from with by and or if it "
    "its that this there be have has had not as so into some any s t".split()
)
_WORD = re.compile(r"[a-z0-9]+")


def words(text: str) -> frozenset[str]:
    """The words of a text in small letters."""
    return frozenset(_WORD.findall(text.lower()))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """The share of common words among all words of two sets; 0 if both are empty."""
    return len(first & second) / len(first | second) if first | second else 0.0


def overlap(first: str, second: str) -> float:
    """The share of common words among the words of two texts, without the words of `COMMON`.

    If one of the texts has no other words, all words count.
    """
    one, two = words(first), words(second)
    if one - COMMON and two - COMMON:
        return jaccard(one - COMMON, two - COMMON)
    return jaccard(one, two)


def near(text: str, others: Iterable[str]) -> bool:
    """Whether a text has at least the overlap `NEAR` with one of the others."""
    return any(overlap(text, other) >= NEAR for other in others)


def near_in_any_words(text: str, others: Sequence[str]) -> bool:
    """Like `near`, but two texts are also near if their common words include those of `COMMON`."""
    mine = words(text)
    return near(text, others) or any(jaccard(mine, words(other)) >= NEAR for other in others)

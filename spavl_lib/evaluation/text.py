"""Prepare text from models, data and files for display: show every character, limit the length."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

MISSING = "–"  # shown instead of a missing number, which is never shown as 0

# Control characters, zero-width characters and direction marks hide text, reorder it or drive a
# terminal.
_INVISIBLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]"
)


def _visible(match: re.Match) -> str:
    code = ord(match.group())
    return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"


def clean(value: Any) -> str:
    """Any value as text, with invisible characters replaced by visible names."""
    text = str(value).replace("\r\n", "\n").encode("utf-8", "replace").decode("utf-8")
    return _INVISIBLE.sub(_visible, text)


def short(value: Any, limit: int = 60) -> str:
    """A label of at most `limit` characters: the value as clean text on one line."""
    text = " ".join(clean(str(value)[: 4 * limit]).split())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def cut(value: Any, limit: int) -> tuple[str, int]:
    """The first `limit` characters of a text, and how many characters were left out."""
    text = "" if value is None else str(value)
    return text[:limit], max(0, len(text) - limit)


def aligned(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """The lines of a table of plain text.

    Args:
        rows: The cells of each line; the heading is the first line. All lines have equally many
            cells.
        left: The first `left` columns are aligned at the left. The other columns, which hold
            numbers, are aligned at the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def picture_name(set_name: str, row_id: str) -> str:
    """File name of a test row's image in `evaluation/images`.

    The name is a hash of the set and the row id. The image's own name is not used, because images
    of other people's data may share a name.
    """
    name = f"{set_name}\0{row_id}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(name).hexdigest()[:24] + ".png"

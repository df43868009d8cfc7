"""HTML that the panels of notebooks share. It shows every character of other people's texts."""

import html

from spavl_lib.evaluation.text import clean

STYLE = "white-space: pre-wrap; overflow-wrap: anywhere; max-width: 46em; margin: 0.4em 0"


def paragraph(title: str, text: str) -> str:
    """A text that a model or other people wrote, under its title."""
    return f'<b>{title}</b><div dir="auto" style="{STYLE}">{html.escape(clean(text))}</div>'


def error_box(error: Exception) -> str:
    """The message of an error."""
    return f'<pre style="color: #b00020">{html.escape(str(error))}</pre>'

"""Small helpers for output that a person reads: printed lines and short paths."""

import sys
from pathlib import Path
from typing import Any

from spavl_lib.machine import DTYPE

# Variable that chooses the colours of figures that a notebook shows: `light` or `dark`. Figures
# that are saved as files are always light.
FIGURES = "SPAVL_FIGURES"


def say(text: str) -> None:
    """Print one line, and flush it at once, to the terminal or under the notebook's cell."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def short_path(path: Path) -> str:
    """A path relative to the current folder if the path lies below it; else the path itself."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def refusal(paths: list[str], changed: dict[str, tuple[Any, Any]], *, resumable: bool) -> str:
    """The message for work that was made with other settings.

    Args:
        paths: The folders of the work.
        changed: Key -> (old value, new value).
        resumable: Whether the work is incomplete and could be resumed with the changed settings.
    """
    lines = [f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items()]
    resume = f", or resume in spite of it with --allow-change {','.join(changed)}"
    text = f"{' and '.join(paths)} {'was' if len(paths) == 1 else 'were'} made with other settings:"
    folder = "that folder" if len(paths) == 1 else "these folders"
    text = "\n  ".join([text, *lines, f"use another run_name, or delete {folder}"])
    text += resume if resumable else ""
    if "dtype" in changed:
        text += f"; {DTYPE}={changed['dtype'][0]} keeps the old precision"
    return text

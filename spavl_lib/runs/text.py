"""Small helpers for what a person reads: printed lines and short paths."""

import sys
from pathlib import Path


def say(text: str) -> None:
    """Print one line at once, at the terminal or under the notebook's cell."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def short_path(path: Path) -> str:
    """A path as the caller would type it: relative to the current folder where it lies below."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)

"""Small helpers for output that a person reads: printed lines and short paths."""

import sys
from pathlib import Path

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

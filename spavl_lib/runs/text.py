"""Small helpers for what a person reads: lines, paths, and settings by their dotted names."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys: `{"dpo": {"beta": 1}}` as `{"dpo.beta": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat

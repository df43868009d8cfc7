"""A progress bar that another process can read: `spavl run` shows the bars of a kernel."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

# Variable that names the file into which bars write their state. Without it they only show it.
PROGRESS = "SPAVL_PROGRESS"
EVERY_S = 1.0  # shortest time between two writes


class Bar(tqdm):
    """A bar of tqdm that also writes its state to the file `$SPAVL_PROGRESS`."""

    def __init__(self, *args: Any, **options: Any):
        """Open the bar.

        Args:
            args: As for tqdm.
            options: As for tqdm. `desc` names the work, and `unit` what is counted.
        """
        self._written = float("-inf")
        super().__init__(*args, **options)
        self._write()

    def update(self, n: float | None = 1) -> bool | None:
        """Advance the bar by `n`."""
        shown = super().update(n)
        self._write()
        return shown

    def close(self) -> None:
        """Close the bar, and remove the file."""
        super().close()
        if self._written > 0 and (path := os.environ.get(PROGRESS)):
            with contextlib.suppress(OSError):
                Path(path).unlink(missing_ok=True)

    def _write(self) -> None:
        path, now = os.environ.get(PROGRESS), time.monotonic()
        if not path or self.disable or not self.total or now - self._written < EVERY_S:
            return
        self._written = now
        done, elapsed = self.n - self.initial, self.format_dict["elapsed"]
        state = {
            "what": self.desc.rstrip(": "),
            "done": self.n,
            "total": self.total,
            "unit": self.unit,
            "left_s": elapsed / done * (self.total - self.n) if done > 0 else None,
        }
        temporary = Path(f"{path}.{os.getpid()}")
        with contextlib.suppress(OSError):  # a full disk must not stop the work
            temporary.write_text(json.dumps(state), encoding="utf-8")
            temporary.replace(path)


def read_progress(path: Path) -> str:
    """The state of the bar that wrote a file, in words; empty if there is none.

    Args:
        path: The file that `$SPAVL_PROGRESS` named.
    """
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        unit = "" if state["unit"] == "it" else f" {state['unit']}s"
        text = f"{state['what']} {state['done']:,} of {state['total']:,}{unit}".strip()
        if state["left_s"] is not None:
            text += f", about {_duration(state['left_s'])} left"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return text


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""Errors that are the user's to mend: one clear message, an exit code, no traceback of ours.

Exit codes: 2 bad input or config, 3 non-finite numbers, 73 run folder busy, 74 disk, 75 preempted.
"""

import difflib
from collections.abc import Iterable


class SpavlError(Exception):
    """Base of every error with a message written for the person running the command."""

    exit_code = 2

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback: the message alone."""
        return [f"{type(self).__name__}: {self}"]


class InputError(SpavlError):
    """Bad input: data, parameter, profile or key."""


class NonFiniteError(SpavlError):
    """A loss, gradient, weight or reward is NaN or infinite."""

    exit_code = 3


class BusyError(SpavlError):
    """Another live run holds the folder, or it holds another run's work."""

    exit_code = 73


class DiskError(SpavlError):
    """Writing failed: no space, no permission."""

    exit_code = 74


class Preempted(SpavlError):  # noqa: N818 - it is an event, not a fault
    """A stop was requested; a checkpoint is kept, and the same command resumes from it."""

    exit_code = 75


class Interrupted(SpavlError):  # noqa: N818 - it is an event, not a fault
    """The user asked for a stop where no checkpoint could be written."""

    exit_code = 130


class RankError(SpavlError):
    """One of several training processes failed for a reason that is none of these."""

    exit_code = 1


class OutOfMemory(SpavlError):  # noqa: N818 - the name every framework gives it
    """The device's memory ran out; says what the planner would change."""

    exit_code = 1


ERRORS = {
    cls.__name__: cls
    for cls in (
        SpavlError,
        InputError,
        NonFiniteError,
        BusyError,
        DiskError,
        Preempted,
        RankError,
        OutOfMemory,
    )
}


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'X'?` with the known name nearest to a wrong one; empty if none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def raise_all(problems: Iterable[str], heading: str) -> None:
    """Raise one `InputError` listing every problem, if there is any.

    Args:
        problems: One line each, `FILE:ROW field: reason`.
        heading: What was being read.
    """
    lines = list(problems)
    if lines:
        shown = lines[:50]
        more = [f"... and {len(lines) - 50} more"] if len(lines) > 50 else []
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        raise InputError("\n  ".join([f"{heading}: {count}", *shown, *more]))

"""Errors that the user can fix: each shows a message without traceback, and has an exit code.

Exit codes: 1 failed process or out of memory, 2 bad input or config, 3 non-finite numbers, 73 run
folder busy, 74 disk, 75 preempted, 130 interrupted.
"""

import difflib
from collections.abc import Iterable


class SpavlError(Exception):
    """Base class of errors whose message is written for the person who runs the command."""

    exit_code = 2

    def _render_traceback_(self) -> list[str]:
        """Lines that IPython shows instead of a traceback: only the message."""
        return [f"{type(self).__name__}: {self}"]


class InputError(SpavlError):
    """Data, a parameter, a profile or a setting is wrong."""


class NonFiniteError(SpavlError):
    """A loss, gradient, weight or reward is NaN or infinite."""

    exit_code = 3


class BusyError(SpavlError):
    """Another process uses the run folder."""

    exit_code = 73


class DiskError(SpavlError):
    """A file could not be written, for lack of space or of permission."""

    exit_code = 74


class Preempted(SpavlError):  # noqa: N818 - it is an event, not a fault
    """A stop was requested. Saved work is kept, and the same command resumes from it."""

    exit_code = 75


class Interrupted(SpavlError):  # noqa: N818 - it is an event, not a fault
    """The user asked for a stop at a point where no checkpoint could be saved."""

    exit_code = 130


class RankError(SpavlError):
    """One of several training processes failed for a reason that no other class here covers."""

    exit_code = 1


class OutOfMemory(SpavlError):  # noqa: N818 - other frameworks use this name too
    """The device ran out of memory; the message suggests settings that need less memory."""

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
    """The hint `; did you mean 'X'?` with the most similar known name; empty if none is similar.

    Args:
        name: The unknown name.
        known: All known names.
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def raise_all(problems: Iterable[str], heading: str) -> None:
    """If there are problems, raise one `InputError` that lists the first 50 of them.

    Args:
        problems: One line per problem, such as `FILE:ROW field: reason`.
        heading: Name of the data that was read.
    """
    lines = list(problems)
    if lines:
        shown = lines[:50]
        more = [f"... and {len(lines) - 50} more"] if len(lines) > 50 else []
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        raise InputError("\n  ".join([f"{heading}: {count}", *shown, *more]))

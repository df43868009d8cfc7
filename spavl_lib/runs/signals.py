"""A stop flag: set by a signal, polled between steps and batches."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator


class StopFlag:
    """Set by SIGTERM or SIGINT; loops poll it, save, and raise `Preempted`.

    Args:
        around: The flag of the block this one's lies in; set, it sets this one too.
    """

    def __init__(self, around: "StopFlag | None" = None) -> None:
        self._own, self.around = "", around

    def __bool__(self) -> bool:
        return bool(self.reason)

    @property
    def reason(self) -> str:
        """The signal's name; empty while there was none."""
        return self._own or (self.around.reason if self.around else "")

    @reason.setter
    def reason(self, name: str) -> None:
        self._own = name

    def set(self, signum: int, _frame: object = None) -> None:
        """Signal handler; a second signal takes the usual course."""
        if self._own:
            raise KeyboardInterrupt
        self._own = signal.Signals(signum).name
        # A plain write: a signal may come in the middle of anything else that prints.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{self.reason}: stopping when this step is done and saved\n".encode())


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """A flag that SIGTERM and SIGINT set while the block runs (main thread only).

    A block inside another is told what that was told, and hands on what it is told itself.
    """
    around = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    flag = StopFlag(around if isinstance(around, StopFlag) else None)
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = {s: signal.signal(s, flag.set) for s in kinds}
    try:
        yield flag
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
        if flag.around is not None and flag.reason:
            flag.around.reason = flag.reason


def end_with_parent() -> None:
    """Block until standard input closes, then exit: the process that holds it open has ended."""
    # os.read, because holding the lock of sys.stdin's buffer would abort the interpreter's exit.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(1)

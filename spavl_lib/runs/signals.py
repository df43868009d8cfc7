"""A stop flag, which a signal sets and which loops poll between steps and batches."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator


class StopFlag:
    """True once SIGTERM or SIGINT has come; loops then save and raise `Preempted`.

    Args:
        around: The flag of the enclosing block. This flag is true whenever that one is.
    """

    def __init__(self, around: "StopFlag | None" = None) -> None:
        self._signal, self.around = "", around

    def __bool__(self) -> bool:
        return bool(self.reason)

    @property
    def reason(self) -> str:
        """The name of the signal; empty before one has come."""
        return self._signal or (self.around.reason if self.around else "")

    @reason.setter
    def reason(self, name: str) -> None:
        self._signal = name

    def set(self, signum: int, _frame: object = None) -> None:
        """Handle a signal: the first sets the flag, a second raises KeyboardInterrupt."""
        if self._signal:
            raise KeyboardInterrupt
        self._signal = signal.Signals(signum).name
        # os.write, because the signal may interrupt any other code that prints.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{self.reason}: stopping when this step is done and saved\n".encode())


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Yield a flag that SIGTERM and SIGINT set while the block runs, in the main thread only.

    Nested blocks share the flag: a signal seen by either stops both.
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

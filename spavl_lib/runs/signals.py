"""The stop flag: signals set it, and loops poll it between steps and batches."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

# How to continue after a stop. The work may have been started by a command or in a notebook's cell.
RESUME = "run the same command or cell again to continue"


class StopFlag:
    """A flag that is true after SIGTERM or SIGINT. Loops then save and raise `Preempted`.

    Args:
        around: The flag of the enclosing block. If the outer flag is true, this flag is true too.
    """

    def __init__(self, around: "StopFlag | None" = None) -> None:
        self._signal, self.around = "", around

    def __bool__(self) -> bool:
        return bool(self.reason)

    @property
    def reason(self) -> str:
        """The name of the signal that came first; empty if none has come."""
        return self._signal or (self.around.reason if self.around else "")

    @reason.setter
    def reason(self, name: str) -> None:
        self._signal = name

    def set(self, signum: int, _frame: object = None) -> None:
        """Handle a signal: the first one sets the flag, the second raises KeyboardInterrupt."""
        if self._signal:
            raise KeyboardInterrupt
        self._signal = signal.Signals(signum).name
        # The signal may interrupt code that prints to sys.stderr; os.write works even then.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{self.reason}: stopping when this step is done and saved\n".encode())


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Yield a flag that SIGTERM and SIGINT set while the block runs.

    Nested blocks share the flag: a signal in either block stops both. Outside of the main thread no
    handler can be set, so the flag there only follows the flag of an enclosing block.
    """
    # If the present handler is the method `set` of a flag, that flag belongs to an enclosing block.
    outer = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    flag = StopFlag(outer if isinstance(outer, StopFlag) else None)
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    old_handlers = {number: signal.signal(number, flag.set) for number in numbers}
    try:
        yield flag
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        if flag.around is not None and flag.reason:
            flag.around.reason = flag.reason


def end_with_parent() -> None:
    """Wait until standard input closes, then exit this process.

    The parent process holds standard input open, so the input closes when the parent ends.
    """
    # sys.stdin.read would hold a lock, and the interpreter aborts if it exits with the lock held.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(1)

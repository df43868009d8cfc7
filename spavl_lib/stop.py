"""A stop flag: set by a signal, polled between steps and batches."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


class StopFlag:
    """Set by SIGTERM or SIGINT; loops poll it, save, and raise `Preempted`."""

    def __init__(self) -> None:
        self.reason = ""

    def __bool__(self) -> bool:
        return bool(self.reason)

    def set(self, signum: int, _frame: object = None) -> None:
        """Signal handler; a second signal takes the usual course."""
        if self.reason:
            raise KeyboardInterrupt
        self.reason = signal.Signals(signum).name
        # A plain write: a signal may come in the middle of anything else that prints.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{self.reason}: stopping when this step is done and saved\n".encode())


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """A flag that SIGTERM and SIGINT set while the block runs (main thread only).

    A block inside another hands on what it was told: the loop around it stops as well.
    """
    flag = StopFlag()
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
            outer = getattr(handler, "__self__", None)
            if isinstance(outer, StopFlag):
                outer.reason = outer.reason or flag.reason

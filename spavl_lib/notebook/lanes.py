"""Execute notebooks side by side, each in a child process, as far as the table of stages allows.

A notebook starts when its upstream notebooks have ended. If no other notebook can use a free lane,
it starts earlier: its kernel loads the libraries, and `pipeline.ensure` waits for the stages. The
inference stage answers with the models that are trained, and then waits for the others.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import psutil

from spavl_lib import machine, stages
from spavl_lib.config import Config
from spavl_lib.distributed.settings import in_processes
from spavl_lib.errors import Interrupted, Preempted, SpavlError
from spavl_lib.notebook.execute import NotebookError, run_notebook
from spavl_lib.runs.stage import AWAITED, Run
from spavl_lib.runs.text import say

MOST = 2  # with more a run does not end earlier, because 02, 03, 05 and 06 need one another
GIB_PER_NOTEBOOK = 3
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def lanes_here(config: Config, most: int) -> tuple[int, str]:
    """How many notebooks can run at a time on this machine, and the reason if only one can.

    Args:
        config: The run's config.
        most: Largest number that is wanted.
    """
    cores, threads = machine.cores(), config.launch.num_threads
    free = min(psutil.virtual_memory().available, machine.memory_bytes()) / machine.GIB
    if most == 1:
        reason = "as asked"
    elif in_processes(config.launch):
        reason = "each trains in several processes"
    elif not threads:
        reason = "each uses every core (launch.num_threads is 0)"
    elif cores < 2 * threads:
        reason = f"cores here: {cores}, threads of each: {threads}"
    elif free < 2 * GIB_PER_NOTEBOOK:
        reason = f"{free:.1f} GiB of memory are free, and each may need {GIB_PER_NOTEBOOK}"
    elif machine.gpus():
        reason = "they would share the GPU"
    else:
        return min(most, cores // threads, int(free // GIB_PER_NOTEBOOK)), ""
    return 1, reason


def next_to_start(
    waiting: Sequence[str], running: Collection[str], making: Collection[str]
) -> str | None:
    """The stage whose notebook should start next; None if each must wait.

    Args:
        waiting: Stages whose notebooks have not started, in the order of the table.
        running: Stages whose notebooks run.
        making: Those of `running` that were not complete before.

    Returns:
        The first stage whose upstream notebooks have ended. If there is none, the first one whose
        upstream notebooks have ended or are making their stages.
    """
    for enough in (set[str](), set(making)):
        for name in waiting:
            if not ({*stages.find(name).upstream} & {*waiting, *running}) - enough:
                return name
    return None


def run_in_lanes(
    notebooks: dict[str, Path], lanes: int, is_kept: Callable[[str], bool], run: Run, **options: Any
) -> None:
    """Execute notebooks, several at a time. A failure or a signal stops all of them.

    Args:
        notebooks: Stage -> path of its notebook, in the order of the table.
        lanes: Largest number of notebooks at a time.
        is_kept: Whether a stage's notebook need not run. It is called once for each stage.
        run: The run.
        options: Further arguments of `run_notebook`.

    Raises:
        SpavlError: The error of the notebook that failed first. After a signal, the error with the
            lowest exit code: if any notebook saved its work, `Preempted`.
    """
    waiting, stopped = list(notebooks), list[SpavlError]()
    with _Children() as children:
        while children.running or (waiting and not children.signals):
            running = children.running
            making = [name for name, child in running.items() if child.makes_stage]
            name = next_to_start(waiting, running, making)
            if name and len(running) < lanes and not children.signals:
                waiting.remove(name)
                if not is_kept(name):
                    awaited = [n for n in stages.find(name).upstream if n in making]
                    after = f", which waits for {' and '.join(awaited)}" if awaited else ""
                    say(f"{name}: running {notebooks[name].name}{after}")
                    new = not run.stage(name).done
                    running[name] = _Child(notebooks[name], new, awaited, run=run, **options)
                continue
            for name, child in children.ended():
                error = child.error()
                if error and not children.signals:
                    raise error
                if error:
                    stopped.append(error)
                else:
                    say(f"{name}: done in {time.perf_counter() - child.started:.0f} s")
    if children.signals:
        stopped.append(_stop_error(children.signals[0]))
        raise min(stopped, key=lambda error: error.exit_code)


class _Children:
    """The running child processes. In the block, signals are passed on to them.

    At the end of the block, the children that still run are asked to stop, and awaited.
    """

    def __init__(self) -> None:
        self.running: dict[str, _Child] = {}
        self.signals: list[int] = []
        self._passed_on = 0
        self._old_handlers: dict[int, Any] = {}

    def __enter__(self) -> "_Children":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = signal.signal(number, lambda n, _: self.signals.append(n))
                self._old_handlers[number] = handler
        return self

    def __exit__(self, *_: object) -> None:
        self._send(signal.SIGTERM)
        while self.running:
            self.ended()
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    def ended(self) -> list[tuple[str, "_Child"]]:
        """Wait a moment, pass on new signals, and remove and return the children that ended."""
        multiprocessing.connection.wait([c.process.sentinel for c in self.running.values()], 0.2)
        for child in self.running.values():
            child.receive()
        while self._passed_on < len(self.signals):
            self._send(self.signals[self._passed_on])
            self._passed_on += 1
        names = [name for name, child in self.running.items() if not child.process.is_alive()]
        return [(name, self.running.pop(name)) for name in names]

    def _send(self, number: int) -> None:
        for child in self.running.values():
            if child.process.pid and child.process.is_alive():
                os.kill(child.process.pid, number)


class _Child:
    """A child process that executes one notebook.

    Args:
        notebook: Path of the notebook.
        makes_stage: Whether its stage was not complete before.
        awaited: Stages that other notebooks are making now.
        options: Keyword arguments of `run_notebook`.
    """

    def __init__(self, notebook: Path, makes_stage: bool, awaited: list[str], **options: Any):
        self.notebook, self.makes_stage, self.started = notebook, makes_stage, time.perf_counter()
        self._error: SpavlError | None = None
        context = multiprocessing.get_context("spawn")
        self._receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_execute, args=(sender, awaited, notebook.stem), kwargs=options
        )
        # The child inherits the mask, so it misses no signal before its handlers are set.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        sender.close()

    def receive(self) -> None:
        """Take the error, if the process has sent one. A long one would fill the pipe."""
        with contextlib.suppress(EOFError):
            if not self._error and self._receiver.poll():
                self._error = self._receiver.recv()

    def error(self) -> SpavlError | None:
        """The error of the ended process; None if the notebook succeeded."""
        self.receive()
        self.process.join()
        if self._error:
            return self._error
        if code := self.process.exitcode:
            text = f"the process that executed {self.notebook.name} ended with exit code {code}"
            return NotebookError(text)
        return None


def _execute(sender: Any, awaited: list[str], name: str, **options: Any) -> None:
    """Execute a notebook in this child process, and send its error to the parent process."""
    os.setsid()  # Ctrl-C reaches only the parent process, which passes it on
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ[AWAITED] = ",".join(awaited)

    def stop(number: int, _: object) -> None:
        raise _stop_error(number)

    try:
        for number in SIGNALS:
            signal.signal(number, stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        run_notebook(name, **options)
    except SpavlError as error:
        sender.send(error)


def _end_with_parent() -> None:
    """Exit when the parent process ends. The kernel ends with this process."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _stop_error(number: int) -> SpavlError:
    kind = Preempted if number == signal.SIGTERM else Interrupted
    return kind(f"stopped by {signal.Signals(number).name}; the same command resumes")

"""Execute one notebook with papermill, in a kernel that runs this Python.

A notebook has succeeded if every cell ran without an error and the stage's summary.json exists.
This is checked here, because papermill reports success in more cases.
"""

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from spavl_lib import stages
from spavl_lib.config import Config
from spavl_lib.errors import (
    ERRORS,
    DiskError,
    InputError,
    Interrupted,
    Preempted,
    SpavlError,
    nearest,
)
from spavl_lib.notebook.status import (
    failing_line,
    keep_failed,
    killed_with_this_process,
    note_notebook,
    progress_text,
    remove_leftovers,
    write_status,
)
from spavl_lib.runs.bar import PROGRESS
from spavl_lib.runs.files import DISK_ERRORS
from spavl_lib.runs.paths import repo_root
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.runs.text import FIGURES, say, short_path

# The parameters that every notebook declares and that the runner sets.
PARAMETERS = ("profile", "seed", "run_name", "overrides")
STATUS_EVERY_S = 15.0  # without a terminal, a status line at this interval replaces the bar


class NotebookError(SpavlError):
    """A notebook failed with an error that is not one of `spavl_lib.errors`."""

    exit_code = 1


class KernelDied(NotebookError):
    """The kernel died: it was killed, often because memory ran out, or it crashed."""

    exit_code = 138


def notebooks_folder() -> Path:
    """The folder of the notebooks: $SPAVL_NOTEBOOKS, or notebooks/ in the checkout.

    Outside of a checkout these are the notebooks beside the library, if it is installed from one.
    """
    if named := os.environ.get("SPAVL_NOTEBOOKS", ""):
        return Path(named).absolute()
    here, beside = repo_root() / "notebooks", Path(__file__).parents[2] / "notebooks"
    return (beside if beside.is_dir() and not here.is_dir() else here).absolute()


def list_notebooks(folder: Path | None = None) -> list[Path]:
    """The numbered notebooks of a folder, in order. A letter may follow the number, as in `03b`."""
    folder = folder or notebooks_folder()
    names = ("[0-9][0-9]_*.ipynb", "[0-9][0-9][a-z]_*.ipynb")
    return sorted((p for name in names for p in folder.glob(name)), key=lambda p: _number(p.stem))


def _number(stem: str) -> str:
    """The number of a notebook's name, such as `03b`; numbers sort in the order of the course."""
    return stem.partition("_")[0]


def stage_of(notebook: Path) -> str:
    """The name of the stage that a notebook belongs to.

    Raises:
        InputError: The notebook belongs to no stage of `stages`.
    """
    spec = stages.of_notebook(notebook.stem)
    if spec is None:
        known = ", ".join(s.notebook_stem for s in stages.all_stages().values() if s.notebook)
        raise InputError(f"{notebook} belongs to no stage; notebooks of stages: {known}")
    return spec.name


def find_notebook(name: str, folder: Path | None = None) -> Path:
    """Find a notebook by its name, its number or its stage.

    Args:
        name: For example `dpo`, `04`, `04_dpo` or `04_dpo.ipynb`. A folder before the name is
            ignored.
        folder: Folder to search; None for `notebooks_folder()`.

    Raises:
        InputError: There is no such notebook; the message suggests the most similar name. Or `name`
            is the path of a solutions notebook.
    """
    if Path(name).parent.name == "solutions":
        command = f"papermill {name} out.ipynb -p profile demo"
        raise InputError(f"{name} makes no stage, so `spavl run` does not run it: use {command}")
    folder = folder or notebooks_folder()
    stem = Path(name).name.removesuffix(".ipynb")
    paths = list_notebooks(folder)
    aliases = {path.stem.partition("_")[2]: path for path in reversed(paths)}
    paths += [p for s in stages.all_stages().values() if (p := Path(s.notebook)).is_absolute()]
    for path in paths:
        spec = stages.of_notebook(path.stem)
        aliases |= {path.stem: path} | ({spec.name: path} if spec else {})
    aliases |= {_number(path.stem): path for path in list_notebooks(folder)}
    if stem in aliases:
        return aliases[stem]
    if not list_notebooks(folder):
        raise InputError(
            f"no notebooks in {folder}; run this in a checkout, or set SPAVL_NOTEBOOKS"
        )
    known = ", ".join(path.stem for path in paths)
    raise InputError(f"unknown notebook {name!r}{nearest(stem, aliases)} (known: {known})")


def check_parameters(notebook: Path, given: Iterable[str] = PARAMETERS) -> None:
    """Raise if a notebook does not declare the given parameters. papermill would only warn.

    Raises:
        InputError: The file is not a notebook, has no cell tagged `parameters`, or that cell does
            not declare a given parameter.
    """
    import nbformat
    import papermill as pm

    try:
        known = pm.inspect_notebook(notebook)
    except (ValueError, KeyError, AttributeError, nbformat.ValidationError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"{notebook} is not a notebook with a kernelspec: {why}") from error
    if not known:
        raise InputError(f"{notebook.name} has no cell tagged `parameters`")
    unknown = [name for name in given if name not in known]
    if unknown:
        raise InputError(
            f"{notebook.name} has no parameter {', '.join(map(repr, unknown))}"
            f"{nearest(unknown[0], known)} (its parameters cell declares: {', '.join(known)})"
        )


def run_notebook(
    name: str,
    config: Config,
    overrides: dict[str, Any] | None,
    run: Run,
    *,
    profile: str | None = None,
    parameters: dict[str, Any] | None = None,
    folder: Path | None = None,
    timeout_s: int | None = None,
) -> Path:
    """Execute a notebook in a kernel that runs this Python in the checkout's root.

    SIGINT and SIGTERM interrupt the kernel. This process then waits for the kernel, so that a
    training cell can write its checkpoint. The third signal kills the kernel.

    Args:
        name: Name of the notebook, as for `find_notebook`.
        config: The resolved config. The notebook gets its seed, and resolves the same config from
            `profile` and `overrides`.
        overrides: Overrides of the profile, which the notebook gets as a parameter.
        run: The run; the executed notebook is written into its folder.
        profile: Profile name or path that the notebook gets; None for `config.profile`.
        parameters: Further parameters of this notebook.
        folder: Folder of the notebooks; None for `notebooks_folder()`.
        timeout_s: Longest time of a cell in seconds; None for no limit.

    Returns:
        Path of the executed notebook, `runs/<run>/<stage>/executed.ipynb`.

    Raises:
        SpavlError: The notebook raised an error of the library, which is raised again here.
        NotebookError: The notebook failed in another way: another error, `sys.exit`, a dead kernel
            (`KernelDied`), a timeout, or a missing summary. `failed.ipynb` keeps the cells executed
            so far.
        Preempted: SIGTERM stopped the notebook, or SIGINT stopped a cell that saved its work; the
            same command resumes.
        Interrupted: SIGINT stopped the notebook outside of such a cell.
    """
    import papermill as pm

    notebook = find_notebook(name, folder)
    stage = run.stage(stage_of(notebook))
    parameter_values = {
        "profile": profile or config.profile,
        "seed": config.seed,
        "run_name": run.name,
        "overrides": dict(overrides or {}),
        **(parameters or {}),
    }
    check_parameters(notebook, parameter_values)
    stage.check_all()
    # papermill writes the executed cells to this file.
    unfinished = stage.path / f".executed.{os.getpid()}.ipynb"
    execution = _Execution(notebook, stage)
    try:
        stage.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(stage)
        write_status(stage, "running", notebook, 0)
        with _quiet_papermill(), execution:
            executed = pm.execute_notebook(
                notebook,
                unfinished,
                parameter_values,
                kernel_name="python3",
                progress_bar=False,
                execution_timeout=timeout_s,
                kernel_manager_class=_kernel_class(execution, run),
                on_cell_start=execution.cell_start,
                on_cell_execute=execution.cell_execute,
                on_cell_executed=execution.cell_executed,
            )
        problem = _hidden_failure(executed, notebook, stage)
    except Exception as error:
        problem = _error_to_raise(error, execution)
        if problem is None:
            raise
    if problem is None:
        target = stage.path / "executed.ipynb"
        unfinished.replace(target)
        (stage.path / "failed.ipynb").unlink(missing_ok=True)
        execution.kernel_log.unlink(missing_ok=True)
        note_notebook(stage, executed, notebook, parameter_values)
        write_status(stage, "done", notebook, execution.cell, exit_code=0)
        if execution.stop_signals:
            raise execution.stop_error(
                f"stopped after {notebook.name}, which was at its last cell and is complete"
            )
        return target
    stopped = isinstance(problem, Preempted | Interrupted)
    with contextlib.suppress(OSError, DiskError):  # errors here must not hide `problem`
        failed = stage.path / "failed.ipynb"
        keep_failed(unfinished, failed, notebook, str(problem))
        write_status(
            stage, "stopped" if stopped else "failed", notebook, execution.cell,
            cause=str(problem), exit_code=problem.exit_code,
        )  # fmt: skip
        if isinstance(problem, NotebookError):
            problem = type(problem)(f"{problem}\n  the cells executed so far: {short_path(failed)}")
    raise problem


class _Stop(Exception):
    """Raised between cells after a stop was requested."""


class _Execution:
    """The state of a running notebook: current cell, kernel process, progress bar, signals."""

    def __init__(self, notebook: Path, stage: Stage):
        self.notebook, self.stage = notebook, stage
        self.kernel_log = stage.path / ".kernel.log"
        self.progress_path = stage.path / f".progress.{os.getpid()}.json"
        self.kernel_pid: int | None = None
        self.cell = 0  # number of the code cell that runs, or ran last
        self.stop_signals = 0  # number of stop signals that have come
        self.last_signal: int = signal.SIGINT
        self.cell_runs = False
        # `_cell_started` is monotonic; the others are seconds since the epoch.
        self._cell_started = self._started = self._cell_began = 0.0
        self._ended = threading.Event()
        self.at_exit = contextlib.ExitStack()
        self._old_handlers: dict[int, Any] = {}

    @property
    def place(self) -> str:
        """The notebook and the number of its current cell, as in the executed notebook."""
        return f"{self.notebook.name}, cell [{self.cell}]"

    def stop_error(self, text: str) -> SpavlError:
        """The error to raise after a stop: `Preempted` after SIGTERM, else `Interrupted`."""
        return (Preempted if self.last_signal == signal.SIGTERM else Interrupted)(text)

    def __enter__(self) -> "_Execution":
        from tqdm import tqdm

        cells = json.loads(self.notebook.read_text(encoding="utf-8"))["cells"]
        self._started = time.time()
        # papermill adds a cell with the parameters, so 1 is added here and to the bar's total.
        self._code_cells = sum(c["cell_type"] == "code" for c in cells) + 1
        # None hides the bar if there is no terminal. Beside another notebook, lines replace it.
        hidden = multiprocessing.parent_process() is not None or None
        self._bar = tqdm(
            total=len(cells) + 1, desc=self.notebook.stem, unit="cell", leave=False, disable=hidden
        )
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old_handlers[number] = signal.signal(number, self._on_signal)
        self._progress = threading.Thread(target=self._show_progress, daemon=True)
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._progress.join()
        self._bar.close()
        self.progress_path.unlink(missing_ok=True)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self.at_exit.close()
        if self.kernel_pid:
            # The kernel leads a process group, so this also kills the processes that it started.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.kernel_pid, signal.SIGKILL)

    def cell_start(self, cell: Any, cell_index: int) -> None:
        """papermill calls this before each cell of any kind. Raises if a stop was requested."""
        if self.stop_signals:
            raise _Stop
        self._bar.update(cell_index - self._bar.n)

    def cell_execute(self, cell: Any, cell_index: int) -> None:
        """papermill calls this before it sends a code cell to the kernel."""
        self.cell += 1
        self.cell_runs = True
        self._cell_started, self._cell_began = time.monotonic(), time.time()
        write_status(self.stage, "running", self.notebook, self.cell)

    def cell_executed(self, cell: Any, cell_index: int, execute_reply: dict) -> None:
        """papermill calls this when the kernel has answered, with a result or with an error.

        Args:
            cell: The cell.
            cell_index: The cell's place among all cells, text cells included.
            execute_reply: The kernel's answer.
        """
        self.cell_runs = False

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        self.stop_signals += 1
        self.last_signal = number
        action = "killing" if self.stop_signals > 2 else "interrupting and waiting for"
        name = signal.Signals(number).name
        sys.stderr.write(f"\n{name}: {action} {self.place} (the third signal kills it)\n")
        if self.stop_signals > 2:
            self._signal_kernel(self.cell, signal.SIGKILL)
            return
        # A kernel needs up to half a second to begin a cell, and ignores interrupts before that.
        delay_s = self._cell_started + 0.5 - time.monotonic()
        if delay_s > 0:
            threading.Timer(delay_s, self._signal_kernel, (self.cell, signal.SIGINT)).start()
        else:
            self._signal_kernel(self.cell, signal.SIGINT)

    def _signal_kernel(self, cell: int, number: int) -> None:
        """Send a signal to the kernel if this cell still runs."""
        still_runs = self.cell_runs and self.cell == cell and not self._ended.is_set()
        if self.kernel_pid and still_runs:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.kernel_pid, number)

    def _show_progress(self) -> None:
        """Show how far the cell is, until the notebook ends: in the bar, or as lines."""
        shown_at = time.time()
        while not self._ended.wait(1):
            shown = progress_text(self.progress_path, self.stage.metrics_path, self._cell_began)
            if not self._bar.disable:
                self._bar.set_postfix_str(shown)
            elif time.time() - shown_at >= STATUS_EVERY_S and not self.stage.run.awaited:
                shown_at = time.time()
                at = f"{self.place} of {self._code_cells}, {shown_at - self._started:.0f} s"
                say(f"{at}: {shown}" if shown else at)


def _kernel_class(execution: _Execution, run: Run) -> type:
    """A kernel class that runs this Python in the checkout's root.

    It writes the id of the kernel's process to `execution.kernel_pid`.
    """
    import zmq
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    class Kernel(AsyncKernelManager):
        def __init__(self, **kwargs: Any):
            # Without folders to search, the kernelspec `python3` runs this Python. An installed
            # kernelspec of that name may run another Python.
            specs = KernelSpecManager(kernel_dirs=[])
            policy = "auto" if zmq.has("curve") else "disabled"
            super().__init__(kernel_spec_manager=specs, transport_encryption=policy, **kwargs)

        async def start_kernel(self, **kwargs: Any) -> None:  # type: ignore[override]
            variables = {
                "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
                "SPAVL_RUNS": str(run.path.parent.absolute()),
                "PYDEVD_DISABLE_FILE_VALIDATION": "1",
                FIGURES: "light",  # executed notebooks are published
                PROGRESS: str(execution.progress_path.absolute()),
            }
            # The log holds what the kernel prints outside of cells, such as a crash's message.
            execution.kernel_log.parent.mkdir(parents=True, exist_ok=True)
            with execution.kernel_log.open("w", encoding="utf-8") as log:
                await super().start_kernel(
                    env=os.environ | variables, cwd=str(repo_root()), stderr=log, **kwargs
                )
            execution.kernel_pid = getattr(self.provisioner, "pid", None)
            if execution.kernel_pid:
                execution.at_exit.enter_context(killed_with_this_process(execution.kernel_pid))

        async def shutdown_kernel(  # type: ignore[override]
            self, now: bool = False, restart: bool = False
        ) -> None:
            # After a timeout the kernel still runs the cell and would not answer a request to shut
            # down, so it is killed at once.
            await super().shutdown_kernel(now=now or execution.cell_runs, restart=restart)

    return Kernel


@contextlib.contextmanager
def _quiet_papermill() -> Iterator[None]:
    """Silence papermill's log within the block, because the log repeats our messages."""
    logger = logging.getLogger("papermill")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _hidden_failure(executed: Any, notebook: Path, stage: Stage) -> SpavlError | None:
    """The error to raise for a notebook that failed although papermill reports success.

    Returns:
        The error; None if the notebook succeeded.
    """
    for cell in executed.cells:
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        if any(o.output_type == "error" and o.ename == "SystemExit" for o in cell.outputs):
            place = f"{notebook.name}, cell [{cell.execution_count}]"
            return NotebookError(f"{place} called sys.exit, so the cells after it did not run")
        if cell.execution_count is None:
            line = cell.source.strip().splitlines()[0]
            return NotebookError(f"{notebook.name} did not run the cell that begins `{line}`")
    if not stage.done:
        missing = short_path(stage.path / "summary.json")
        return NotebookError(f"{notebook.name} ran to its end but did not write {missing}")
    return None


def _error_to_raise(error: Exception, execution: _Execution) -> SpavlError | None:
    """The error to raise in place of papermill's `error`; None if `error` is of no known kind."""
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    if isinstance(error, PapermillExecutionError):
        kind = ERRORS.get(error.ename)
        if kind is not None:
            return kind(error.evalue)
        if execution.stop_signals or error.ename == "KeyboardInterrupt":
            return execution.stop_error(f"stopped in {execution.place}; the same command resumes")
        if error.ename == "OSError" and f"[Errno {errno.ENOSPC}]" in error.evalue:
            return DiskError(f"{execution.place}: {error.evalue}")
        return NotebookError(
            f"{execution.notebook.name}, cell [{error.exec_count}]: {error.ename}: {error.evalue}"
            f"\n  at: {failing_line(error)}"
        )
    if isinstance(error, _Stop) or execution.stop_signals:
        return execution.stop_error(f"stopped after {execution.place}; the same command resumes")
    if isinstance(error, CellTimeoutError):
        return NotebookError(
            f"{execution.place} took longer than the timeout, so the kernel was stopped"
        )
    if isinstance(error, DeadKernelError):
        return KernelDied(
            f"{execution.place}: the kernel died: it was killed, often because memory ran out, or "
            "crashed"
            f"\n  its last output: {short_path(execution.kernel_log)}"
        )
    if isinstance(error, RuntimeError) and execution.cell == 0:
        return NotebookError(f"{execution.notebook.name}: the kernel did not start: {error}")
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return DiskError(f"cannot write {short_path(execution.stage.path)}: {error}")
    return None

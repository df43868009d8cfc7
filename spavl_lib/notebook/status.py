"""Record how a notebook's execution ended.

`status.json` holds the state. A banner in `failed.ipynb` shows the cause of a failure. The manifest
holds the notebook that made the stage. The state does not come from papermill's metadata, because
papermill marks the cells of a killed kernel as completed.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from spavl_lib.runs.bar import read_progress
from spavl_lib.runs.files import read_json, write_json
from spavl_lib.runs.stage import Stage


def write_status(stage: Stage, state: str, notebook: Path, cell: int, **more: Any) -> None:
    """Write `status.json`.

    If this process dies, the file stays as it is: state `running`, with the process id and the
    cell.

    Args:
        stage: The stage that the notebook makes.
        state: running, done, failed or stopped.
        notebook: The notebook's path.
        cell: Number of the code cell that runs, or ran last.
        more: Further entries of the file: `cause` and `exit_code`.
    """
    page = {"state": state, "notebook": notebook.name, "cell": cell, "pid": os.getpid()}
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_json(stage.path / "status.json", page | {"at": at} | more)


def keep_failed(unfinished: Path, target: Path, source: Path, cause: str) -> None:
    """Keep the executed part of a failed notebook, with a banner on top that shows the cause.

    Args:
        unfinished: File that papermill wrote; it may be damaged or missing. It is deleted.
        target: File to write.
        source: The notebook that was executed; used if `unfinished` cannot be read.
        cause: The error's message.
    """
    import nbformat

    page = None
    for path in (unfinished, source):
        with contextlib.suppress(OSError, ValueError, KeyError, nbformat.ValidationError):
            page = nbformat.read(path, as_version=4)
            break
    if page is None:
        return
    quoted = "\n".join(f"    {line}" for line in cause.splitlines())
    banner = nbformat.v4.new_markdown_cell(
        f"## This execution failed\n\n{quoted}", metadata={"tags": ["spavl-failed"]}
    )
    page.cells.insert(0, banner)
    keep_notebook(page, target)
    unfinished.unlink(missing_ok=True)


def keep_notebook(page: Any, target: Path) -> None:
    """Write a notebook in one step: a reader sees the old or the new file, never half of one."""
    import nbformat

    from spavl_lib.runs.files import write_text

    write_text(target, nbformat.writes(page))


def remove_leftovers(stage: Stage) -> None:
    """Remove the unfinished notebooks of processes that no longer run."""
    for path in stage.path.glob(".executed.*.ipynb"):
        pid = path.name.split(".")[2]
        if pid.isdigit() and pid != str(os.getpid()):
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)
            except PermissionError:  # the process runs, and belongs to another user
                continue


def code_sha256(sources: Iterable[str]) -> str:
    """The hash of a notebook's code cells, from their sources."""
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def note_notebook(stage: Stage, executed: Any, source: Path, parameters: dict[str, Any]) -> None:
    """Record in the manifest which notebook made the stage, and how long its cells took.

    Args:
        stage: The stage.
        executed: The executed notebook.
        source: Path of the notebook that was executed.
        parameters: The parameters that were passed to the notebook.
    """
    if not (stage.path / "manifest.json").is_file():
        return
    cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    times = [
        round(c.metadata.get("papermill", {}).get("duration") or 0.0, 3)
        for c in executed.cells
        if c.cell_type == "code"
    ]
    # A profile's path is left out, because it depends on the machine.
    kept = {k: v for k, v in parameters.items() if not (k == "profile" and os.sep in str(v))}
    stage.manifest = read_json(stage.path / "manifest.json")
    stage.note(
        notebook={
            "name": source.name,
            "sha256": code_sha256(code),
            "parameters": kept,
            "papermill": importlib.metadata.version("papermill"),
            "cell_times_s": times,
        }
    )


def failing_line(error: Any) -> str:
    """The line of the failing cell that raised the error; the cell's first line if unknown."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    numbers = re.findall(rf"Cell In\[{error.exec_count}\], line (\d+)", text)
    lines = error.source.splitlines()
    if numbers and int(numbers[-1]) <= len(lines):
        return lines[int(numbers[-1]) - 1].strip()
    return lines[0].strip() if lines else ""


def progress_text(progress: Path, metrics: Path, since: float) -> str:
    """How far the work of a cell is: the kernel's bar with its time left, and the newest values.

    Args:
        progress: The file that the kernel's bars write.
        metrics: The metrics file of the stage.
        since: When the cell began, in seconds since the epoch.
    """
    logged, bar = last_logged(metrics, since), read_progress(progress)
    if bar:
        logged.pop("step", None)  # the bar shows it
    values = ", ".join(f"{key} {value:.6g}" for key, value in logged.items())
    return ", ".join(filter(None, (bar, values)))


def last_logged(path: Path, since: float) -> dict[str, Any]:
    """Values for the progress bar, from the last line of the metrics file.

    The result is empty if the file was last written before `since`, or cannot be read.

    Args:
        path: The metrics file.
        since: A time in seconds since the epoch.
    """
    try:
        if path.stat().st_mtime < since:
            return {}
        with path.open("rb") as handle:
            handle.seek(max(0, path.stat().st_size - 4096))
            row = json.loads(handle.read().splitlines()[-1])
        keys = {"step": "step", "loss": "loss", "objective/scores": "score", "objective/kl": "kl"}
        return {name: row[key] for key, name in keys.items() if key in row}
    except (OSError, ValueError, IndexError, TypeError):
        return {}


@contextlib.contextmanager
def killed_with_this_process(group: int) -> Iterator[None]:
    """Within the block, kill a process group as soon as this process dies.

    A kernel ends by itself within a second of its parent's death, but the kernel's child processes
    do not. A shell therefore waits on a pipe that only this process holds open, and kills the group
    when the pipe closes.

    Args:
        group: Id of the process group.
    """
    watcher = subprocess.Popen(
        ["sh", "-c", f"read _; kill -s KILL -- -{group} 2>/dev/null"],
        stdin=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        yield
    finally:
        watcher.kill()
        watcher.wait()
        if watcher.stdin:
            watcher.stdin.close()

"""How a notebook's execution ended: `status.json`, a banner on what failed, facts for the manifest.

papermill's own metadata call a killed kernel's cells completed; nothing here is read from them.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spavl_lib.runs.files import read_json, write_json
from spavl_lib.runs.stage import Stage


def write_status(stage: Stage, state: str, notebook: Path, cell: int, **more: Any) -> None:
    """Write `status.json`. After a process has died it still says `running`, the pid and the cell.

    Args:
        stage: The stage that the notebook makes.
        state: running, done, failed or stopped.
        notebook: The notebook's path.
        cell: Number of the code cell that runs, or ran last.
        more: `cause` and `exit_code`.
    """
    page = {"state": state, "notebook": notebook.name, "cell": cell, "pid": os.getpid()}
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_json(stage.path / "status.json", page | {"at": at} | more)


def keep_failed(aside: Path, target: Path, source: Path, cause: str) -> None:
    """Keep the executed part of a failed notebook, with the cause in a banner on top.

    Args:
        aside: File that papermill wrote; it may be damaged or missing.
        target: File to write.
        source: The original notebook, used if `aside` cannot be read.
        cause: The error's message.
    """
    import nbformat

    page = None
    for path in (aside, source):
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
    aside.unlink(missing_ok=True)


def keep_notebook(page: Any, target: Path) -> None:
    """Write a notebook so that a reader sees the old or the new file, never half of one."""
    import nbformat

    from spavl_lib.runs.files import write_text

    write_text(target, nbformat.writes(page))


def remove_leftovers(stage: Stage) -> None:
    """Remove files of executions whose process no longer runs."""
    for path in stage.path.glob(".executed.*.ipynb"):
        pid = path.name.split(".")[2]
        if pid.isdigit() and pid != str(os.getpid()):
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)
            except PermissionError:  # the process runs, and belongs to another user
                continue


def note_notebook(stage: Stage, executed: Any, source: Path, parameters: dict[str, Any]) -> None:
    """Record in the manifest which notebook made the stage, and how long its cells took.

    Args:
        stage: The stage.
        executed: The executed notebook.
        source: Path of the original notebook.
        parameters: The parameters that were passed to it.
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
    plain = {k: v for k, v in parameters.items() if not (k == "profile" and os.sep in str(v))}
    stage.manifest = read_json(stage.path / "manifest.json")
    stage.note(
        notebook={
            "name": source.name,
            "sha256": hashlib.sha256("\0".join(code).encode()).hexdigest(),
            "parameters": plain,
            "papermill": importlib.metadata.version("papermill"),
            "cell_times_s": times,
        }
    )


@contextlib.contextmanager
def killed_with_this_process(group: int) -> Iterator[None]:
    """Within the block, kill a process group as soon as this process dies.

    A kernel ends by itself within a second of its parent's death, but its child processes do not.
    A shell waits on a pipe that only this process holds open.
    """
    watch = subprocess.Popen(
        ["sh", "-c", f"read _; kill -s KILL -- -{group} 2>/dev/null"],
        stdin=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        yield
    finally:
        watch.kill()
        watch.wait()
        if watch.stdin:
            watch.stdin.close()

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
    """Say how it stands; a process that dies leaves `running`, its pid and the cell it was in.

    Args:
        stage: Whose `status.json`.
        state: running, done, failed or stopped.
        notebook: Which.
        cell: Number of the code cell that runs, or ran last.
        more: `cause` and `exit_code`.
    """
    page = {"state": state, "notebook": notebook.name, "cell": cell, "pid": os.getpid()}
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_json(stage.path / "status.json", page | {"at": at} | more)


def keep_failed(aside: Path, kept: Path, source: Path, cause: str) -> None:
    """Keep as much as was executed, under a banner that says why it ended; never half a file.

    Args:
        aside: What papermill wrote, whole, torn or missing.
        kept: Where it goes.
        source: The notebook, where nothing whole was written.
        cause: One or a few lines.
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
    keep_notebook(page, kept)
    aside.unlink(missing_ok=True)


def keep_notebook(page: Any, target: Path) -> None:
    """Write a notebook so that at every instant the old or the new one can be read."""
    import nbformat

    from spavl_lib.runs.files import write_text

    write_text(target, nbformat.writes(page))


def remove_leftovers(stage: Stage) -> None:
    """Drop what executions left aside whose process is gone."""
    for path in stage.path.glob(".executed.*.ipynb"):
        pid = path.name.split(".")[2]
        if pid.isdigit() and pid != str(os.getpid()):
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)
            except PermissionError:  # it lives, and is somebody else's
                continue


def note_notebook(stage: Stage, executed: Any, source: Path, parameters: dict[str, Any]) -> None:
    """Write into the stage's manifest which notebook made it, and how long its cells took."""
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
def buried_with_us(group: int) -> Iterator[None]:
    """While the block runs: if this process dies, so does a process group, children and all.

    A kernel notices within a second that its parent is gone and ends, but what it started does not.
    The shell waits at a pipe that only we hold open.
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
        watch.stdin.close()

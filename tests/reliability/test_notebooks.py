"""A notebook that failed is never taken for one that did not, and says in which cell and why."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from spavl_lib import cli
from spavl_lib.config import load_config
from spavl_lib.errors import InputError
from spavl_lib.notebook import execute
from spavl_lib.runs.files import read_json
from spavl_lib.runs.stage import Run
from tests.reliability.processes import context

FINISH = """\
from spavl_lib.config import load_config
from spavl_lib.runs.stage import Run
Run(load_config(profile, overrides, seed=seed, run_name=run_name)).stage("dpo").finish({})"""
# Cause, the cell that brings it about, exit code, and a word of the message.
CAUSES = {
    "killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 138, "the kernel died"),
    "sys.exit": ("import sys; sys.exit(0)", 1, "called sys.exit"),
    "timeout": ("import time; time.sleep(60)", 1, "took longer"),
    "memory": ("raise MemoryError('cannot allocate 80 GiB')", 1, "MemoryError"),
}


def alive(pid: int) -> bool:
    path = Path(f"/proc/{pid}/status")
    return path.exists() and "\nState:\tZ" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("cause", CAUSES)
def test_every_failure_is_said_with_cell_and_cause(
    make_notebook: Callable, runs: Path, tmp_path: Path, cause: str, soak: bool, record: Callable
) -> None:
    """At several places of the notebook, the summary standing already."""
    cell, code, says = CAUSES[cause]
    places = (0, 1, 2, 3) if soak else (1,)
    pid = f"import os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    for place in places:
        cells = [pid, FINISH, "1 + 1", "2 + 2"]
        cells.insert(place + 1, cell)
        path = make_notebook("04_dpo", *cells)
        config = load_config("smoke")
        with pytest.raises(execute.NotebookError, match=says) as caught:
            limit = 2 if cause == "timeout" else None
            execute.run_notebook(
                "04_dpo", config, {}, Run(config), folder=path.parent, timeout_s=limit
            )
        assert caught.value.exit_code == code
        stage = runs / "smoke/dpo"
        status = read_json(stage / "status.json")
        # Parameters, what papermill injects, the pid, and then as many as there were before.
        assert (status["state"], status["cell"]) == ("failed", 4 + place), status
        assert status["exit_code"] == code and says in status["cause"]
        page = nbformat.read(stage / "failed.ipynb", as_version=4)
        assert "This execution failed" in page.cells[0].source and says in page.cells[0].source
        assert not (stage / "executed.ipynb").exists() and not list(stage.glob(".executed*"))
        assert not alive(int((tmp_path / "pid").read_text()))
        (stage / "summary.json").unlink(missing_ok=True)
    record("N1", len(places), len(places), cause)


def test_a_runner_that_is_killed_leaves_no_kernel_and_says_where_it_was(
    make_notebook: Callable, runs: Path, tmp_path: Path, repo: Path, soak: bool, record: Callable
) -> None:
    notes = tmp_path / "pids"
    cell = (
        "import os, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '300'])\n"
        f"open({str(notes)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}} ')\n"
        "time.sleep(300)"
    )
    places = (0, 1, 2, 3) if soak else (0,)
    gone = 0
    for place in places:
        notes.unlink(missing_ok=True)
        path = make_notebook("04_dpo", *["1 + 1"] * place, cell, "2 + 2")
        runner = subprocess.Popen(
            [sys.executable, "-m", "spavl_lib.cli", "run", "dpo", "--profile", "smoke"], cwd=repo,
            env=os.environ | {"SPAVL_NOTEBOOKS": str(path.parent), "PYTHONPATH": str(repo)},
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        end = time.monotonic() + 120
        while not (notes.is_file() and notes.read_text().count(" ") == 2):
            assert runner.poll() is None and time.monotonic() < end, runner.stderr.read()
            time.sleep(0.05)
        kernel, child = map(int, notes.read_text().split())
        runner.kill()
        assert runner.wait() == -signal.SIGKILL
        status = read_json(runs / "smoke/dpo/status.json")
        assert (status["state"], status["cell"]) == ("running", 3 + place)
        assert status["pid"] == runner.pid
        assert not (runs / "smoke/dpo/executed.ipynb").exists()
        end = time.monotonic() + 10
        while (alive(kernel) or alive(child)) and time.monotonic() < end:
            time.sleep(0.1)
        left = [pid for pid in (kernel, child) if alive(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert left == []
        gone += 2
    record("N1", len(places), len(places), "runner killed")
    record("N5", gone, 2 * len(places), "kernels and their children gone")


BAD = (
    ["--set", "dpo.bta=0.2"],
    ["--set", "bta=0.2"],
    ["--set", "dpo.beta=false"],
    ["--set", "dpo.beta=1e-5x"],
    ["--set", "dpo.beta=-0.1"],
    ["--set", "dpo.beta=null"],
    ["--set", "dpo.beta=[0.1]"],
    ["--set", "dpo.max_steps=1.5"],
    ["--set", "model.train_projector=no"],
    ["--set", "model.adapter=lorra"],
    ["--set", "dpo.beta"],
    ["--seed", "-3"],
)


def test_bad_parameters_are_refused_before_a_kernel_starts(
    make_notebook: Callable, monkeypatch: pytest.MonkeyPatch, runs: Path, record: Callable,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    folder = make_notebook("04_dpo").parent
    monkeypatch.setenv("SPAVL_NOTEBOOKS", str(folder))
    monkeypatch.setattr(execute, "run_notebook", lambda *a, **o: pytest.fail("a kernel starts"))
    for words in BAD:
        with pytest.raises(SystemExit) as caught:
            cli.main(["run", "dpo", "-p", "smoke", *words])
        said = capsys.readouterr().err
        assert caught.value.code == 2, (words, said)
        assert said.startswith("spavl: ") and "Traceback" not in said
    path = make_notebook("04_dpo")
    with pytest.raises(InputError, match="did you mean 'run_name'"):
        execute.check_parameters(path, ["run_nme"])
    assert not runs.exists()
    record("N3", len(BAD), 12)


@pytest.mark.slow
def test_the_notebook_can_be_read_at_every_instant(
    tmp_path: Path, soak: bool, record: Callable
) -> None:
    """Killed at random times while writing, again and again over the one before."""
    from tests.reliability.faults import keep_saving

    target, rng, kills = tmp_path / "executed.ipynb", random.Random(0), 50 if soak else 10
    read = 0
    for _ in range(kills):
        child = context().Process(target=keep_saving, args=(str(target),), daemon=True)
        child.start()
        began, end = time.time(), time.monotonic() + 240
        while not target.exists() or target.stat().st_mtime < began:  # it saves by now
            assert child.is_alive() and time.monotonic() < end
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        child.kill()
        child.join()
        page = nbformat.read(target, as_version=4)
        nbformat.validate(page)
        assert len(page.cells) == 200
        read += 1
    assert read == kills
    assert json.loads(target.read_text(encoding="utf-8"))["nbformat"] == 4
    record("N4", read, kills)


def test_success_is_never_read_from_papermill(make_notebook: Callable, runs: Path) -> None:
    """It calls this one completed; the stage has left nothing."""
    path = make_notebook("04_dpo", "1 + 1")
    config = load_config("smoke")
    with pytest.raises(execute.NotebookError, match="did not write"):
        execute.run_notebook("04_dpo", config, {}, Run(config), folder=path.parent)
    assert read_json(runs / "smoke/dpo/status.json")["state"] == "failed"

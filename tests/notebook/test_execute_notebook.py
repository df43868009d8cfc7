"""Executing one notebook: what counts as success, the message of each failure, signals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from spavl_lib.config import load_config
from spavl_lib.errors import BusyError, DiskError, InputError, NonFiniteError, Preempted
from spavl_lib.notebook import execute, status
from spavl_lib.runs.bar import Bar, read_progress
from spavl_lib.runs.files import write_json, write_text
from spavl_lib.runs.stage import Run

# A notebook's last cell, in short: the stage's summary.
FINISH = """\
from spavl_lib.config import load_config
from spavl_lib.runs.stage import Run
config = load_config(profile, overrides, seed=seed, run_name=run_name)
Run(config).stage("{stage}").finish({{"beta": config.dpo.beta, "seed": config.seed}})"""
PID = "import os, pathlib; pathlib.Path({path!r}).write_text(str(os.getpid()))"


def finish(stage: str) -> str:
    return FINISH.format(stage=stage)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie is dead, only not reaped yet by whoever adopted it.
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")


def run_one(path: Path, overrides: dict | None = None, **options: object) -> Path:
    config = load_config("smoke", overrides, seed=options.pop("seed", None))
    return execute.run_notebook(
        path.stem, config, overrides, Run(config), folder=path.parent, **options
    )


# --- finding and checking -----------------------------------------------------------------------


def test_every_name_of_a_notebook_finds_it(make_notebook: Callable) -> None:
    dpo, suite = make_notebook("04_dpo"), make_notebook("06_safety_helpfulness")
    for name in ("dpo", "04", "04_dpo", "04_dpo.ipynb", "notebooks/04_dpo.ipynb"):
        assert execute.find_notebook(name, dpo.parent) == dpo
    for name in ("evaluation", "06", "safety_helpfulness"):
        assert execute.find_notebook(name, dpo.parent) == suite


def test_unknown_notebook_names_the_nearest(make_notebook: Callable) -> None:
    folder = make_notebook("04_dpo").parent
    make_notebook("02_reward_model")
    with pytest.raises(InputError, match="did you mean 'reward_model'"):
        execute.find_notebook("reward_modle", folder)


def test_empty_folder_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=str(tmp_path)):
        execute.find_notebook("dpo", tmp_path)


def test_unknown_parameter_is_refused_before_a_kernel_starts(
    make_notebook: Callable, runs: Path
) -> None:
    path = make_notebook("04_dpo", finish("dpo"))
    with pytest.raises(InputError, match="no parameter 'reward_rum'.*declares: profile, seed"):
        run_one(path, parameters={"reward_rum": "x"})
    assert not (runs / "smoke").exists()


def test_parameter_the_notebook_lacks_is_refused(make_notebook: Callable) -> None:
    path = make_notebook("04_dpo", parameters='profile: str = "smoke"\nsed: int = 0')
    with pytest.raises(InputError, match="did you mean 'sed'"):
        execute.check_parameters(path, ["seed"])


def test_notebook_without_parameters_cell_is_refused(make_notebook: Callable) -> None:
    path = make_notebook("04_dpo", parameters=None)
    with pytest.raises(InputError, match="no cell tagged `parameters`"):
        execute.check_parameters(path)


def test_file_that_is_no_notebook_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "04_dpo.ipynb"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="04_dpo.ipynb"):
        execute.check_parameters(path)


def test_changed_settings_are_refused_before_a_kernel_starts(
    make_notebook: Callable, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_notebook("04_dpo", finish("dpo"))
    with Run(load_config("smoke")).stage("dpo").work() as stage:
        stage.log({"step": 1})
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(InputError, match=r"other settings:\n  dpo\.beta: 0\.1 -> 0\.2"):
        run_one(path, {"dpo.beta": 0.2})


# --- running ------------------------------------------------------------------------------------


@pytest.fixture
def other_python_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel called python3 that is not ours, first on jupyter's path."""
    spec = {"argv": ["/bin/false"], "display_name": "Other", "language": "python"}
    write_json(tmp_path / "share" / "kernels" / "python3" / "kernel.json", spec)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share"))


@pytest.mark.usefixtures("other_python_kernel")
def test_a_run_lands_in_its_stage_with_its_settings(
    make_notebook: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = tmp_path / "notes.json"
    look = (
        "import json, os, pathlib, sys\n"
        f"here = [os.getpid(), os.getcwd(), sys.executable, os.environ['SPAVL_RUNS']]\n"
        f"pathlib.Path({str(notes)!r}).write_text(json.dumps(here))"
    )
    path = make_notebook("04_dpo", look, finish("dpo"))
    repo = Path(__file__).parents[2]
    # From a folder inside the checkout, with a relative runs folder: the kernel still agrees.
    monkeypatch.chdir(repo / "tests")
    monkeypatch.setenv("SPAVL_RUNS", os.path.relpath(tmp_path / "own", repo / "tests"))
    stage = tmp_path / "own" / "smoke" / "dpo"
    write_text(stage / "failed.ipynb", "of an earlier try")

    executed = run_one(path, {"dpo.beta": "0.5"}, seed=7)

    pid, cwd, python, runs_folder = json.loads(notes.read_text(encoding="utf-8"))
    assert executed.samefile(stage / "executed.ipynb")
    assert Run(load_config("smoke")).stage("dpo").summary == {"beta": 0.5, "seed": 7}
    assert (cwd, python) == (str(repo), sys.executable)
    assert Path(runs_folder).is_absolute()
    assert Path(runs_folder).samefile(tmp_path / "own")
    assert sorted(p.name for p in stage.iterdir()) == [
        "executed.ipynb", "status.json", "summary.json"
    ]  # fmt: skip
    page = nbformat.read(executed, as_version=4)
    assert all(c.execution_count for c in page.cells if c.cell_type == "code")
    assert not is_alive(pid)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("cell", "kind", "says"),
    [
        ("raise BusyError('runs/x is in use by pid 7')", BusyError, "^runs/x is in use by pid 7$"),
        ("raise NonFiniteError('step 3: loss is NaN')", NonFiniteError, "^step 3: loss is NaN$"),
        (
            "def inner():\n    return 1 / 0\n\ninner()",
            execute.NotebookError,
            r"04_dpo.ipynb, cell \[4\]: ZeroDivisionError: division by zero\n"
            r"  at: return 1 / 0\n  the cells executed so far: .*smoke/dpo/failed.ipynb$",
        ),
        ("import sys; sys.exit(0)", execute.NotebookError, r"cell \[4\] called sys.exit"),
        (
            "import os; os.kill(os.getpid(), 9)",
            execute.KernelDied,
            r"cell \[4\]: the kernel died",
        ),
    ],
    ids=["busy", "nan", "error", "sys.exit", "killed"],
)
def test_failures_are_failures_and_say_one_thing(
    make_notebook: Callable, runs: Path, tmp_path: Path, cell: str, kind: type, says: str
) -> None:
    """The summary stands already: a notebook that breaks after it has still failed."""
    first = "from spavl_lib.errors import BusyError, NonFiniteError\n" + finish("dpo")
    path = make_notebook("04_dpo", first, cell, PID.format(path=str(tmp_path / "later")))
    with pytest.raises(kind, match=says) as caught:
        run_one(path)
    assert type(caught.value) is kind
    stage = runs / "smoke" / "dpo"
    assert (stage / "summary.json").is_file()
    assert not (tmp_path / "later").exists()
    assert not (stage / "executed.ipynb").exists()
    assert len(nbformat.read(stage / "failed.ipynb", as_version=4).cells) >= 7
    assert not list(stage.glob(".executed*"))


def test_cell_that_takes_too_long_fails_and_leaves_no_kernel(
    make_notebook: Callable, runs: Path, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    path = make_notebook("04_dpo", PID.format(path=str(pid)), "import time; time.sleep(60)")
    with pytest.raises(execute.NotebookError, match=r"cell \[4\] took longer"):
        run_one(path, timeout_s=2)
    assert not is_alive(int(pid.read_text(encoding="utf-8")))


def test_end_without_a_summary_is_a_failure(make_notebook: Callable, runs: Path) -> None:
    path = make_notebook("04_dpo", "1 + 1")
    with pytest.raises(execute.NotebookError, match="did not write .*smoke/dpo/summary.json"):
        run_one(path)


TRAINING = """\
import signal, time
from pathlib import Path
from spavl_lib.errors import Preempted
asked = []
handlers = {{
    "polite": lambda *_: asked.append(1),
    "plain": signal.default_int_handler,
    "deaf": signal.SIG_IGN,
}}
signal.signal(signal.SIGINT, handlers[{manner!r}])
import subprocess
child = subprocess.Popen(["sleep", "60"])
Path({notes!r}).write_text(f"{{__import__('os').getpid()}} {{child.pid}}")
for step in range(600):
    time.sleep(0.1)
    if asked:
        time.sleep(0.5)
        assert child.poll() is None, "the interrupt reached more than the kernel"
        Path({checkpoint!r}).write_text("whole")
        raise Preempted(f"stopped at step {{step}}; the same command goes on")"""


@pytest.mark.parametrize(
    ("number", "times", "manner", "code"),
    [
        (signal.SIGTERM, 1, "polite", 75),
        pytest.param(signal.SIGINT, 1, "plain", 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 3, "deaf", 130, marks=pytest.mark.slow),
    ],
    ids=["preempted", "interrupted", "killed"],
)
def test_signal_interrupts_the_kernel_and_waits_for_it(
    make_notebook: Callable, repo: Path, runs: Path, tmp_path: Path,
    number: int, times: int, manner: str, code: int,
) -> None:  # fmt: skip
    notes, checkpoint, later = tmp_path / "notes", tmp_path / "checkpoint", tmp_path / "later"
    cell = TRAINING.format(manner=manner, notes=str(notes), checkpoint=str(checkpoint))
    path = make_notebook("04_dpo", cell, PID.format(path=str(later)))
    runner = subprocess.Popen(
        [sys.executable, "-m", "spavl_lib.cli", "run", "dpo", "--profile", "smoke"],
        env=os.environ | {"SPAVL_NOTEBOOKS": str(path.parent), "PYTHONPATH": str(repo)},
        cwd=repo, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while len(notes.read_text("utf-8").split() if notes.exists() else []) < 2:
            assert runner.poll() is None, runner.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        kernel, child = map(int, notes.read_text(encoding="utf-8").split())
        time.sleep(0.3)
        said = ""
        for _ in range(times):
            runner.send_signal(number)
            # One line says that this signal was taken; two pending at once would count as one.
            while not (line := runner.stderr.readline()).startswith(signal.Signals(number).name):
                assert line, f"the runner ended early: {said}"
                said += line
        said += runner.communicate(timeout=300)[1]
    finally:
        runner.kill()
    assert runner.returncode == code, said
    assert "Traceback" not in said
    assert checkpoint.exists() is (manner == "polite")
    assert not later.exists()
    time.sleep(0.2)
    assert not is_alive(kernel)
    assert not is_alive(child)
    assert "spavl: stopped at step" in said or manner != "polite"


def test_no_cell_begins_once_a_stop_was_asked_for(
    make_notebook: Callable, runs: Path, tmp_path: Path
) -> None:
    """A cell that swallows the interrupt ends; the next one must not start."""
    swallow = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(0.3)"
    )
    path = make_notebook("04_dpo", swallow, PID.format(path=str(tmp_path / "later")))
    with pytest.raises(Preempted, match=r"stopped after 04_dpo.ipynb, cell \[3\]"):
        run_one(path)
    assert not (tmp_path / "later").exists()


def test_full_disk_inside_a_notebook_is_a_disk_error(make_notebook: Callable, runs: Path) -> None:
    path = make_notebook("04_dpo", "raise OSError(28, 'No space left on device', '/x')")
    with pytest.raises(DiskError, match="No space left on device: '/x'"):
        run_one(path)


BARS = """\
import time
from spavl_lib.runs.bar import Bar
with Bar(total=40, desc="dpo (plain)", unit="step") as bar:
    for _ in range(40):
        time.sleep(0.1)
        bar.update(1)
"""


def test_a_long_cell_says_how_far_it_is_and_how_long_it_takes(
    make_notebook: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(execute, "STATUS_EVERY_S", 1.0)
    executed = run_one(make_notebook("04_dpo", BARS, finish("dpo")))
    lines = [line for line in capsys.readouterr().out.splitlines() if "plain" in line]
    assert re.fullmatch(
        r"04_dpo.ipynb, cell \[3\] of 4, \d+ s: dpo \(plain\) \d+ of 40 steps, about \d s left",
        lines[-1],
    )
    assert not list(executed.parent.glob(".progress*"))


def test_a_bar_writes_only_where_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "progress.json"
    monkeypatch.delenv("SPAVL_PROGRESS", raising=False)
    Bar(total=3, desc="x").close()
    assert read_progress(path) == "" and not list(tmp_path.iterdir())
    monkeypatch.setenv("SPAVL_PROGRESS", str(path))
    bar = Bar(total=7200, initial=10, desc="ppo", unit="rollout")
    assert read_progress(path) == "ppo 10 of 7,200 rollouts"
    bar._written = bar.start_t = 0
    monkeypatch.setattr(bar, "_time", lambda: 10.0)
    bar.update(10)
    assert read_progress(path) == "ppo 20 of 7,200 rollouts, about 2.0 h left"
    bar.close()
    assert not list(tmp_path.iterdir())
    Bar(range(3), desc="off", disable=True).close()
    assert not list(tmp_path.iterdir())
    path.write_text("{half")
    assert read_progress(path) == ""
    monkeypatch.setenv("SPAVL_PROGRESS", str(tmp_path / "none" / "progress.json"))
    Bar(total=3).close()  # what cannot be written does not stop the work


def test_a_variant_is_named_in_its_bar(runs: Path) -> None:
    stage = Run(load_config("smoke")).stage("dpo")
    variant = Run(load_config("smoke", run_name="plain"), root=stage.path / "variants").stage("dpo")
    assert (stage.title, variant.title) == ("dpo", "dpo (plain)")


def test_progress_reads_only_this_runs_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert status.last_logged(path, 0) == {}
    path.write_text('{"step": 1, "loss": 0.7}\n{"step": 2, "loss": 0.6, "lr": 1}\n', "utf-8")
    assert status.last_logged(path, 0) == {"step": 2, "loss": 0.6}
    assert status.last_logged(path, time.time() + 60) == {}
    with path.open("a", encoding="utf-8") as handle:
        handle.write('{"step": 3, "lo')
    assert status.last_logged(path, 0) == {}

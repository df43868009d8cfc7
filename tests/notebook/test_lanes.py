"""Notebooks side by side: which may, when each starts, and how all of them stop."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from spavl_lib import machine, pipeline, stages
from spavl_lib.config import load_config
from spavl_lib.errors import NonFiniteError
from spavl_lib.notebook import lanes, sequence
from spavl_lib.notebook.execute import NotebookError
from spavl_lib.runs.files import read_json, write_text
from spavl_lib.runs.stage import AWAITED, Run
from tests.notebook.test_execute_notebook import FINISH, is_alive

SIX = list(sequence.FIRST_SIX)


def starts(names: list[str], count: int, *, complete: tuple[str, ...] = ()) -> list[str]:
    """The order of starts if the notebook that started first always ends first."""
    waiting, running, order = list(names), list[str](), list[str]()
    while waiting or running:
        making = [name for name in running if name not in complete]
        name = lanes.next_to_start(waiting, running, making)
        if name and len(running) < count:
            waiting.remove(name)
            running.append(name)
            order.append(name)
        else:
            running.pop(0)
    return order


def test_the_table_of_stages_decides_what_starts_next() -> None:
    assert starts(SIX, 1) == SIX
    # PPO could start with a lane to itself, and wait; DPO need not wait.
    assert lanes.next_to_start(SIX[2:], ["data", "reward"], ["data", "reward"]) == "dpo"
    assert lanes.next_to_start(["ppo", "inference"], ["reward", "dpo"], ["reward", "dpo"]) == "ppo"
    assert lanes.next_to_start(["inference"], ["ppo", "dpo"], ["ppo", "dpo"]) == "inference"
    # An old result stands while its notebook runs again: nobody reads it.
    assert lanes.next_to_start(["ppo"], ["reward"], []) is None
    assert lanes.next_to_start(["inference"], ["ppo", "dpo"], ["ppo"]) is None
    assert starts(SIX, 2, complete=tuple(SIX)) == ["data", "reward", "dpo", *SIX[2:3], *SIX[4:]]
    for count in (1, 2, 3, 6):
        order = starts(SIX, count)
        assert sorted(order) == sorted(SIX)
        for place, name in enumerate(order):
            assert not {*order[place:]} & {*stages.find(name).upstream}


def test_a_stage_of_another_package_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_registered", {})
    keys = ("data", "model", "seed")
    stages.register(
        stages.StageSpec(name="mine", module="mine", config_keys=keys, upstream=("dpo",))
    )
    names = [name for name in stages.stage_names() if name in (*SIX, "mine")]
    assert lanes.next_to_start(["ppo", "mine"], ["reward"], []) == "mine"
    assert lanes.next_to_start(["mine"], ["dpo"], []) is None
    order = starts(names, 2)
    assert order.index("dpo") < order.index("mine") and len(order) == 7


@pytest.mark.parametrize(
    ("most", "overrides", "cores", "free", "gpus", "reason"),
    [
        (2, {}, 2, 64, [], ""),
        (2, {}, 16, 64, [], ""),
        (1, {}, 2, 64, [], "as asked"),
        (2, {}, 1, 64, [], "cores here: 1, threads of each: 1"),
        (2, {"launch.num_threads": 3}, 4, 64, [], "cores here: 4, threads of each: 3"),
        (2, {"launch.num_threads": 0}, 2, 64, [], "every core"),
        (2, {"launch.num_processes": 2}, 2, 64, [], "several processes"),
        (2, {}, 2, 5, [], "5.0 GiB of memory are free"),
        (2, {}, 2, 64, [("T4", 1)], "share the GPU"),
    ],
)
def test_one_notebook_at_a_time_has_a_reason(
    most: int, overrides: dict, cores: int, free: int, gpus: list, reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    memory = SimpleNamespace(available=free * machine.GIB)
    monkeypatch.setattr(machine, "cores", lambda: cores)
    monkeypatch.setattr(machine, "memory_bytes", lambda: 64 * machine.GIB)
    monkeypatch.setattr(machine, "gpus", lambda: gpus)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    count, said = lanes.lanes_here(load_config("smoke", overrides), most)
    assert count == (1 if reason else 2)
    assert reason in said and bool(reason) == bool(said)


def test_a_notebook_that_started_early_waits_for_the_stage(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("smoke")
    run = Run(config)
    monkeypatch.setenv(AWAITED, "dpo,reward")
    assert run.awaited == ["dpo", "reward"]
    timer = threading.Timer(0.5, lambda: run.stage("reward").finish({}))
    timer.start()
    monkeypatch.setattr(pipeline, "make", lambda *_: pytest.fail("it is made twice"))
    assert pipeline.ensure("reward", config).done
    assert run.awaited == ["dpo"]
    timer.join()


def test_waiting_is_not_counted_as_work(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(load_config("smoke"))
    monkeypatch.setenv(AWAITED, "ppo")
    stage, began = run.stage("inference"), time.perf_counter()
    threading.Timer(1.0, lambda: run.stage("ppo").finish({})).start()
    with stage.work({}):
        stage.wait_for("ppo")
        assert time.perf_counter() - began >= 1.0
        write_text(stage.path / "answers.jsonl", "")  # work to keep
    assert stage.manifest["wall_time_s"] < 0.9


# --- real processes, with notebooks that only write, wait or fail -------------------------------

# Writes down its kernel's id, and waits for the other notebook.
MEET = """\
import os, pathlib, time
folder = pathlib.Path({folder!r})
folder.joinpath({me!r}).write_text(str(os.getpid()))
while not folder.joinpath({other!r}).exists():
    time.sleep(0.05)"""
SLEEP = "time.sleep(300)"
# As a training does: it finishes its step, saves, and says so.
SAVE = """\
from spavl_lib.errors import Preempted
from spavl_lib.runs.signals import stop_on_signals
with stop_on_signals() as flag:
    while not flag:
        time.sleep(0.05)
folder.joinpath({me!r} + ".saved").touch()
raise Preempted("stopped by " + flag.reason + " after step 3")"""


@pytest.fixture
def pair(make_notebook: Callable, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Makes notebooks 02 and 04, which run at the same time: their folder, and a folder for notes.

    Called with the last cell of each.
    """
    notes = tmp_path / "notes"
    notes.mkdir()

    def make(reward: str, dpo: str) -> tuple[Path, Path]:
        cells = {"02_reward_model": ("reward", "dpo", reward), "04_dpo": ("dpo", "reward", dpo)}
        for name, (me, other, last) in cells.items():
            meet = MEET.format(folder=str(notes), me=me, other=other)
            folder = make_notebook(name, meet, last.replace("{me!r}", repr(me))).parent
        return folder, notes

    return make


@pytest.fixture(autouse=True)
def _two_cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "pair" in request.fixturenames:
        monkeypatch.setattr(sequence, "lanes_here", lambda *_: (2, ""))


def run_both(folder: Path) -> Path:
    return sequence.run_all(load_config("smoke"), folder=folder)


def gone(pids: list[int]) -> bool:
    end = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(map(is_alive, pids))


def children() -> set[int]:
    """Child processes of this one; multiprocessing's resource tracker stays until the end."""
    processes = psutil.Process().children(recursive=True)
    return {p.pid for p in processes if "resource_tracker" not in " ".join(p.cmdline())}


def test_both_run_at_once_and_are_kept_afterwards(
    pair: Callable, runs: Path, capfd: pytest.CaptureFixture
) -> None:
    folder, _ = pair(FINISH.format(stage="reward"), FINISH.format(stage="dpo"))
    before = children()
    run = run_both(folder)  # neither could end without the other
    assert children() <= before
    said = capfd.readouterr().out
    assert "reward: running 02_reward_model.ipynb\ndpo: running 04_dpo.ipynb\n" in said
    assert "reward: done in" in said and "dpo: done in" in said
    for name in ("reward", "dpo"):
        assert (run / name / "executed.ipynb").is_file()
        assert read_json(run / name / "status.json")["state"] == "done"


def test_a_failure_stops_the_other_notebook_and_is_the_error_shown(
    pair: Callable, runs: Path
) -> None:
    folder, notes = pair(
        SAVE, "from spavl_lib.errors import *; raise NonFiniteError('loss is nan')"
    )
    before = children()
    with pytest.raises(NonFiniteError, match="^loss is nan$"):
        run_both(folder)
    assert (notes / "reward.saved").exists()  # it was asked to stop, not killed
    states = [read_json(runs / "smoke" / n / "status.json") for n in ("reward", "dpo")]
    assert [page["state"] for page in states] == ["stopped", "failed"]
    assert [page["exit_code"] for page in states] == [75, 3]
    assert gone([int((notes / n).read_text()) for n in ("reward", "dpo")])
    assert children() <= before


@pytest.mark.slow
def test_a_killed_process_is_named(pair: Callable, runs: Path) -> None:
    """The kernel kills the process that executes it, its parent."""
    folder, _ = pair("os.kill(os.getppid(), 9)", SLEEP)
    with pytest.raises(NotebookError, match=r"02_reward_model\.ipynb ended with exit code -9"):
        run_both(folder)


@pytest.mark.parametrize(
    ("number", "last", "code"),
    [
        (signal.SIGINT, SLEEP, 130),
        (signal.SIGTERM, SAVE, 75),
        pytest.param(signal.SIGINT, SAVE, 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, SLEEP, 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, SLEEP, -9, marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_both(
    number: int, last: str, code: int, pair: Callable, runs: Path, repo: Path
) -> None:
    folder, notes = pair(last, last)
    words = "from spavl_lib.notebook import sequence; sequence.lanes_here = lambda *_: (2, '')"
    command = f"{words}; from spavl_lib.cli import main; main(['run', 'all', '-p', 'smoke'])"
    runner = subprocess.Popen(
        [sys.executable, "-c", command], cwd=repo, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"SPAVL_NOTEBOOKS": str(folder), "PYTHONPATH": str(repo)},
    )  # fmt: skip
    end = time.monotonic() + 120
    while len(list(notes.iterdir())) < 2:
        assert runner.poll() is None and time.monotonic() < end, runner.stderr.read()
        time.sleep(0.05)
    time.sleep(1)  # the cells after the meeting run
    pids = [int(path.read_text()) for path in notes.iterdir() if not path.suffix]
    pids += [child.pid for child in psutil.Process(runner.pid).children(recursive=True)]
    runner.send_signal(number)
    said = runner.communicate(timeout=120)[1]
    assert runner.returncode == code, said
    assert gone(pids)
    assert len(list(notes.glob("*.saved"))) == (2 if last == SAVE else 0)
    if number != signal.SIGKILL:
        assert "Traceback" not in said and "the same command resumes" in said or last == SAVE
        for name in ("reward", "dpo"):
            assert read_json(runs / "smoke" / name / "status.json")["state"] == "stopped"

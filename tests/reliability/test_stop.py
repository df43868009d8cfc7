"""SIGTERM and SIGINT: a checkpoint within one step, exit 75, and the same bits with dropout on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spavl_lib.runs.files import read_json
from tests.helpers import files_of
from tests.reliability.conftest import STEPS, Case
from tests.reliability.processes import Child, ready, spavl, until

DROPOUT = "dropout:0.2"
# Phase, exit code, and the step that must be saved then; None where nothing has begun.
PHASES = (
    ("data", 75, 1),
    ("build", 75, 1),
    ("forward@3", 75, 3),
    ("backward@4", 75, 4),
    ("save@4", 75, 4),
    ("evaluate@1", 75, STEPS),
    ("summary", 0, STEPS),
)
SHORT = (("SIGTERM", "save@4"), ("SIGINT", "evaluate@1"))


@pytest.fixture(scope="module")
def dropped(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A DPO with dropout in its adapters, and what it comes to uninterrupted."""
    case = Case("dpo_lora", rows, tmp_path_factory.mktemp("dropout"))
    ready()
    began = time.monotonic()
    child = case.start("straight", fault=DROPOUT)
    assert child.wait() == 0, child.said[-2000:]
    case.took_s, case.straight = time.monotonic() - began, case.ended("straight")
    return case


@pytest.mark.slow
def test_a_signal_in_any_phase_saves_and_ends_75(
    dropped: Case, cases: Callable[[str], Case], soak: bool, record: Callable
) -> None:
    assert dropped.straight.weights != cases("dpo_lora").straight.weights  # it is on
    tried = [(n, p) for n in ("SIGTERM", "SIGINT") for p, _, _ in PHASES] if soak else SHORT
    told = {phase: (code, step) for phase, code, step in PHASES}
    for number, phase in tried:
        name = f"{number}-{phase}"
        child = dropped.start(name, fault=f"both:{DROPOUT}&signal_in:{number}/{phase}")
        code, step = told[phase]
        assert child.wait() == code, f"{name}: {child.said[-2000:]}"
        assert dropped.newest(name) == step, name
        assert f"{number}: stopping when this step is done" in child.said
        assert (dropped.stage(name) / "summary.json").exists() is (code == 0)
        if code:
            assert f"spavl: stopped by {number}" in child.said
            assert dropped.start(name, fault=DROPOUT).wait() == 0
        assert dropped.ended(name) == dropped.straight, name
    record("R11", len(tried), len(tried), "script by phase, dropout on")


def test_a_signal_from_outside_is_heard_within_a_step(
    dropped: Case, soak: bool, record: Callable
) -> None:
    """As a batch system sends it; the wait is measured from the signal to the end."""
    waits = []
    for n in range(6 if soak else 1):
        name = f"outside{n}"
        child = dropped.start(name, fault=DROPOUT)
        until(lambda name=name: dropped.logged(name) >= 2, child)
        sent = time.monotonic()
        child.signal(signal.SIGTERM if n % 2 == 0 else signal.SIGINT)
        assert child.wait() == 75, child.said[-2000:]
        waits.append(time.monotonic() - sent)
        assert dropped.start(name, fault=DROPOUT).wait() == 0
        assert dropped.ended(name) == dropped.straight
    step = dropped.took_s / STEPS
    assert max(waits) < step + 5, waits
    record(
        "R11", len(waits), len(waits), "script from outside", longest_wait_s=round(max(waits), 2)
    )


PPO_PHASES = ("rollout@2", "reward@3", "update@2", "update@9", "save@2")


@pytest.mark.slow
def test_ppo_hears_a_signal_in_rollout_reward_update_and_save(
    cases: Callable[[str], Case], soak: bool, record: Callable
) -> None:
    """The step at hand is dropped and played again: the same bits."""
    case = cases("ppo")
    tried = [(n, p) for n in ("SIGTERM", "SIGINT") for p in PPO_PHASES] if soak else []
    for number, phase in tried or [("SIGTERM", "rollout@2")]:
        name = f"{number}-{phase}"
        child = case.start(name, fault=f"signal_in:{number}/{phase}")
        assert child.wait() == 75, f"{name}: {child.said[-2000:]}"
        assert case.newest(name) == case.logged(name), name
        assert f"stopped by {number} after step {case.newest(name)} of {STEPS}" in child.said
        assert case.start(name).wait() == 0
        assert case.ended(name) == case.straight, name
    record("R11", max(1, len(tried)), max(1, len(tried)), "PPO, by phase")


@pytest.mark.slow
def test_a_signal_while_answers_are_written_keeps_those_there_are(
    tmp_path: Path, soak: bool, record: Callable
) -> None:
    """Sampled ones: what comes after the stop is what would have come without."""

    def run(name: str, fault: str = "") -> Child:
        faults = "both:answers_instead:4" + (f"&{fault}" if fault else "")
        env = {"SPAVL_KIND": "dpo"}
        return spavl([], tmp_path / name, tmp_path / f"{name}.log", fault=faults, env=env)

    def answers(name: str) -> dict:
        folder = tmp_path / name / "r/inference"
        return {k: v for k, v in files_of(folder).items() if "jsonl" in k}

    child = run("straight")
    assert child.wait() == 0, child.said[-2000:]
    whole = answers("straight")
    assert len(whole) > 3
    moments = (1, 2, 5, 7, 10) if soak else (2,)
    tried = [(n, at) for n in ("SIGTERM", "SIGINT") for at in moments][: None if soak else 1]
    for number, at in tried:
        name = f"{number}{at}"
        child = run(name, f"signal_in:{number}/generate@{at}")
        assert child.wait() == 75, child.said[-2000:]
        assert not (tmp_path / name / "r/inference/summary.json").exists()
        kept = [
            json.loads(line)
            for path in (tmp_path / name).rglob("*.jsonl*")
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
        rows = [r for k in kept for r in k.get("records", [k] if "response" in k else [])]
        assert len(rows) == 2 * at, name  # the batch at hand is written too
        assert run(name).wait() == 0
        assert answers(name) == whole, name
    record("R11", len(tried), len(tried), "while answers are written")


def test_before_there_is_anything_sigterm_leaves_nothing_and_says_run_again(
    cases: Callable[[str], Case], record: Callable
) -> None:
    """While it still imports and reads its settings."""
    case = cases("dpo_lora")
    child = case.start("early", fault="signal_in:SIGTERM/hashing")
    assert child.wait() == 75, child.said[-2000:]
    assert "stopped by SIGTERM; the same command resumes" in child.said
    assert not case.stage("early").exists()
    record("R11", 1, 1, "before the first row was read")


NOTEBOOK = """\
from spavl_lib import pipeline
from spavl_lib.notebook.session import open_stage
config, stage = open_stage("dpo", profile, seed=seed, run_name=run_name, overrides=overrides)
pipeline.train("dpo", config, stage)"""


@pytest.mark.slow
def test_under_papermill_a_signal_saves_ends_75_and_no_later_cell_runs(
    cases: Callable[[str], Case], make_notebook: Callable, tmp_path: Path, repo: Path, soak: bool,
    record: Callable,
) -> None:  # fmt: skip
    case = cases("dpo_full")
    later = tmp_path / "later"
    folder = make_notebook("04_dpo", NOTEBOOK, f"open({str(later)!r}, 'a').write('ran')").parent
    words = ["run", "dpo", *case.words()[2:]]
    env = os.environ | {
        "SPAVL_NOTEBOOKS": str(folder), "PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    signals = [signal.SIGTERM, signal.SIGINT] * (2 if soak else 1)
    for n, number in enumerate(signals[: 4 if soak else 1]):
        runs = tmp_path / f"runs{n}"
        metrics = runs / "r/dpo/metrics.jsonl"

        def start(runs: Path = runs) -> subprocess.Popen:
            return subprocess.Popen(
                [sys.executable, "-m", "spavl_lib.cli", *words], cwd=repo,
                env=env | {"SPAVL_RUNS": str(runs)}, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip

        runner = start()
        end = time.monotonic() + 240
        while not metrics.is_file() or metrics.read_text().count("\n") < 2:
            assert runner.poll() is None and time.monotonic() < end, runner.stderr.read()
            time.sleep(0.05)
        runner.send_signal(number)
        said = runner.communicate(timeout=240)[1]
        assert runner.returncode == 75, said
        assert not later.exists()
        status = read_json(runs / "r/dpo/status.json")
        assert (status["state"], status["cell"], status["exit_code"]) == ("stopped", 3, 75)
        again = start()
        said = again.communicate(timeout=240)[1]
        assert again.returncode == 0, said
        case_root, case.root = case.root, runs.parent
        try:
            assert case.ended(runs.name) == case.straight
        finally:
            case.root = case_root
        assert later.read_text() == "ran"
        later.unlink()
        manifest = read_json(runs / "r/dpo/manifest.json")
        assert len(manifest["notebook"]["cell_times_s"]) == 4 and len(manifest["resumed"]) == 1
        assert json.dumps(manifest["notebook"]["parameters"])
    record("R11", len(signals[: 4 if soak else 1]), len(signals[: 4 if soak else 1]), "papermill")


@pytest.mark.slow
def test_no_more_than_ten_minutes_are_ever_unsaved(
    cases: Callable[[str], Case], record: Callable
) -> None:
    """Where a runtime may vanish without a signal, time counts beside steps."""
    case = cases("dpo_lora")
    many = {"dpo.save_steps": 100}
    assert case.start("seldom", changes=many, fault="kill_in:backward@6").wait() == -9
    assert case.newest("seldom") == 0
    fault = "both:save_all_the_time:0&kill_in:backward@6"
    assert case.start("often", changes=many, fault=fault).wait() == -9
    assert case.newest("often") == 5
    # And a folder that was carried elsewhere goes on there.
    (case.root / "often").rename(case.root / "carried")
    assert case.start("carried", changes=many).wait() == 0
    assert case.ended("carried").weights == case.straight.weights
    record("R12", 1, 1, "killed unannounced, folder carried elsewhere")

"""The sequence of notebooks: the order, what is kept, what is checked before anything runs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from spavl_lib.config import load_config
from spavl_lib.errors import InputError
from spavl_lib.notebook import sequence
from spavl_lib.runs.files import write_text
from spavl_lib.runs.stage import Run
from spavl_lib.stages import of_notebook


@pytest.fixture
def executions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces execution by its effect, and the report by nothing; lists what was executed."""
    names: list[str] = []

    def run_one(name: str, config: object, overrides: dict, run: Run, **_: object) -> Path:
        stage = run.stage(of_notebook(name).name)
        names.append(stage.name)
        stage.finish({})
        write_text(stage.path / "executed.ipynb", "{}")
        return stage.path / "executed.ipynb"

    monkeypatch.setattr(sequence, "run_notebook", run_one)
    monkeypatch.setattr(sequence, "lanes_here", lambda *_: (1, "in this process"))
    return names


def test_all_runs_in_order_and_keeps_what_is_done(
    make_notebook: Callable, runs: Path, executions: list[str], capsys: pytest.CaptureFixture
) -> None:
    for name in ("07_scaling_and_ablations", "06_safety_helpfulness", "04_dpo", "05_inference"):
        folder = make_notebook(name).parent
    config = load_config("smoke")
    sequence.run_all(config, folder=folder)
    assert executions == ["dpo", "inference", "evaluation"]

    executions.clear()
    (runs / "smoke" / "inference" / "summary.json").unlink()
    (runs / "smoke" / "evaluation" / "executed.ipynb").unlink()
    capsys.readouterr()
    sequence.run_all(config, folder=folder)
    assert executions == ["inference", "evaluation"]
    assert "dpo: done, kept\n" in capsys.readouterr().out


def test_another_judge_runs_the_evaluation_again_and_nothing_else(
    make_notebook: Callable, runs: Path, executions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence, "is_current", lambda *_: True)  # data and models are the same
    for name in ("04_dpo", "05_inference", "06_safety_helpfulness"):
        folder = make_notebook(name).parent
    config = load_config("smoke")
    for name in ("dpo", "inference", "evaluation"):
        with Run(config).stage(name).work() as stage:
            write_text(stage.path / "samples.jsonl", "")
            stage.finish({})
        write_text(stage.path / "executed.ipynb", "{}")
    sequence.run_all(config, folder=folder)
    assert executions == []
    sequence.run_all(load_config("smoke", {"evaluation.judge": "phrases"}), folder=folder)
    assert executions == ["evaluation"]


def test_all_refuses_changed_settings_before_it_runs_anything(
    make_notebook: Callable, runs: Path, executions: list[str]
) -> None:
    make_notebook("01_data_exploration")
    folder = make_notebook("04_dpo").parent
    config = load_config("smoke")
    with Run(config).stage("dpo").work() as stage:
        stage.finish({})
    with pytest.raises(InputError, match=r"dpo\.beta: 0\.1 -> 0\.2"):
        sequence.run_all(load_config("smoke", {"dpo.beta": 0.2}), folder=folder)
    assert executions == []


def test_all_checks_every_notebook_before_it_runs_anything(
    make_notebook: Callable, runs: Path, executions: list[str]
) -> None:
    make_notebook("01_data_exploration")
    folder = make_notebook("06_safety_helpfulness", parameters="seed: int = 0").parent
    with pytest.raises(InputError, match="06_safety_helpfulness.*'profile'"):
        sequence.run_all(load_config("smoke"), folder=folder)
    assert executions == []


def test_all_checks_the_judge_before_it_runs_anything(
    make_notebook: Callable, runs: Path, executions: list[str]
) -> None:
    folder = make_notebook("01_data_exploration").parent
    with pytest.raises(InputError, match="guard needs evaluation.judge_model"):
        sequence.run_all(load_config("smoke", {"evaluation.judge": "guard"}), folder=folder)
    assert executions == []

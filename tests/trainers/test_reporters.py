"""`report_to`: every trainer reports its logged values to the trackers that the config names."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from spavl_lib.config import load_config
from spavl_lib.config.sections import Tracker
from spavl_lib.errors import InputError
from spavl_lib.runs.files import read_jsonl
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.trainers import reporters
from spavl_lib.trainers.arguments import common_arguments
from spavl_lib.trainers.dpo import train_dpo
from spavl_lib.trainers.ppo import train_ppo
from tests.helpers import smoke

pytestmark = pytest.mark.filterwarnings("ignore")
SECTIONS = ("reward", "dpo", "kto", "rloo", "grpo")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) of every scalar in a folder of event files."""
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = loading.EventAccumulator(str(folder), {loading.SCALARS: 0})
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def stage_of(name: str, root: Path, **changes: object) -> Stage:
    return Run(smoke(changes, run_name="r"), root=root).stage(name)


def test_the_names_are_those_of_transformers() -> None:
    # transformers cannot tell whether flyte is installed.
    assert {*get_args(Tracker), "flyte"} == INTEGRATION_TO_CALLBACK.keys()


def test_an_unknown_tracker_is_refused_when_the_config_is_read() -> None:
    with pytest.raises(InputError, match="did you mean 'tensorboard'"):
        smoke({"report_to": "tensorbord"})
    assert smoke({"report_to": "wandb,mlflow"}).report_to == ("wandb", "mlflow")
    assert load_config("smoke").report_to == ()


@pytest.mark.parametrize("name", [*SECTIONS, "ppo"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_loads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporters, "get_available_reporting_integrations", lambda: ["mlflow"])
    stage = stage_of(name, tmp_path, report_to="mlflow,wandb")
    with pytest.raises(InputError, match="report_to names wandb, which is not installed") as error:
        if name == "ppo":
            train_ppo.__wrapped__(stage.run.config, stage, False)
        else:
            common_arguments(name, stage.run.config, stage)
    assert "\n" not in str(error.value)


def test_every_trainer_gets_the_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporters, "get_available_reporting_integrations", lambda: ["mlflow"])
    for name in SECTIONS:
        stage = stage_of(name, tmp_path, report_to="mlflow")
        arguments = common_arguments(name, stage.run.config, stage)
        assert arguments["report_to"] == ["mlflow"] and arguments["run_name"] == f"r-{name}"
        stage = stage_of(name, tmp_path)
        assert common_arguments(name, stage.run.config, stage)["report_to"] == []


def test_a_run_that_a_tracker_leaves_open_is_ended_before_the_next_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    monkeypatch.setattr(reporters, "get_available_reporting_integrations", lambda: ["wandb"])
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(finish=lambda: ended.append("end")))
    for name, known in (("dpo", 0), ("kto", 1)):
        stage = stage_of(name, tmp_path, report_to="wandb")
        reporters.reporter_arguments(stage.run.config, stage)
        assert len(ended) == known
    stage = stage_of("reward", tmp_path)  # this one reports nothing, and the one after it too
    for _ in range(2):
        reporters.reporter_arguments(stage.run.config, stage)
    assert len(ended) == 2


def test_tensorboard_holds_the_losses_of_dpo(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    stage = stage_of("dpo", tmp_path, report_to="tensorboard", **{"dpo.max_steps": 3})
    train_dpo(stage.run.config, stage)
    read = scalars(stage.path / "tensorboard")
    rows = [row for row in read_jsonl(stage.metrics_path) if "loss" in row]
    assert len(rows) == 3
    expected = [(row["step"], pytest.approx(row["loss"], abs=1e-4)) for row in rows]
    assert read["train/loss"] == expected
    assert {step for step, _ in read["train/rewards/margins"]} == {1, 2, 3}


def test_tensorboard_holds_the_losses_of_ppo(
    reward_folders: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    changes = {
        "model.adapter": "lora", "data.train_rows": 12, "ppo.max_steps": 2,
        "ppo.reward_model": str(reward_folders["lora"]), "ppo.rollout_batch_size": 4,
        "ppo.per_device_batch_size": 4, "ppo.max_new_tokens": 6, "ppo.sft_coef": 0.0,
    }  # fmt: skip
    stage = stage_of("ppo", tmp_path, report_to="tensorboard", **changes)
    train_ppo(stage.run.config, stage)
    read = scalars(stage.path / "tensorboard")
    rows = read_jsonl(stage.metrics_path)
    assert len(rows) == 2
    names = [key for key, value in rows[0].items() if key != "step" and value is not None]
    assert "objective/kl" in names and any(name.startswith("loss/") for name in names)
    for name in names:
        assert read[f"train/{name}"] == [
            (row["step"], pytest.approx(row[name], rel=1e-5, abs=1e-6)) for row in rows
        ], name

"""The reward trainer: it learns, it resumes exactly, it refuses what it must."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import modeling_utils

from spavl_lib.config import Config
from spavl_lib.data.load import load_preferences
from spavl_lib.errors import InputError, NonFiniteError, Preempted
from spavl_lib.evaluation.metrics import (
    calibration,
    cost_metrics,
    expected_calibration_error,
    reward_metrics,
    spearman,
)
from spavl_lib.modelling.heads import load_reward_model
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.trainers import reward
from spavl_lib.trainers.progress import StageCallback
from tests.helpers import count_calls, metric_rows, smoke

pytestmark = pytest.mark.filterwarnings("ignore")


def settings(adapter: str, **changes: object) -> Config:
    overrides = {"model.adapter": adapter, "data.train_rows": 32, "data.validation_rows": 16}
    overrides |= {"reward.max_steps": 6, "reward.save_steps": 2}
    return smoke(overrides | {k.replace("__", "."): v for k, v in changes.items()}, run_name="r")


def train(config: Config, root: Path) -> tuple[Stage, dict]:
    stage = Run(config, root=root).stage("reward")
    return stage, reward.train_reward(config, stage)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_stopped_run_goes_on_to_the_same_end(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(adapter, reward__shift_px=2, reward__mirror=True, reward__sft_coef=0.1)
    config = dataclasses.replace(config, reward=dataclasses.replace(config.reward, cost_coef=0.5))
    straight, expected = train(config, tmp_path / "straight")
    assert expected["steps"] == 6
    assert "tower" not in expected["trainable_parameters"]
    again, repeated = train(config, tmp_path / "again")
    assert metric_rows(again) == metric_rows(straight)
    assert repeated["weights_sha256"] == expected["weights_sha256"]

    old = StageCallback.on_step_end

    def stop_at_three(self: object, args: object, state: object, *rest: object, **more: object):  # noqa: ANN202
        if state.global_step == 3:
            self.flag.reason = "SIGTERM"
        return old(self, args, state, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(StageCallback, "on_step_end", stop_at_three)
        with pytest.raises(Preempted, match="after step 3 of 6"):
            train(config, tmp_path / "cut")
    cut, resumed = train(config, tmp_path / "cut")
    assert metric_rows(cut) == metric_rows(straight)
    assert resumed["weights_sha256"] == expected["weights_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_recomputing_activations_changes_no_number(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(monkeypatch, modeling_utils, "checkpoint")
    plain, _ = train(settings(adapter, reward__max_steps=3), tmp_path / "plain")
    assert not calls
    saving = settings(adapter, reward__max_steps=3, model__gradient_checkpointing=True)
    stage, _ = train(saving, tmp_path / "saving")
    assert len(calls) == 3 * (4 + 4)  # every layer of every step, the frozen tower's among them
    ours, theirs = ([r for r in metric_rows(s) if "loss" in r] for s in (stage, plain))
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_it_learns_the_pairs_it_sees_and_which_responses_do_harm(tmp_path: Path) -> None:
    config = settings(
        "full", reward__max_steps=40, reward__learning_rate=1e-3, reward__cost_coef=1.0
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train_rows=16))
    stage, _ = train(config, tmp_path)
    model = load_reward_model(config.model, stage.path / "model")
    rows = load_preferences(config.data, "train")
    scored = reward.score_pairs(model, reward.load_processor(config.model), rows, 8)
    assert sum(r["chosen_score"] > r["rejected_score"] for r in scored) >= 0.95 * len(scored)
    costs = cost_metrics(scored, reward.harm_labels(config))
    assert 1 <= costs["pair_accuracy"]["n"] < 16  # both kinds of requests
    assert costs["sign_accuracy"]["value"] >= 0.95 and costs["auc"] >= 0.98
    assert costs["mean_harmful"] > 0.5 and costs["mean_harmless"] < -0.5


def test_a_source_without_labels_of_harm_trains_no_cost_head(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(reward, "load_pair_truth", lambda _: {})
    with pytest.raises(InputError, match="needs labels of harmful requests, and data.source mini"):
        train(settings("full", reward__cost_coef=1.0), tmp_path)


def test_pairs_of_an_extra_file_train_no_cost_head(tmp_path: Path) -> None:
    config = settings("full", reward__cost_coef=1.0, data__extra_path="extra.jsonl")
    with pytest.raises(InputError, match=r"the pairs of data\.extra_path 'extra\.jsonl' have none"):
        reward.harm_labels(config)


def test_a_weight_that_is_no_number_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = reward.build_model

    def spoilt(config: Config):  # noqa: ANN202
        model = build(config)
        with torch.no_grad():
            model.score.weight[0, 0] = float("nan")
        return model

    monkeypatch.setattr(reward, "build_model", spoilt)
    with pytest.raises(NonFiniteError, match="step 1"):
        train(settings("lora"), tmp_path)


def test_measures_by_hand() -> None:
    margins = [10.0, 10.0, -10.0, 0.0]  # sure and right, twice; sure and wrong; undecided
    table = calibration(margins)
    assert [row["n"] for row in table] == [1, 3]
    assert table[1]["right"] == pytest.approx(2 / 3)
    expected = (1 * 0.5 + 3 * (1 / (1 + 2.718281828**-10) - 2 / 3)) / 4
    assert expected_calibration_error(margins) == pytest.approx(expected, abs=1e-6)
    assert spearman([1, 2, 3, 4], [10, 20, 30, 25]) == pytest.approx(0.8)
    assert spearman([1, 1, 2], [5, 5, 9]) == pytest.approx(1.0)
    assert spearman([1, 2], [3, 3]) is None


def test_metrics_count_what_they_say() -> None:
    def row(number: int, chosen: float, rejected: float, words: int) -> dict:
        return {
            "id": f"v/{number}", "class1": "A", "class3": "a" if number % 2 else "b",
            "question_type": "", "chosen_score": chosen, "rejected_score": rejected,
            "chosen_words": words, "rejected_words": 10,
        }  # fmt: skip

    scored = [row(0, 2, 1, 12), row(1, 0, 1, 12), row(2, 3, 1, 8), row(3, 1, 0, 12)]
    truth = {"v/0": {"question_type": "easy"}, "v/1": {"question_type": "hards"}}
    found = reward_metrics(scored, [row(0, 0, 1, 1), row(1, 1, 0, 1)], scored[1:2], truth)
    assert (found["pair_accuracy"]["k"], found["pair_accuracy"]["n"]) == (3, 4)
    assert found["swapped"]["k"] == 0 and found["exchanged"]["k"] == 1
    assert found["longer_is_better"]["k"] == 3
    assert {k: v["n"] for k, v in found["per_question_type"].items()} == {"easy": 1, "hards": 1}
    assert {k: v["k"] for k, v in found["per_class"].items()} == {"a": 1, "b": 2}


def test_metrics_of_costs_by_hand() -> None:
    scored = [
        {"id": "a", "chosen_cost": -1.0, "rejected_cost": 2.0},  # harmful, in order
        {"id": "b", "chosen_cost": 0.5, "rejected_cost": -0.5},  # harmful, both signs wrong
        {"id": "c", "chosen_cost": -3.0, "rejected_cost": -0.5},  # harmless
    ]
    metrics = cost_metrics(scored, {"a": True, "b": True, "c": False})
    assert (metrics["pair_accuracy"]["k"], metrics["pair_accuracy"]["n"]) == (1, 2)
    assert (metrics["sign_accuracy"]["k"], metrics["sign_accuracy"]["n"]) == (4, 6)
    # Harmful costs 2 and -0.5, harmless ones -1, 0.5, -3 and -0.5: 4 and 2.5 of 4 are lower.
    assert metrics["auc"] == pytest.approx(6.5 / 8)
    assert metrics["mean_harmful"] == pytest.approx(0.75)
    assert metrics["mean_harmless"] == pytest.approx(-1.0)
    none = cost_metrics(scored[2:], {"c": False})
    assert none["pair_accuracy"] is None and none["auc"] is None

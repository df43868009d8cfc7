"""The original's settings in notebook 03b: those of the method, whatever the run's own are."""

import dataclasses
import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from spavl_lib.config import Config, load_config
from spavl_lib.config.presets import ORIGINAL_PRESET
from spavl_lib.data.load import load_preferences
from spavl_lib.errors import InputError
from spavl_lib.runs.stage import Run
from spavl_lib.trainers import practice
from spavl_lib.trainers.inputs import check_images
from spavl_lib.trainers.practice import original_settings, variants_of


def test_only_the_method_changes() -> None:
    config = load_config("demo", {"ppo.max_steps": 10, "ppo.reward_model": "/a/folder"})
    settings = original_settings(config)
    known = {"preset", "learning_rate", *ORIGINAL_PRESET["ppo"]}
    assert {"kl_coef", "gae_lambda", "preset"} <= set(settings) <= known
    assert settings["learning_rate"] == 5e-7
    lora = load_config("demo", {"model.adapter": "lora"})
    assert original_settings(lora)["learning_rate"] == 1e-6
    assert original_settings(load_config("demo", {"ppo.preset": "original"})) == {}


def test_a_profile_of_ones_own_has_the_variants_too(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: demo\nppo: {kl_coef: 0.3}\n", encoding="utf-8")
    config = load_config(str(tmp_path / "mine.yaml"))
    assert variants_of(config)["original"][1]["kl_coef"] == 0.1


def test_both_reward_models_are_inputs(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(practice, "training_inputs", lambda *_: {})
    monkeypatch.setattr(practice, "reward_inputs", lambda s, _: {s.reward_model: "hash"})
    config: Config = load_config("demo")
    config = dataclasses.replace(
        config,
        ppo=dataclasses.replace(config.ppo, reward_model="/one"),
        rloo=dataclasses.replace(config.rloo, reward_model="/two"),
    )
    stage = Run(config, root=tmp_path).stage("practice")
    assert practice._inputs(config, stage) == {"/one": "hash", "/two": "hash"}


def test_rloo_trains_without_text_only_pairs_and_says_so_before_any_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pair = {"prompt": "How do I boil rice?", "chosen": "Simmer it.", "rejected": "No."}
    extra = tmp_path / "extra.jsonl"
    extra.write_text(json.dumps(pair), encoding="utf-8")
    asked: list[tuple[str, str]] = []

    def train_variant(kind: str, config: Config, *_: object, **__: object) -> object:
        asked.append((kind, config.data.extra_path))
        return SimpleNamespace(summary={"steps": 1})

    monkeypatch.setattr(practice, "train_variant", train_variant)
    config = load_config("smoke", {"data.extra_path": str(extra)})
    stage = Run(config, root=tmp_path).stage("practice")
    make = inspect.unwrap(practice.make_practice_stage)
    make(config, stage)
    assert asked == [("ppo", str(extra))] * 3 + [("rloo", "")]
    rows = load_preferences(config.data, "train")
    with pytest.raises(InputError, match=r"1 rows have none: .*; set data\.extra_path to an empty"):
        check_images("rloo", config.data, rows)
    plain = load_preferences(dataclasses.replace(config.data, extra_path=""), "train").to_list()
    asked.clear()
    monkeypatch.setattr(
        practice, "load_preferences", lambda *_: rows.from_list([plain[0] | {"image": None}])
    )
    with pytest.raises(InputError, match="1 rows have none: train/.*; leave these rows out"):
        make(config, stage)
    assert not asked

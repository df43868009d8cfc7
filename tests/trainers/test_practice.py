"""The original's settings in notebook 03b: those of the method, whatever the run's own are."""

import dataclasses
from pathlib import Path

from spavl_lib.config import Config, load_config
from spavl_lib.config.presets import ORIGINAL_PRESET
from spavl_lib.runs.stage import Run
from spavl_lib.trainers import practice
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

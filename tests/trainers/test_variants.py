"""Variants: short, beside the real run, changed in what was asked and in nothing else."""

from pathlib import Path

import pytest

from spavl_lib.config import Config
from spavl_lib.errors import InputError
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.trainers import variants
from tests.helpers import smoke


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, Stage]]:
    """Trainers that only note what they were asked for."""
    calls: list[tuple[Config, Stage]] = []
    monkeypatch.setattr(variants, "maker_of", lambda kind: lambda c, s: calls.append((c, s)))
    return calls


def test_a_variant_changes_what_was_asked_and_its_length(tmp_path: Path, trained: list) -> None:
    config = smoke({"dpo.max_steps": 0, "dpo.warmup_steps": 7}, run_name="r")
    stage = Run(config, root=tmp_path).stage("dpo")
    found = variants.train_variant("dpo", config, stage, "eager", learning_rate=5e-4)
    [(other, where)] = trained
    assert found is where and where.path == tmp_path / "r/dpo/variants/eager/dpo"
    before, after = config.to_dict(), other.to_dict()
    changed = {k for k in before["dpo"] if before["dpo"][k] != after["dpo"][k]}
    assert changed == {"max_steps", "warmup_steps", "learning_rate"}
    assert (other.dpo.max_steps, other.dpo.warmup_steps) == (40, 5)
    assert {k for k in before if before[k] != after[k]} == {"dpo", "run_name"}


def test_a_variant_of_other_settings_is_found_before_it_is_trained_again(
    tmp_path: Path, trained: list
) -> None:
    """Interrupted after the variants, changed, and run again under the same name."""
    config = smoke(run_name="r")
    stage = Run(config, root=tmp_path).stage("dpo")
    variant = variants.train_variant("dpo", config, stage, "plain", loss_type=("sigmoid",),
                                     loss_weights=(1.0,))  # fmt: skip
    with variant.work():
        variant.log({"step": 1})
    stage.check_all()  # what the variant changes is no change of the run
    changed = Run(smoke({"dpo.beta": 0.5}, run_name="r"), root=tmp_path).stage("dpo")
    with pytest.raises(
        InputError, match=r"dpo/variants/plain/dpo was .*\n  dpo\.beta: 0\.1 -> 0\.5"
    ):
        changed.check_all()
    longer = Run(smoke({"dpo.max_steps": 3}, run_name="r"), root=tmp_path).stage("dpo")
    longer.check_all()


def test_a_variant_is_never_longer_than_the_run(tmp_path: Path, trained: list) -> None:
    config = smoke({"dpo.max_steps": 3}, run_name="r")
    stage = Run(config, root=tmp_path).stage("dpo")
    variants.train_variant("dpo", config, stage, "short", warmup_steps=1)
    assert (trained[0][0].dpo.max_steps, trained[0][0].dpo.warmup_steps) == (3, 1)


@pytest.mark.parametrize("kind", ["ppo", "rloo"])
def test_a_variant_uses_the_runs_own_reward_model(kind: str, tmp_path: Path, trained: list) -> None:
    config = smoke(run_name="r")
    run = Run(config, root=tmp_path)
    with pytest.raises(InputError, match="needs a reward model"):
        variants.train_variant(kind, config, run.stage("ppo"), "x")
    run.stage("reward").path.mkdir(parents=True)
    run.stage("reward").finish({})
    variants.train_variant(kind, config, run.stage("ppo"), "x", steps=2)
    settings = getattr(trained[0][0], kind)
    assert settings.reward_model == str(tmp_path / "r/reward/model")
    assert settings.max_steps == 2
    named = smoke({f"{kind}.reward_model": "/elsewhere"}, run_name="r")
    variants.train_variant(kind, named, Run(named, root=tmp_path).stage("ppo"), "x")
    assert getattr(trained[1][0], kind).reward_model == "/elsewhere"


def test_a_setting_that_cannot_be_is_refused_before_training(tmp_path: Path, trained: list) -> None:
    config = smoke(run_name="r")
    stage = Run(config, root=tmp_path).stage("dpo")
    with pytest.raises(InputError, match="beta"):
        variants.train_variant("dpo", config, stage, "bad", beta=-1.0)
    assert trained == []


@pytest.mark.parametrize("folder", ["variants", "contrast"])
def test_variants_alone_do_not_make_a_stage_begun(folder: str, tmp_path: Path) -> None:
    """In the old layout too; the stage itself may still change its settings."""
    stage = Run(smoke(run_name="r"), root=tmp_path).stage("dpo")
    log = stage.path / folder / "eager/dpo/metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("{}\n")
    assert not stage.begun
    (stage.path / "metrics.jsonl").write_text("{}\n")
    assert stage.begun

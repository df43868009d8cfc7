"""Adapters over 4 bit, through every trainer: resumed to the same bits, saved, loaded, the same."""

from pathlib import Path

import pytest
import torch
from torch import nn

from spavl_lib.config import Config
from spavl_lib.data.collate import PreferenceCollator
from spavl_lib.data.load import load_preferences
from spavl_lib.errors import Preempted
from spavl_lib.modelling.heads import load_reward_model
from spavl_lib.modelling.load import load_policy
from spavl_lib.modelling.speed.shared_prefix import HANDLE, apply_sharing, backbone_of
from spavl_lib.runs.files import read_jsonl
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.trainers import dpo, ppo, reward
from spavl_lib.trainers.progress import StageCallback
from tests.helpers import embedded_processor, logps_of, mini_rows, smoke, spread

pytest.importorskip("bitsandbytes", reason="4 bit needs bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")
CLOCK = ("time_s", "peak_memory_gib")
TRAIN = {"reward": reward.train_reward, "dpo": dpo.train_dpo, "ppo": ppo.train_ppo}
STEPS = {"reward": 3, "dpo": 3, "ppo": 2}


def settings(kind: str, **changes: object) -> Config:
    overrides = {
        "model.adapter": "qlora", "data.train_rows": 12, "data.validation_rows": 8,
        f"{kind}.max_steps": STEPS[kind], f"{kind}.per_device_batch_size": 4,
        f"{kind}.save_steps": 1, f"{kind}.learning_rate": 1e-3, f"{kind}.warmup_steps": 0,
    }  # fmt: skip
    if kind == "ppo":
        overrides |= {"ppo.rollout_batch_size": 4, "ppo.max_new_tokens": 8}
    overrides |= {k.replace("__", "."): v for k, v in changes.items()}
    return smoke(overrides, run_name="q")


def train(kind: str, config: Config, root: Path) -> Stage:
    stage = Run(config, root=root).stage(kind)
    TRAIN[kind](config, stage)
    return stage


def logged(stage: Stage) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in read_jsonl(stage.metrics_path)]


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A reward model over 4 bit, trained without a break."""
    return train("reward", settings("reward"), tmp_path_factory.mktemp("rewarded"))


@pytest.fixture
def batch() -> dict:
    return PreferenceCollator(embedded_processor())(spread(mini_rows("validation"), 4))


def stopped_after_one_step(kind: str, patch: pytest.MonkeyPatch) -> None:
    if kind == "ppo":
        log = ppo.PPOTrainer._log

        def asked(self: ppo.PPOTrainer, *args: object) -> None:
            log(self, *args)
            self.flag.reason = "SIGTERM"

        patch.setattr(ppo.PPOTrainer, "_log", asked)
        return
    end = StageCallback.on_step_end

    def on_step_end(self: object, *args: object, **more: object) -> object:
        self.flag.reason = "SIGTERM"
        return end(self, *args, **more)

    patch.setattr(StageCallback, "on_step_end", on_step_end)


def resumed(kind: str, config: Config, root: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    with monkeypatch.context() as patch:
        stopped_after_one_step(kind, patch)
        with pytest.raises(Preempted, match=f"after step 1 of {STEPS[kind]}"):
            train(kind, config, root)
    return train(kind, config, root)


def assert_four_bit(model: nn.Module) -> None:
    kinds = {p.dtype for n, p in model.named_parameters() if "proj.base_layer.weight" in n}
    assert kinds == {torch.uint8}


@pytest.mark.slow
def test_a_reward_model_resumes_and_scores_the_same_when_loaded(
    rewarded: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("reward")
    stage = resumed("reward", config, tmp_path, monkeypatch)
    assert logged(stage) == logged(rewarded)
    assert stage.summary["weights_sha256"] == rewarded.summary["weights_sha256"]
    model = load_reward_model(config.model, stage.path / "model")
    assert_four_bit(model)
    apply_sharing(model, config.model.share_prefix)
    rows = load_preferences(config.data, "validation")
    again = reward.score_pairs(model, embedded_processor(), rows, 4)
    trained = read_jsonl(stage.path / "samples.jsonl")
    assert len(again) == len(trained) == 8
    for key in ("chosen_score", "rejected_score"):
        assert [r[key] for r in again] == [r[key] for r in trained]
    assert len({r["chosen_score"] for r in trained}) > 1


@pytest.mark.parametrize("kind", ["dpo", pytest.param("ppo", marks=pytest.mark.slow)])
def test_a_policy_resumes_and_says_the_same_when_loaded(
    kind: str, rewarded: Stage, batch: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = {"ppo__reward_model": str(rewarded.path / "model")} if kind == "ppo" else {}
    config, place = settings(kind, **extra), {"dpo": dpo, "ppo": ppo}[kind]
    save, said = place.save_trained, []

    def saved(model: nn.Module, *args: object) -> Path:
        model.set_adapter("default")  # the last to play was PPO's value model
        said.append(logps_of(model.eval(), batch))
        with model.disable_adapter():
            said.append(logps_of(model, batch))
        return save(model, *args)

    monkeypatch.setattr(place, "save_trained", saved)
    straight = train(kind, config, tmp_path / "straight")
    cut = resumed(kind, config, tmp_path / "cut", monkeypatch)
    assert logged(cut) == logged(straight)
    assert cut.summary["weights_sha256"] == straight.summary["weights_sha256"]
    trained, base, again, _ = said
    assert torch.equal(again, trained)
    assert (trained - base).abs().mean() > 1e-2  # the adapters do something
    policy = load_policy(config.model, cut.path / "model")
    assert_four_bit(policy)
    apply_sharing(policy, config.model.share_prefix)
    assert torch.equal(logps_of(policy, batch), trained)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_shared_prefixes_give_the_same_losses_over_four_bit(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, packed = {}, []
    build = {"reward": reward, "dpo": dpo}[kind].build_trainer

    def built(*args: object) -> object:
        trainer = build(*args)
        packed.append(trainer.model)
        return trainer

    monkeypatch.setattr(f"spavl_lib.trainers.{kind}.build_trainer", built)
    for mode in ("require", "off"):
        stage = train(kind, settings(kind, model__share_prefix=mode), tmp_path / mode)
        losses[mode] = [r["loss"] for r in logged(stage) if "loss" in r]
    handles = [handle_of(model) for model in packed]
    assert handles[0].stats["shared"] >= 3 and handles[1] is None
    # Before the first update the weights are the same; after it, Adam makes rounding larger.
    assert losses["require"][0] == pytest.approx(losses["off"][0], rel=1e-5)
    assert losses["require"] == pytest.approx(losses["off"], rel=1e-4)
    assert len(losses["off"]) == 3 and len(set(losses["off"])) == 3


def handle_of(model: nn.Module) -> object:
    return getattr(backbone_of(model), HANDLE, None)

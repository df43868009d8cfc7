"""PPO end to end on the embedded model: repeatable, resumable, and right for any batch size."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from spavl_lib.config import Config
from spavl_lib.data.load import load_preferences
from spavl_lib.errors import InputError, NonFiniteError, Preempted
from spavl_lib.modelling.load import load_policy
from spavl_lib.objectives.ppo import gae, kl_penalty_rewards
from spavl_lib.runs.files import read_jsonl
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.trainers import ppo_rollout
from spavl_lib.trainers.engines import Engine
from spavl_lib.trainers.ppo import PPOTrainer, train_ppo
from spavl_lib.trainers.ppo_terms import add_advantages
from spavl_lib.trainers.rollout import Prompt, Rollout
from tests.helpers import mini_rows, smoke, write_reward_model

pytestmark = pytest.mark.filterwarnings("ignore")
CLOCK = ("time_s", "peak_memory_gib")
PHASES = ("sample", "_measure", "add_advantages", "minibatch", "_log")
# Calls that go well: the first two die in step 1, then in steps 1 and 2, the last before a save.
DIES_AT = {"sample": 1, "_measure": 0, "add_advantages": 1, "minibatch": 5, "_log": 0}


@pytest.fixture
def folders(reward_folders: dict[str, Path]) -> dict[str, Path]:
    return reward_folders


def settings(folder: Path, **changes: object) -> Config:
    overrides = {
        "model.adapter": folder.name, "data.train_rows": 12, "ppo.reward_model": str(folder),
        "ppo.max_steps": 3, "ppo.rollout_batch_size": 6, "ppo.per_device_batch_size": 4,
        "ppo.max_new_tokens": 10, "ppo.save_steps": 1, "ppo.kl_target": 1.0, "ppo.sft_coef": 0.0,
    }  # fmt: skip
    overrides |= {k.replace("__", "."): v for k, v in changes.items()}
    return smoke(overrides, run_name="p")


def train(config: Config, root: Path) -> tuple[Stage, dict]:
    stage = Run(config, root=root).stage("ppo")
    return stage, train_ppo(config, stage)


def trainer_of(config: Config, root: Path) -> PPOTrainer:
    stage = Run(config, root=root).stage("ppo")
    rows = load_preferences(config.data, "train")
    return PPOTrainer(config, stage, rows, Path(config.ppo.reward_model), False)


def logged(stage: Stage) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in read_jsonl(stage.metrics_path)]


class Killed(Exception):
    """What stands for a kill: nothing of ours catches it."""


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_run_killed_anywhere_goes_on_to_the_same_end(
    adapter: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, steps = settings(folders[adapter]), []
    step = Engine.step
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", lambda *args: steps.append(args) or step(*args))
        straight, expected = train(config, tmp_path / "straight")
    assert expected["steps"] == 3 and expected["optimizer_steps"] == len(steps) == 12
    assert len(read_jsonl(straight.path / "rollouts.jsonl")) == 18
    phases = PHASES if adapter == "full" else PHASES[3:4]
    for phase in phases:
        place = PPOTrainer if hasattr(PPOTrainer, phase) else ppo_rollout
        old, left = getattr(place, phase), iter(range(DIES_AT[phase]))

        def dying(*args: object, old: object = old, left: object = left, **more: object) -> object:
            if next(left, None) is None:
                raise Killed
            return old(*args, **more)

        with monkeypatch.context() as patch:
            patch.setattr(place, phase, dying)
            with pytest.raises(Killed):
                train(config, tmp_path / "cut")
    cut, resumed = train(config, tmp_path / "cut")
    assert logged(cut) == logged(straight)
    assert (cut.path / "rollouts.jsonl").read_text() == (
        straight.path / "rollouts.jsonl"
    ).read_text()
    for name in ("optimizer_steps", "weights_sha256"):
        assert resumed[name] == expected[name]
    before = {p: p.stat().st_mtime_ns for p in cut.path.rglob("*")}
    assert train(config, tmp_path / "cut")[1] == resumed
    assert before == {p: p.stat().st_mtime_ns for p in cut.path.rglob("*")}


@pytest.mark.slow
def test_a_killed_run_with_a_cost_limit_goes_on_with_its_multiplier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_reward_model(tmp_path / "full", "full", with_cost=True)
    config = settings(tmp_path / "full", ppo__cost_limit=-5.0, ppo__lagrange_initial=0.5)
    straight, expected = train(config, tmp_path / "straight")
    rows = logged(straight)
    multipliers = [row["objective/lagrange_multiplier"] for row in rows]
    assert multipliers[0] == 0.5 < multipliers[1] < multipliers[2]
    assert multipliers[2] < expected["lagrange_multiplier"]
    assert all("cost" in row for row in read_jsonl(straight.path / "rollouts.jsonl"))
    old, left = PPOTrainer.minibatch, iter(range(5))

    def dying(*args: object, **more: object) -> object:
        if next(left, None) is None:
            raise Killed
        return old(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "minibatch", dying)
        with pytest.raises(Killed):
            train(config, tmp_path / "cut")
    cut, resumed = train(config, tmp_path / "cut")
    assert logged(cut) == rows
    for name in ("lagrange_multiplier", "costs", "weights_sha256"):
        assert resumed[name] == expected[name]


@pytest.mark.slow
def test_asked_to_stop_it_saves_the_last_whole_step(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(folders["lora"], ppo__save_steps=50)
    old = PPOTrainer._measure

    def asked(self: PPOTrainer, *args: object) -> None:
        if self.step == 1:
            self.flag.reason = "SIGTERM"
        old(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "_measure", asked)
        with pytest.raises(Preempted, match="after step 1 of 3"):
            train(config, tmp_path)
    stage, _ = train(config, tmp_path)
    assert [r["step"] for r in logged(stage)] == [1, 2, 3]


@pytest.mark.parametrize("adapter", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_gradients_do_not_depend_on_the_size_of_pieces(
    adapter: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    found = []
    for size in (6, 1):
        config = settings(
            folders[adapter], ppo__per_device_batch_size=size, ppo__sft_coef=0.5,
            ppo__entropy_coef=0.01, ppo__max_new_tokens=24,
        )  # fmt: skip
        trainer = trainer_of(config, tmp_path / str(size))
        cache = trainer.tower_cache()
        with cache.rollout():
            rollout = trainer.roll_out(0, cache)
            trainer.model.train()
            stats = trainer.accumulate(rollout, list(range(6)), cache, first=True)
        found.append((rollout, stats, [p.grad.clone() for g in trainer.engine.groups.values()
                                       for p in g if p.grad is not None]))  # fmt: skip
    (whole, stats, gradients), (single, stats_1, gradients_1) = found
    assert whole.responses == single.responses
    for name, values in whole.columns.items():
        torch.testing.assert_close(values, single.columns[name], atol=1e-5, rtol=1e-4)
    assert stats.keys() == stats_1.keys()
    for name in ("loss/policy_avg", "loss/value_avg", "policy/entropy_avg", "loss/sft_avg"):
        assert stats[name] == pytest.approx(stats_1[name], abs=1e-5, rel=1e-5)
    assert len(gradients) == len(gradients_1) > 40
    for gradient, other in zip(gradients, gradients_1, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-4)
    assert max(g.abs().max() for g in gradients) > 1e-2
    assert whole.mask.sum(1).unique().numel() > 1  # unequal lengths, or nothing was shown


def test_losses_leave_the_other_role_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    """Each loss is switched off by its own target, which leaves the other one's gradient."""
    trainer = trainer_of(settings(folders["full"], ppo__vf_coef=0.1), tmp_path)
    cache = trainer.tower_cache()
    with cache.rollout():
        rollout = trainer.roll_out(0, cache)
        columns = rollout.columns
        off = {
            "policy": columns | {"advantages": torch.zeros_like(columns["advantages"])},
            "value": columns | {"returns": columns["values"]},
        }
        trainer.model.train()
        for role, other in (("policy", "value"), ("value", "policy")):
            rollout.columns = off[role]
            trainer.engine.zero_grad()
            trainer.accumulate(rollout, [0, 1], cache)
            largest = {
                name: max(p.grad.abs().max().item() for p in group if p.grad is not None)
                for name, group in trainer.engine.groups.items()
            }
            assert largest[role] < 1e-5 and largest[other] > 1e-2, largest


def test_rewards_penalties_and_advantages_by_hand(folders: dict[str, Path]) -> None:
    config = settings(
        folders["lora"], ppo__length_penalty=0.1, ppo__missing_eos_penalty=2.0,
        ppo__whiten_advantages=False, ppo__kl_coef=0.5, ppo__kl_target=0.0, ppo__gae_lambda=0.9,
    )  # fmt: skip
    prompts = [Prompt(str(i), "", [1], {}, {}) for i in range(2)]
    rollout = Rollout(prompts, [[5, 6, 2], [7, 8]], ["a", "b"], [True, False])
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 0.0]])
    rollout.columns = {
        "logps": logps,
        "ref_logps": logps - torch.tensor([[0.2, 0.0, -0.4], [0.0, 1.0, 0.0]]),
        "values": torch.tensor([[0.5, 0.25, 0.0], [1.0, 0.0, 0.0]]),
        "scores": torch.tensor([1.0, 3.0]),
    }
    add_advantages(rollout, config.ppo, config.ppo.kl_coef)
    # 1 - 3 x 0.1 at the last token of the first; 3 - 2 x 0.1 - 2 at that of the second.
    expected = torch.tensor([[-0.1, 0.0, 0.7 + 0.2], [0.0, 0.8 - 0.5, 0.0]])
    torch.testing.assert_close(rollout.columns["rewards"], expected)
    scores = torch.tensor([0.7, 0.8])
    again = kl_penalty_rewards(
        scores, logps, rollout.columns["ref_logps"], rollout.mask, kl_coef=0.5
    )
    torch.testing.assert_close(again, expected)
    by_gae = gae(expected, rollout.columns["values"], rollout.mask, gamma=1.0, gae_lambda=0.9)
    torch.testing.assert_close(rollout.columns["advantages"], by_gae.advantages)
    assert rollout.columns["advantages"][1, 2] == 0


def toy(trainer: PPOTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that likes answers to begin with " To", and values that start from nothing."""
    with torch.no_grad():
        trainer.model.value_head.weight.zero_()
    forward = trainer.model.forward
    [wanted, *_] = trainer.processor.tokenizer.encode(" To", add_special_tokens=False)

    def rewarding(role: str, **batch: object) -> tuple[torch.Tensor, ...]:
        if role == "reward":
            return (2.0 * (batch["input_ids"][:, -batch["width"]] == wanted).float(),)
        return forward(role, **batch)

    monkeypatch.setattr(trainer.model, "forward", rewarding)


@pytest.mark.slow
def test_a_toy_reward_rises_and_a_huge_kl_price_forbids_it(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = {}
    for kl_coef in (0.01, 1e4):
        config = settings(
            folders["full"], ppo__max_steps=14, ppo__rollout_batch_size=24, ppo__kl_coef=kl_coef,
            ppo__kl_target=0.0, ppo__learning_rate=2e-4, ppo__ppo_epochs=2, ppo__max_new_tokens=2,
            ppo__save_steps=50, ppo__per_device_batch_size=24, ppo__warmup_steps=1,
            ppo__value_clip_range=0.0, ppo__num_minibatches=1, ppo__missing_eos_penalty=0.0,
            data__train_rows=48,
        )  # fmt: skip
        trainer = trainer_of(config, tmp_path / str(kl_coef))
        trainer.stage.path.mkdir(parents=True)
        toy(trainer, monkeypatch)
        trainer.train()

        def mean(key: str, rows: list[dict]) -> float:
            return sum(r[key] for r in rows) / len(rows)

        first, last = trainer.log_rows[:4], trainer.log_rows[-4:]
        rise = mean("objective/scores", last) - mean("objective/scores", first)
        ends[kl_coef] = rise, mean("objective/kl", last)
    (rise, moved), (no_rise, stayed) = ends[0.01], ends[1e4]
    assert rise > 0.4 and 1 < moved < 12, ends
    assert no_rise < 0.3 and abs(stayed) < 0.2 * moved, ends


def test_the_policy_is_saved_as_others_load_it(folders: dict[str, Path], tmp_path: Path) -> None:
    config = settings(folders["lora"], ppo__max_steps=1)
    stage, _ = train(config, tmp_path)
    names = {p.name for p in (stage.path / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= names
    assert not {"value", "reward", "default"} & names
    policy = load_policy(config.model, stage.path / "model")
    assert any("lora_B" in n and p.abs().max() > 0 for n, p in policy.named_parameters())
    record = json.loads((stage.path / "rollouts.jsonl").read_text().splitlines()[0])
    assert {"step", "id", "prompt", "response", "reward"} <= record.keys()


# --- bad input --------------------------------------------------------------------------------


def test_a_reward_that_is_no_number_stops_before_the_update(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(folders["lora"])
    old = ppo_rollout.check_finite

    def spoilt(rollout: Rollout, step: int) -> None:
        if step == 2:
            rollout.columns["scores"][3] = float("nan")
        old(rollout, step)

    monkeypatch.setattr(ppo_rollout, "check_finite", spoilt)
    with pytest.raises(NonFiniteError, match=r"step 2: scores is not finite on rows train/\d+"):
        train(config, tmp_path)
    assert [p.name for p in (tmp_path / "p/ppo/checkpoints").iterdir()] == ["step-1"]


def test_a_policy_that_says_nothing_at_all_is_stopped(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(model: object, batch: dict, seeds: list, end_ids: tuple, **_: object) -> list:
        return [[end_ids[0]]] * len(seeds)

    monkeypatch.setattr(ppo_rollout, "sample", nothing)
    with pytest.raises(InputError, match="every response is empty"):
        train(settings(folders["lora"]), tmp_path)


def test_what_is_missing_or_does_not_fit_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ppo needs a reward model"):
        train(settings(folders["lora"], ppo__reward_model=""), tmp_path)
    with pytest.raises(InputError, match="holds no reward model"):
        train(settings(folders["lora"], ppo__reward_model=str(tmp_path)), tmp_path)
    with pytest.raises(InputError, match=r"12 prompts leave no room.*train/\d+: \d+ tokens"):
        train(settings(folders["lora"], ppo__max_new_tokens=500), tmp_path)
    with pytest.raises(InputError, match="some would be empty"):
        settings(folders["lora"], ppo__num_minibatches=7)
    assert not (tmp_path / "p").exists()


def test_the_ratio_check_sees_a_policy_that_moved(folders: dict[str, Path], tmp_path: Path) -> None:
    trainer = trainer_of(settings(folders["full"]), tmp_path)
    cache = trainer.tower_cache()
    with cache.rollout():
        rollout = trainer.roll_out(0, cache)
        with torch.no_grad():
            for parameter in trainer.engine.groups["policy"]:
                parameter.mul_(1.01)
        with pytest.raises(AssertionError, match="ratios are off"):
            trainer.accumulate(rollout, [0, 1, 2], cache, first=True)


def test_every_prompt_comes_once_a_pass(folders: dict[str, Path], tmp_path: Path) -> None:
    trainer = trainer_of(settings(folders["lora"], ppo__rollout_batch_size=5), tmp_path)
    seen = [i for step in range(12) for i in trainer.prompts_of(step)]
    for start in range(0, 60, 12):
        assert sorted(seen[start : start + 12]) == list(range(12))
    assert seen[:12] != seen[12:24]


def test_the_preset_is_the_original(folders: dict[str, Path]) -> None:
    config = settings(folders["lora"], ppo__preset="original").ppo
    expected = {
        "gamma": 1.0, "gae_lambda": 1.0, "clip_range": 0.2, "value_clip_range": 0.2,
        "vf_coef": 0.1, "kl_coef": 0.1, "ppo_epochs": 1, "num_minibatches": 1,
        "whiten_advantages": False, "whiten_rewards": False, "learning_rate": 1e-6,
    }  # fmt: skip
    values = dataclasses.asdict(config)
    assert {k: values[k] for k in expected} == expected
    assert settings(folders["full"], ppo__preset="original").ppo.learning_rate == 5e-7


@pytest.mark.parametrize("adapter", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_shared_prefixes_change_no_figure(
    adapter: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Three questions to a picture, in one minibatch: the plain path says the same."""
    found = {}
    for mode in ("off", "require"):
        changes = {"model__share_prefix": mode, "data__group_by_image": True, "ppo__max_steps": 1}
        trainer = trainer_of(settings(folders[adapter], **changes), tmp_path / mode)
        trainer.rows = mini_rows().select(range(12))
        pictures = [trainer.rows[i]["image_name"] for i in trainer.prompts_of(0)]
        assert len(set(pictures)) < len(pictures) == 6
        with trainer.tower_cache().rollout() as cache:
            rollout = trainer.roll_out(0, cache)
            stats = trainer.update(rollout, cache)
        assert cache.misses == len(set(pictures))
        found[mode] = rollout, stats
    (plain, expected), (shared, stats) = found.values()
    assert shared.responses == plain.responses
    for name, column in plain.columns.items():
        torch.testing.assert_close(shared.columns[name], column, atol=1e-4, rtol=1e-4)
    assert stats == pytest.approx(expected, abs=1e-3, rel=1e-3)

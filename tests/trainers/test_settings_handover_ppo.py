"""Every setting of PPO reaches the place that uses it, and every rollout steers the KL coefficient.

The trainer is the real one, over four fake models without a forward pass.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spavl_lib.config import PPOConfig
from spavl_lib.errors import InputError
from spavl_lib.modelling.roles import ROLES
from spavl_lib.objectives.lagrangian import LagrangeMultiplier
from spavl_lib.trainers import ppo, ppo_rollout, ppo_terms
from spavl_lib.trainers.ppo import PPOTrainer
from spavl_lib.trainers.ppo_records import rollout_stats
from spavl_lib.trainers.progress import LONGEST_UNSAVED_S
from spavl_lib.trainers.rollout import Prompt, Rollout
from tests.helpers import mini_rows, smoke
from tests.trainers.test_settings_handover import Seen, assert_arrives, changed

pytestmark = pytest.mark.filterwarnings("ignore")

TERM = "enters rewards, advantages or losses; tested by hand below"
PPO: dict[str, Seen] = {
    "max_steps": lambda t: t.total_steps,
    "rollout_batch_size": lambda t: len(t.prompts_of(0)),
    "per_device_batch_size": lambda t: len(t._micro_batches(prompts(9), [[1]] * 9)[0]),
    "learning_rate": lambda t: t.optimizer.param_groups[0]["initial_lr"],
    "value_learning_rate": lambda t: t.optimizer.param_groups[1]["initial_lr"],
    "lr_scheduler": lambda t: t.schedule[0],
    "warmup_steps": lambda t: t.schedule[1],
    "weight_decay": lambda t: {g["weight_decay"] for g in t.optimizer.param_groups}.pop(),
    "kl_coef": lambda t: t.kl.kl_coef,
    "kl_target": lambda t: t.kl.target,
    "kl_horizon": lambda t: t.kl.horizon,
    "cost_limit": lambda t: t.multiplier.limit,
    "lagrange_learning_rate": lambda t: t.multiplier.learning_rate,
    "lagrange_initial": lambda t: t.multiplier.value,
}
PPO_FREE = {
    "preset": "the config replaces it by settings; tested in test_settings_handover.py",
    "num_epochs": "counts only without max_steps; tested below",
    "reward_model": "names the folder; tested in test_settings_handover.py with RLOO",
    "save_steps": "is asked between steps; tested with a run below",
    "max_grad_norm": "is passed to the engine's step; tested with an update below",
    "ppo_epochs": "counts minibatches; tested with an update below",
    "num_minibatches": "counts minibatches; tested with an update below",
    "max_new_tokens": "is passed to sampling; tested with a rollout below",
    "temperature": "is passed to sampling and every forward; tested with a rollout below",
    "sft_coef": "weighs a gradient; tested with an update below",
    "max_length": "bounds the rows before the model is loaded; tested in test_lengths.py",
    **dict.fromkeys(
        ("gamma", "gae_lambda", "clip_range", "value_clip_range", "vf_coef", "kl_estimator",
         "whiten_advantages", "whiten_rewards", "missing_eos_penalty", "length_penalty",
         "entropy_coef"), TERM,
    ),
}  # fmt: skip
PPO_CHANGES = {
    "max_steps": 7,
    "rollout_batch_size": 6,
    "per_device_batch_size": 3,
    "learning_rate": 1.3e-4,
    "value_learning_rate": 2.7e-4,
    "lr_scheduler": "polynomial",
    "warmup_steps": 4,
    "weight_decay": 0.11,
    "kl_coef": 0.31,
    "kl_target": 2.5,
    "kl_horizon": 77,
    "save_steps": 3,
    "max_grad_norm": 0.6,
    "ppo_epochs": 4,
    "num_minibatches": 3,
    "max_new_tokens": 5,
    "temperature": 1.7,
    "sft_coef": 0.4,
    "entropy_coef": 0.02,
    "vf_coef": 0.3,
}
# Settings of the cost, which need a reward model with a cost head.
COSTS = {
    "cost_limit": -0.5, "lagrange_learning_rate": 0.25, "lagrange_initial": 2.0,
    "reward_model": "reward",
}  # fmt: skip


# What an update logs whose step the loss scaler did not skip.
TAKEN = {"grad_norm/policy": 1.0, "learning_rate": 1e-4}


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"row{n}", "", [1, 2], {}, {}) for n in range(count)]


class FakeVLM(nn.Linear):
    """A model of two weights that notes whether activations are recomputed."""

    def __init__(self) -> None:
        super().__init__(1, 2, bias=False)
        self.checkpointing: list[dict] = []
        self.config = SimpleNamespace(
            model_type="fake", get_text_config=lambda: SimpleNamespace(max_position_embeddings=9)
        )

    def gradient_checkpointing_enable(self, options: dict) -> None:
        self.checkpointing.append(options)


class FakeRoles(nn.Module):
    """Four models without a forward pass; what calls them is noted."""

    forbidden_ids = [5]
    apart = False
    with_cost = False

    def __init__(self) -> None:
        super().__init__()
        self.vlms = nn.ModuleDict({role: FakeVLM() for role in ROLES})
        self.calls: list[tuple[str, dict]] = []

    def vlm_of(self, role: str) -> FakeVLM:
        return self.vlms[role]

    def trainable_of(self, role: str) -> list[nn.Parameter]:
        return list(self.vlms[role].parameters())

    def towers(self) -> list[nn.Module]:
        return []

    def as_role(self, role: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def after_backward(self) -> None:
        pass

    def forward(self, role: str, *, width: int, **options: Any) -> tuple[Tensor, ...]:
        self.calls.append((role, options))
        rows = len(options["input_ids"])
        if role == "reward":
            scores = torch.arange(float(rows))
            return (scores, 2 * scores) if self.with_cost else (scores,)
        weights = self.vlms[role].weight.sum()
        columns = torch.full((rows, width), -0.75 if role == "reference" else -0.5) + 0.0 * weights
        return (columns,) if role == "value" else (columns, columns + 1.5)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PPOTrainer]:
    """PPO's trainer over fake models, with the settings that are given."""

    def build(section: dict[str, Any] | None = None, **more: Any) -> PPOTrainer:
        config, stage = changed("ppo", section or {}, **{"data.train_rows": 12} | more)
        schedule = ppo.get_scheduler

        def noted(name: str, optimizer: Any, **counts: int) -> Any:
            noted.seen = (name, counts["num_warmup_steps"], counts["num_training_steps"])
            return schedule(name, optimizer, **counts)

        def load_roles(*_: Any, with_cost: bool, **__: Any) -> FakeRoles:
            roles = FakeRoles()
            roles.with_cost = with_cost
            return roles

        monkeypatch.setattr(ppo_rollout, "load_roles", load_roles)
        monkeypatch.setattr(ppo, "get_scheduler", noted)
        rows = mini_rows().select(range(12))
        trainer = PPOTrainer(config, stage, rows, Path("reward"), False)
        trainer.schedule = noted.seen
        return trainer

    return build


def rollout_of(count: int = 4) -> Rollout:
    """A rollout with columns, each answer two tokens long."""
    rollout = Rollout(prompts(count), [[3, 4]] * count, ["a"] * count, [True] * count)
    names = ("logps", "ref_logps", "values", "entropy", "rewards", "advantages", "returns")
    rollout.columns = {name: torch.full((count, 2), -0.5) for name in names}
    rollout.columns["ref_logps"] -= 0.75  # 1.5 nats an answer
    rollout.columns["scores"] = torch.arange(float(count))
    return rollout


def test_every_setting_of_ppo_arrives(built: Callable[..., PPOTrainer]) -> None:
    trainer = built(PPO_CHANGES | COSTS)
    assert_arrives(trainer.settings, PPO, trainer, PPO_FREE)
    assert trainer.schedule[2] == 7 * 4 * 3  # an optimizer step for each minibatch of each pass
    groups = trainer.engine.groups
    for group, role in zip(trainer.optimizer.param_groups, ("policy", "value"), strict=True):
        assert group["params"] == groups[role] == trainer.model.trainable_of(role)
    alone = built({"learning_rate": 1.3e-4})
    assert [g["initial_lr"] for g in alone.optimizer.param_groups] == [1.3e-4, 1.3e-4]
    passes = built({"max_steps": 0, "num_epochs": 2.5, "rollout_batch_size": 7})
    assert passes.total_steps == 5  # 30 prompts, 7 at a time


def test_ppo_seeds_its_models_and_its_minibatches(
    built: Callable[..., PPOTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(ppo_rollout, "set_seed", seeded.append)
    taken = []
    for seed in (3, 4):
        trainer = built({"num_minibatches": 3}, seed=seed)
        rows: list[list[int]] = []
        monkeypatch.setattr(
            trainer, "minibatch",
            lambda _, part, cache, first, rows=rows: rows.append(part) or {"learning_rate": 1},
        )  # fmt: skip
        trainer.update(rollout_of(12), None)
        taken.append(rows)
    assert seeded == [3, 4]
    assert taken[0] != taken[1] and taken[0][:3] != taken[0][3:6]  # by seed, and by epoch


def test_sharing_that_must_be_is_refused_under_zero3(built: Callable[..., PPOTrainer]) -> None:
    zero3 = {"launch.engine": "zero3"}
    with pytest.raises(InputError, match="share_prefix = require does not work for PPO"):
        built({}, **zero3, **{"model.share_prefix": "require"})


def test_a_checkpoint_holds_where_the_handover_stands(
    built: Callable[..., PPOTrainer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # where the fixture's stage is written
    first = built({"kl_target": 1.0})
    first.step, first.optimizer_steps = 3, 11
    first.kl.kl_coef, first.reference = 0.123, {"ids": ["row0"], "logps": [-0.5]}
    first.scheduler.step()
    row = {"step": 1, "time_s": 1.0, "peak_memory_gib": 0.1, "objective/kl": 0.2}
    first.log_rows = [row]
    assert first.summary()["rollouts"] == 3 * first.settings.rollout_batch_size
    first._save()
    again = built({"kl_target": 1.0})
    again.reference = first.reference
    again._resume()
    assert (again.step, again.optimizer_steps, again.kl.kl_coef) == (3, 11, 0.123)
    assert again.scheduler.state_dict() == first.scheduler.state_dict()
    monkeypatch.setattr(type(again.engine), "sharing", "by zero2 in 2 processes")
    with pytest.raises(InputError, match="but this run holds it by zero2 in 2 processes"):
        again._resume()


@pytest.mark.parametrize("asked", [True, False])
def test_ppo_recomputes_activations_of_what_trains_when_asked(
    asked: bool, built: Callable[..., PPOTrainer]
) -> None:
    model = built(None, **{"model.gradient_checkpointing": asked}).model
    calls = {role: vlm.checkpointing for role, vlm in model.vlms.items()}
    expected = [{"use_reentrant": False}] if asked else []
    assert calls == {"policy": expected, "value": expected, "reference": [], "reward": []}


def test_ppo_passes_temperature_and_length_to_sampling_and_to_every_role(
    built: Callable[..., PPOTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled: list[dict] = []

    def sample(model: nn.Module, batch: dict, seeds: list[int], **options: Any) -> list[list[int]]:
        sampled.append(options | {"seeds": seeds})
        return [[40, 41]] * len(seeds)

    monkeypatch.setattr(ppo_rollout, "sample", sample)
    trainer = built(PPO_CHANGES, **{"generation.cache": "dynamic"})
    with trainer.tower_cache().rollout() as cache:
        rollout = trainer.roll_out(0, cache)
    assert len(rollout) == 6 and len(sampled) == 2
    for options in sampled:
        assert (options["max_new_tokens"], options["temperature"]) == (5, 1.7)
        assert options["forbidden_ids"] == [5] and options["compact"] is False
        assert list(options["end_ids"]) == [trainer.processor.tokenizer.eos_token_id]
    seeds = {seed for options in sampled for seed in options["seeds"]}
    assert len(seeds) == 6
    assert {role for role, _ in trainer.model.calls} == {"policy", "reference", "value", "reward"}
    assert {options["temperature"] for _, options in trainer.model.calls} == {1.7}
    trainer.kl.kl_coef = 0.0
    sampled.clear()
    with trainer.tower_cache().rollout() as cache:
        other = trainer.roll_out(0, cache)
    assert {seed for options in sampled for seed in options["seeds"]} == seeds
    for step, seed in ((1, trainer.config.seed), (0, trainer.config.seed + 1)):
        sampled.clear()
        trainer.config = dataclasses.replace(trainer.config, seed=seed)
        with trainer.tower_cache().rollout() as cache:
            trainer.roll_out(step, cache)
        assert not seeds & {s for options in sampled for s in options["seeds"]}
    # The controller's coefficient counts, not the setting: a quarter of a nat for each token.
    penalty = other.columns["rewards"] - rollout.columns["rewards"]
    torch.testing.assert_close(penalty, torch.full((6, 2), 0.31 * 0.25))


def test_the_kl_coefficient_is_steered_once_a_rollout_by_its_mean_kl(
    built: Callable[..., PPOTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = built(PPO_CHANGES)
    calls, minibatches = [], []
    monkeypatch.setattr(trainer.kl, "update", lambda *numbers: calls.append(numbers))

    def minibatch(rollout: Rollout, rows: list[int], cache: object, first: bool) -> dict:
        minibatches.append((rows, first))
        return TAKEN | {"loss": float(len(rows))}

    monkeypatch.setattr(trainer, "minibatch", minibatch)
    stats = trainer.update(rollout_of(6), None)
    assert calls == [(pytest.approx(1.5), 6)]
    assert stats["objective/kl"] == pytest.approx(1.5) and stats["objective/kl_coef"] == 0.31
    assert stats["loss"] == 2.0  # rows of a minibatch
    # ppo_epochs passes of num_minibatches, each of them over every row.
    assert len(minibatches) == 4 * 3
    assert [first for _, first in minibatches] == [True] + [False] * 11
    for start in (0, 3, 6, 9):
        rows = [row for part, _ in minibatches[start : start + 3] for row in part]
        assert sorted(rows) == list(range(6))
    assert len({tuple(rows) for rows, _ in minibatches}) > 3, "every pass has an order of its own"


# What a line of PPO's metrics.jsonl holds, besides the step, its rows and its time.
ROLLOUT_KEYS = {
    "objective/scores", "objective/scores_std", "objective/rlhf_reward", "objective/kl",
    "objective/entropy", "objective/kl_coef", "response/length", "response/finished",
    "response/empty", "val/mean", "val/advantage", "val/explained_variance",
}  # fmt: skip
UPDATE_KEYS = {
    "loss/policy_avg", "loss/value_avg", "loss/sft_avg", "policy/clipfrac_avg",
    "policy/entropy_avg", "policy/approxkl_avg", "val/ratio", "val/ratio_error",
    "val/clipfrac_avg", "grad_norm/policy", "learning_rate",
}  # fmt: skip


def test_ppo_logs_what_the_page_and_the_figures_read(
    built: Callable[..., PPOTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = built(PPO_CHANGES)
    monkeypatch.setattr(trainer.engine, "zero_grad", lambda: None)
    monkeypatch.setattr(trainer.engine, "backward", lambda *_, **__: None)
    monkeypatch.setattr(trainer.engine, "step", lambda *_: {"policy": 2.0, "value": 3.0})
    monkeypatch.setattr(ppo, "completion_ids", lambda *_, **__: [3, 4, 7])
    with trainer.tower_cache().rollout() as cache:
        stats = trainer.update(rollout_of(4), cache)
    assert stats.keys() >= ROLLOUT_KEYS | UPDATE_KEYS | {"grad_norm/value"}
    del stats["val/explained_variance"]  # undefined where all returns are equal, as here
    assert not {k: v for k, v in stats.items() if not math.isfinite(v)}


def test_a_steered_coefficient_prices_the_next_rollout(
    built: Callable[..., PPOTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = built({"kl_target": 0.5, "kl_horizon": 10, "kl_coef": 0.25})
    monkeypatch.setattr(trainer, "minibatch", lambda *_, **__: TAKEN | {"loss": 0.0})
    trainer.update(rollout_of(4), None)  # 1.5 nats: the error is held to 0.2
    assert trainer.kl.kl_coef == pytest.approx(0.25 * (1 + 0.2 * 4 / 10))
    seen = []
    monkeypatch.setattr(ppo_rollout, "sample", lambda m, b, seeds, **_: [[40, 41]] * len(seeds))
    monkeypatch.setattr(ppo_rollout, "add_advantages", lambda *args: seen.append(args[1:]))
    with trainer.tower_cache().rollout() as cache:
        trainer.roll_out(0, cache)
    assert seen == [(trainer.settings, trainer.kl.kl_coef, None)]


def test_the_multiplier_follows_the_mean_cost_and_is_kept_in_checkpoints(
    built: Callable[..., PPOTrainer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(changed.__globals__, "UNUSED", tmp_path)  # the root of the stage
    trainer = built(COSTS | {"rollout_batch_size": 4, "per_device_batch_size": 4})
    monkeypatch.setattr(ppo_rollout, "sample", lambda m, b, seeds, **_: [[40, 41]] * len(seeds))
    monkeypatch.setattr(trainer, "minibatch", lambda *_, **__: TAKEN | {"loss": 0.0})
    with trainer.tower_cache().rollout() as cache:
        rollout = trainer.roll_out(0, cache)
    scores = rollout.columns["scores"]
    torch.testing.assert_close(rollout.columns["costs"], 2 * scores)
    stats = trainer.update(rollout, None)
    assert stats["objective/costs"] == 3.0 and stats["objective/cost_limit"] == -0.5
    assert stats["objective/lagrange_multiplier"] == pytest.approx(2.0)  # that of the scores
    assert trainer.multiplier.value == pytest.approx(2 * math.exp(0.25 * 3.5))
    trainer.reference = {"ids": ["row0"], "logps": [-0.5]}
    trainer._save()
    again = built(COSTS)
    again.reference = trainer.reference
    again._resume()
    assert again.multiplier.value == trainer.multiplier.value


def test_ppo_clips_and_weighs_gradients_by_its_settings(
    built: Callable[..., PPOTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = built(PPO_CHANGES)
    order: list[str] = []
    backward: list[tuple[float, bool]] = []
    monkeypatch.setattr(trainer.engine, "zero_grad", lambda: order.append("zero"))
    monkeypatch.setattr(
        trainer.engine, "step",
        lambda norm, number, ids: order.append(("step", norm, number, ids)) or {"policy": 2.0},
    )  # fmt: skip
    monkeypatch.setattr(
        trainer.engine, "backward", lambda loss, last: backward.append((loss.item(), last))
    )
    monkeypatch.setattr(ppo, "completion_ids", lambda *_, **__: [3, 4, 7])
    with trainer.tower_cache().rollout() as cache:
        stats = trainer.minibatch(rollout_of(4), [0, 1, 2, 3], cache, first=True)
    assert len(order) == 2  # one optimizer step a minibatch
    assert order[0] == "zero" and order[1][:3] == ("step", 0.6, 1)
    assert sorted(order[1][3]) == ["row0", "row1", "row2", "row3"]
    assert stats["grad_norm/policy"] == 2.0 and stats["learning_rate"] == 0.0  # first of a warm-up
    assert trainer.scheduler.get_last_lr()[0] == pytest.approx(1.3e-4 / 4)
    # Micro-batches of three rows and one: policy, chosen answers, value; the last one says so.
    assert [last for _, last in backward] == [False] * 5 + [True]
    values = [value for value, _ in backward]
    # The advantage is -0.5 and the ratio 1; the entropy of FakeRoles is 1, at 0.02.
    assert values[:2] == pytest.approx([0.75 * (0.5 - 0.02), 0.25 * (0.5 - 0.02)])
    assert values[2:4] == pytest.approx([0.4 * 0.5 * 0.75, 0.4 * 0.5 * 0.25])
    assert values[4:] == pytest.approx([0.0, 0.0])  # values and returns are equal
    assert stats["loss/sft_avg"] == pytest.approx(0.5)
    assert stats["loss/policy_avg"] == pytest.approx(0.5)
    assert stats["policy/entropy_avg"] == pytest.approx(1.0)
    roles = [role for role, _ in trainer.model.calls]
    assert roles == ["policy"] * 4 + ["value"] * 2
    assert {options["temperature"] for _, options in trainer.model.calls} == {1.7}
    gradients = [options.get("entropy_gradient", False) for _, options in trainer.model.calls]
    assert gradients == [True, True, False, False, True, True]


@pytest.mark.parametrize(("name", "value"), [("sft_coef", 0.0), ("entropy_coef", 0.0)])
def test_what_is_off_costs_no_pass_and_no_gradient(
    name: str, value: float, built: Callable[..., PPOTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ppo, "completion_ids", lambda *_, **__: [3, 4, 7])
    trainer = built({k: v for k, v in PPO_CHANGES.items() if k != name}, **{f"ppo.{name}": value})
    with trainer.tower_cache().rollout() as cache:
        stats = trainer.accumulate(rollout_of(4), [0, 1, 2, 3], cache)
    asked = [options.get("entropy_gradient", False) for _, options in trainer.model.calls]
    if name == "sft_coef":
        assert len(asked) == 4 and "loss/sft_avg" not in stats
    else:
        assert len(asked) == 6 and not any(asked)


@pytest.mark.parametrize("waited", [0.0, LONGEST_UNSAVED_S + 1])
def test_ppo_saves_when_it_is_due(
    waited: float, built: Callable[..., PPOTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = built({"max_steps": 7, "save_steps": 3})
    saved: list[int] = []
    quiet = {
        "roll_out": lambda *_: rollout_of(), "_resume": lambda: None,
        "_log": lambda *_: trainer.log_rows.append({"step": trainer.step, "time_s": 0.0}),
        "update": lambda *_: TAKEN | {"objective/scores": 0.0, "objective/kl": 0.0},
        "_save": lambda: saved.append(trainer.step),
    }  # fmt: skip
    for name, value in quiet.items():
        monkeypatch.setattr(trainer, name, value)
    monkeypatch.setattr(ppo, "reference_probe", lambda *_, **__: {})
    monkeypatch.setattr(ppo.Movement, "check", lambda *_: None)
    trainer.saved -= waited
    trainer.train()
    assert saved == ([3, 6, 7] if not waited else [1, 2, 3, 4, 5, 6, 7])


# --- PPO's terms ----------------------------------------------------------------------------------


def terms(**settings: Any) -> PPOConfig:
    """Settings under which nothing is added, weighted or scaled, but what is given."""
    none = {
        "gamma": 1.0, "gae_lambda": 1.0, "whiten_advantages": False, "whiten_rewards": False,
        "missing_eos_penalty": 0.0, "length_penalty": 0.0, "kl_estimator": "k1",
        "entropy_coef": 0.0, "vf_coef": 1.0, "clip_range": 0.2, "value_clip_range": 0.0,
    }  # fmt: skip
    return dataclasses.replace(smoke().ppo, **none | settings)


def small_rollout() -> Rollout:
    """Two answers, of two tokens and of one; the second did not end."""
    rollout = Rollout(prompts(2), [[3, 4], [5]], ["a", "b"], [True, False])
    rollout.columns = {
        "logps": torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]),
        "ref_logps": torch.tensor([[-1.5, -1.0], [-3.5, 0.0]]),
        "values": torch.tensor([[0.5, 1.0], [0.25, 0.0]]),
        "scores": torch.tensor([2.0, 4.0]),
    }
    return rollout


def test_with_a_multiplier_the_score_weighs_reward_and_cost() -> None:
    rollout = small_rollout()
    rollout.columns["costs"] = torch.tensor([1.0, -2.0])
    multiplier = LagrangeMultiplier(3.0, limit=0.0, learning_rate=0.1)
    ppo_terms.add_advantages(rollout, terms(missing_eos_penalty=1.5), 0.0, multiplier)
    expected = [[0.0, (2 - 3 * 1) / 4], [(4 + 3 * 2) / 4 - 1.5, 0.0]]
    torch.testing.assert_close(rollout.columns["rewards"], torch.tensor(expected))
    assert rollout.columns["scores"].tolist() == [2.0, 4.0]  # the log shows the reward itself


def columns_under(kl_coef: float = 0.0, **settings: Any) -> dict[str, list]:
    rollout = small_rollout()
    ppo_terms.add_advantages(rollout, terms(**settings), kl_coef)
    return {k: rollout.columns[k].tolist() for k in ("rewards", "advantages", "returns")}


def test_scores_less_penalties_are_paid_at_the_last_token() -> None:
    assert columns_under()["rewards"] == [[0.0, 2.0], [4.0, 0.0]]
    assert columns_under(missing_eos_penalty=1.5)["rewards"] == [[0.0, 2.0], [2.5, 0.0]]
    assert columns_under(length_penalty=0.25)["rewards"] == [[0.0, 1.5], [3.75, 0.0]]


def test_the_kl_is_priced_by_the_estimator_of_the_settings() -> None:
    k1 = columns_under(kl_coef=0.5)["rewards"]
    assert k1 == [[-0.25, 2.5], [3.75, 0.0]]
    k3 = columns_under(kl_coef=0.5, kl_estimator="k3")["rewards"]
    near, far = math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0
    assert k3[0] == pytest.approx([-0.5 * near, 2.0 - 0.5 * far])
    assert k3[1] == pytest.approx([4.0 - 0.5 * near, 0.0])


def test_discount_and_lambda_arrive() -> None:
    assert columns_under()["advantages"] == [[1.5, 1.0], [3.75, 0.0]]
    assert columns_under(gamma=0.5)["advantages"] == [[0.5, 1.0], [3.75, 0.0]]
    # One step ahead: 0 + 1 - 0.5, and half of the error behind it.
    assert columns_under(gae_lambda=0.0)["advantages"] == [[0.5, 1.0], [3.75, 0.0]]
    assert columns_under(gae_lambda=0.5)["advantages"] == [[1.0, 1.0], [3.75, 0.0]]
    assert columns_under(gamma=0.5)["returns"] == [[1.0, 2.0], [4.0, 0.0]]


def test_whitening_is_of_what_was_asked_for() -> None:
    plain = [0.0, 2.0, 4.0]
    spread = (sum((x - 2.0) ** 2 for x in plain) / 3) ** 0.5
    white = columns_under(whiten_rewards=True)["rewards"]
    scaled = [(x - 2.0) / spread + 2.0 for x in plain]  # the mean stays
    assert [*white[0], white[1][0]] == pytest.approx(scaled) and white[1][1] == 0
    values = columns_under()["advantages"]
    numbers = [*values[0], values[1][0]]
    mean = sum(numbers) / 3
    spread = (sum((x - mean) ** 2 for x in numbers) / 3) ** 0.5
    rollout = small_rollout()
    ppo_terms.add_advantages(rollout, terms(whiten_advantages=True), 0.0)
    rollout.columns["entropy"] = torch.zeros(2, 2)
    logged = rollout_stats(rollout, 0.0)
    assert logged["val/advantage"] == pytest.approx(mean)  # before whitening, after which it is 0
    assert logged["val/mean"] == pytest.approx((0.5 + 1.0 + 0.25) / 3)
    shifted = columns_under(whiten_advantages=True)
    found = [*shifted["advantages"][0], shifted["advantages"][1][0]]
    assert found == pytest.approx([(x - mean) / spread for x in numbers])
    assert shifted["rewards"] == columns_under()["rewards"]
    assert shifted["returns"] == columns_under()["returns"]  # the value model's target stays


def policy_loss(**settings: Any) -> tuple[float, dict]:
    rollout = small_rollout()
    rollout.columns["advantages"] = torch.tensor([[1.0, -1.0], [2.0, 0.0]])
    ratios = torch.tensor([[1.5, 1.5], [1.0, 1.0]])
    logps = rollout.columns["logps"] + ratios.log()
    entropy = torch.tensor([[1.0, 2.0], [6.0, 99.0]])
    loss, values = ppo_terms.policy_loss(rollout, [0, 1], (logps, entropy), terms(**settings))
    return loss.item(), values


def test_the_policy_loss_is_clipped_and_less_the_entropy() -> None:
    loss, values = policy_loss()
    assert loss == pytest.approx(-(1.2 - 1.5 + 2.0) / 3)  # the gain is clipped, the harm is not
    assert policy_loss(clip_range=0.4)[0] == pytest.approx(-(1.4 - 1.5 + 2.0) / 3)
    with_bonus, _ = policy_loss(entropy_coef=0.1)
    assert with_bonus == pytest.approx(loss - 0.1 * 3.0)  # a bonus lowers the loss
    assert values["loss/policy_avg"] == pytest.approx(loss)
    assert policy_loss(entropy_coef=0.1)[1]["loss/policy_avg"] == pytest.approx(loss)
    assert values["policy/clipfrac_avg"] == pytest.approx(1 / 3)
    assert values["policy/entropy_avg"] == pytest.approx(3.0)
    assert values["val/ratio"] == pytest.approx(4 / 3)
    assert values["val/ratio_error"] == pytest.approx(0.5)
    k3 = 1.5 - 1 - math.log(1.5)
    assert values["policy/approxkl_avg"] == pytest.approx(2 * k3 / 3, rel=1e-5)


def test_a_micro_batch_takes_its_own_rows_and_its_own_width() -> None:
    rollout = small_rollout()
    rollout.columns["advantages"] = torch.tensor([[9.0, 9.0], [2.0, 0.0]])
    outputs = (rollout.columns["logps"][1:, :1], torch.ones(1, 1))
    loss, values = ppo_terms.policy_loss(rollout, [1], outputs, terms())
    assert loss.item() == -2.0 and values["val/ratio_error"] == 0


def value_loss(**settings: Any) -> tuple[float, dict]:
    rollout = small_rollout()
    rollout.columns["returns"] = torch.tensor([[2.5, 2.0], [0.25, 7.0]])
    values = torch.tensor([[1.5, 1.0], [0.25, 3.0]])
    loss, logged = ppo_terms.value_loss(rollout, [0, 1], (values,), terms(**settings))
    return loss.item(), logged


def test_the_value_loss_is_weighted_and_clipped_by_the_settings() -> None:
    plain, logged = value_loss()
    assert plain == pytest.approx(0.5 * (1.0 + 1.0 + 0.0) / 3)
    assert logged == {"loss/value_avg": pytest.approx(plain), "val/clipfrac_avg": 0.0}
    weighted, logged = value_loss(vf_coef=0.1)
    assert weighted == pytest.approx(0.1 * plain)
    assert logged["loss/value_avg"] == pytest.approx(plain)
    clipped, logged = value_loss(value_clip_range=0.25)
    assert clipped == pytest.approx(0.5 * (1.75**2 + 1.0 + 0.0) / 3)  # 0.5 moves to 0.75 at most
    assert logged["val/clipfrac_avg"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float32, 1e-4), (torch.bfloat16, 0.25), (torch.float16, 1 / 32)]
)
@pytest.mark.parametrize("probability", [0.01, 0.5, 0.97])
def test_the_first_ratio_may_be_off_by_rounding_alone(
    dtype: torch.dtype, allowed: float, probability: float
) -> None:
    """In 16 bit by the error of a logit, which moves a token the less, the surer it is."""
    rollout = small_rollout()
    old = torch.full_like(rollout.columns["logps"], math.log(probability))
    rollout.columns["logps"] = old
    rows, share = list(range(len(rollout))), 1.0 if dtype == torch.float32 else 1 - probability
    sign = torch.tensor([1.0, -1.0]).repeat(old.numel())[: old.numel()].reshape(old.shape)
    ppo_terms.check_first_ratio(rollout, rows, old + 0.9 * allowed * share * sign, 3, dtype)
    with pytest.raises(AssertionError, match="step 3: before any update"):
        ppo_terms.check_first_ratio(rollout, rows, old + 1.1 * allowed * share * sign, 3, dtype)

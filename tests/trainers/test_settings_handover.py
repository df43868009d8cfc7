"""Every setting of a trainer's section reaches the place that uses it.

The formulas have tests of their own; these are about the way from the config to them. Each trainer
is built once with every field changed. A field either has a line in a table that says where it
arrives, or stands in `FREE` with its reason; a field that is in neither fails.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import Trainer

from spavl_lib.config import (
    Config,
    DPOConfig,
    PPOConfig,
    RewardConfig,
    RLOOConfig,
    load_config,
)
from spavl_lib.generation import stage as generation_stage
from spavl_lib.modelling import roles
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.trainers import dpo, group, ppo, reward
from spavl_lib.trainers.grpo import GRPO
from spavl_lib.trainers.inputs import limit_of
from spavl_lib.trainers.reward import VLMRewardTrainer
from spavl_lib.trainers.rloo import RLOO
from tests.helpers import UNUSED, embedded_processor, mini_rows, smoke

pytestmark = pytest.mark.filterwarnings("ignore")
Seen = Callable[[Any], Any]

# Of all trainers built on transformers' `Trainer`: where a field arrives.
COMMON: dict[str, Seen] = {
    "max_steps": lambda t: t.args.max_steps,
    "num_epochs": lambda t: t.args.num_train_epochs,
    "per_device_batch_size": lambda t: t.args.per_device_train_batch_size,
    "gradient_accumulation_steps": lambda t: t.args.gradient_accumulation_steps,
    "learning_rate": lambda t: t.args.learning_rate,
    "lr_scheduler": lambda t: str(t.args.lr_scheduler_type.value),
    "warmup_steps": lambda t: t.args.warmup_steps,
    "weight_decay": lambda t: t.args.weight_decay,
    "max_grad_norm": lambda t: t.args.max_grad_norm,
    "save_steps": lambda t: t.args.save_steps,
}
COMMON_CHANGES = {
    "max_steps": 7, "num_epochs": 2.5, "per_device_batch_size": 4, "learning_rate": 1.3e-4,
    "gradient_accumulation_steps": 3, "lr_scheduler": "polynomial", "warmup_steps": 4,
    "weight_decay": 0.11, "max_grad_norm": 0.6, "save_steps": 9,
}  # fmt: skip


def changed(section: str, changes: dict[str, Any], **more: Any) -> tuple[Config, Stage]:
    """A config whose section differs from the smoke profile in every given field."""
    plain = smoke(run_name="r")
    overrides = {f"{section}.{k}": v for k, v in changes.items()} | more
    config = smoke(overrides, run_name="r")
    for name in changes:
        before, after = (getattr(getattr(c, section), name) for c in (plain, config))
        assert before != after, f"{section}.{name} is not changed, so nothing would be shown"
    return config, Run(config, root=UNUSED).stage(section)


def assert_arrives(section: Any, table: dict[str, Seen], where: Any, free: dict[str, str]) -> None:
    """Every field is seen where the table says, or is free for a reason."""
    names = {field.name for field in dataclasses.fields(section)}
    assert names == table.keys() | free.keys(), names ^ (table.keys() | free.keys())
    assert all(len(reason.split()) > 3 for reason in free.values())
    for name, seen in table.items():
        value = getattr(section, name)
        assert seen(where) == value, f"{name} = {value!r} did not arrive, but {seen(where)!r}"


# --- DPO ------------------------------------------------------------------------------------------

DPO: dict[str, Seen] = COMMON | {
    "beta": lambda t: t.beta,
    "loss_type": lambda t: tuple(name for name, _ in t.losses),
    "loss_weights": lambda t: tuple(weight for _, weight in t.losses),
    "label_smoothing": lambda t: t.label_smoothing,
    "simpo_margin": lambda t: t.simpo_margin,
    "max_length": lambda t: t.data_collator.max_length,
    "eval_steps": lambda t: t.args.eval_steps if t.args.eval_strategy == "steps" else None,
}
PRESET_IS_FREE = {"preset": "config.loading replaces it by settings; tested below"}
DPO_FREE = PRESET_IS_FREE | {
    "cache_reference": "calls `use_cached_reference`; tested in test_reference_cache.py",
    "assistant_turns": "does not go with simpo; tested in test_assistant_turns.py",
}
DPO_CHANGES = COMMON_CHANGES | {
    "beta": 0.37, "loss_type": ("robust", "sft", "simpo"), "loss_weights": (0.7, 0.2, 0.4),
    "simpo_margin": 0.9, "max_length": 333,
    "eval_steps": 8, "label_smoothing": 0.2,
}  # fmt: skip
ELSEWHERE = {
    "seed": 11, "data.num_workers": 2, "data.group_by_image": True,
    "model.gradient_checkpointing": True, "model.adapter": "lora",
}  # fmt: skip


def assert_other_sections_arrive(trainer: Any, config: Config) -> None:
    args = trainer.args
    assert (args.seed, args.data_seed) == (11, 11)
    assert trainer.group_by_image is True and trainer.launch_config is config.launch
    assert args.dataloader_num_workers == 2
    # Logging is ours, and our own numbers are rounded, not filtered.
    assert (args.logging_steps, args.logging_nan_inf_filter, args.remove_unused_columns) == (
        1, False, False,
    )  # fmt: skip
    assert args.output_dir == str(trainer.checkpoints)


def test_every_setting_of_dpo_arrives() -> None:
    config, stage = changed("dpo", DPO_CHANGES, **ELSEWHERE)
    rows = mini_rows().select(range(4))
    held_out = mini_rows().select(range(4, 6))
    trainer = dpo.build_trainer(config, stage, embedded_processor(), rows, held_out)
    assert_arrives(config.dpo, DPO, trainer, DPO_FREE)
    assert_other_sections_arrive(trainer, config)
    assert trainer.args.per_device_eval_batch_size == 4
    assert trainer.args.gradient_checkpointing  # transformers turns it on when training starts
    assert trainer.args.max_length is None  # the collator refuses; trl would cut image tokens
    assert len(trainer.train_dataset) == 4 and len(trainer.eval_dataset) == 2


def test_dpo_without_eval_steps_evaluates_at_the_end_only() -> None:
    config, stage = changed("dpo", {"max_steps": 0})
    rows = mini_rows().select(range(2))
    trainer = dpo.build_trainer(config, stage, embedded_processor(), rows, rows)
    assert trainer.args.eval_strategy == "no" and trainer.args.max_steps == -1
    assert not trainer.args.gradient_checkpointing  # trl's own default is to recompute
    context = trainer.model.config.get_text_config().max_position_embeddings
    assert trainer.data_collator.max_length == context


@pytest.mark.parametrize("mode", ["require", "off"])
def test_whoever_loads_a_model_shares_prefixes_as_asked(
    mode: str, reward_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[str]] = {}
    for module in (dpo, reward, roles, generation_stage):
        seen = asked.setdefault(module.__name__.rpartition(".")[2], [])
        monkeypatch.setattr(module, "apply_sharing", lambda _, mode, seen=seen: seen.append(mode))
    changes = {"model.share_prefix": mode, "model.adapter": "lora"}
    config = smoke(changes, run_name="r")
    rows = mini_rows().select(range(2))
    folder = Run(config, root=UNUSED).stage("dpo")
    dpo.build_trainer(config, folder, embedded_processor(), rows, rows)
    reward.build_model(config)
    roles.load_roles(config.model, reward_folders["lora"], ())
    generation_stage.load_answerer(config, None)
    answers = "off" if mode == "off" else "auto"  # generation has no batches that must share
    assert asked == {"dpo": [mode], "reward": [mode], "roles": [mode], "stage": [answers]}


# --- the reward model -----------------------------------------------------------------------------

LOSS = "enters the loss; tested by hand below"
REWARD: dict[str, Seen] = COMMON | {
    "max_length": lambda t: t.data_collator.max_length,
    **{name: lambda t, name=name: getattr(t.settings, name)
       for name in ("center_coef", "sft_coef", "cost_coef", "shift_px", "mirror",
                    "original_form")},
}  # fmt: skip
REWARD_CHANGES = COMMON_CHANGES | {
    "max_length": 333, "center_coef": 0.3, "sft_coef": 0.2, "cost_coef": 0.4, "shift_px": 2,
    "mirror": True, "original_form": True,
}  # fmt: skip


def test_every_setting_of_the_reward_model_arrives() -> None:
    config, stage = changed("reward", REWARD_CHANGES, **ELSEWHERE)
    rows = mini_rows().select(range(4))
    trainer = reward.build_trainer(config, stage, embedded_processor(), rows)
    assert_arrives(config.reward, REWARD, trainer, PRESET_IS_FREE)
    assert_other_sections_arrive(trainer, config)
    assert trainer.model.vlm.is_gradient_checkpointing
    plain = dataclasses.replace(config.model, gradient_checkpointing=False)
    assert not reward.build_model(
        dataclasses.replace(config, model=plain)
    ).vlm.is_gradient_checkpointing


def reward_trainer(**settings: Any) -> VLMRewardTrainer:
    """The trainer without its model: enough to compute a loss."""
    trainer = object.__new__(VLMRewardTrainer)
    trainer.settings = dataclasses.replace(smoke().reward, **settings)
    trainer.sums, trainer.row_ids = {}, ["a", "b"]
    trainer.args, trainer.state = SimpleNamespace(seed=3), SimpleNamespace(global_step=5)
    return trainer


class Scores(nn.Module):
    """A reward model that gives known scores and log-probabilities, and notes its inputs."""

    scores = torch.tensor([2.0, 0.5, -1.0, 1.5])  # two chosen, two rejected
    logps = torch.tensor([-3.0, -5.0, -70.0, -80.0])
    costs = torch.tensor([-2.0, 1.0, 3.0, -0.5])

    def forward(self, *, costs: bool = False, **batch: Tensor) -> Any:
        self.batch = batch
        others = [self.costs] * costs + [self.logps] * ("completion_mask" in batch)
        return (self.scores, *others) if others else self.scores


BATCH = {
    "input_ids": torch.zeros(4, 3, dtype=torch.long),
    "completion_mask": torch.tensor([[0, 1, 1]] * 4),
    "pixel_values": torch.arange(4.0 * 3 * 6 * 6).reshape(4, 3, 6, 6),
    "row_ids": ["a", "b"],
}
MARGINS = (3.0, -1.0)


def plain_loss() -> float:
    return sum(math.log1p(math.exp(-m)) for m in MARGINS) / 2


def test_the_loss_takes_its_form_and_its_centring_from_the_settings() -> None:
    def loss_of(**settings: Any) -> float:
        none = {"center_coef": 0.0, "sft_coef": 0.0, "original_form": False}
        trainer = reward_trainer(**none | settings)
        return trainer.compute_loss(Scores().eval(), dict(BATCH)).item()

    assert loss_of() == pytest.approx(plain_loss(), rel=1e-5)
    original = -sum(math.log(1 / (1 + math.exp(-m)) + 1e-5) for m in MARGINS) / 2
    assert loss_of(original_form=True) == pytest.approx(original, rel=1e-6)
    assert abs(original - plain_loss()) > 1e-6
    centre = 0.3 * ((2.0 - 1.0) ** 2 + (0.5 + 1.5) ** 2) / 2
    assert loss_of(center_coef=0.3) == pytest.approx(plain_loss() + centre, rel=1e-5)
    chosen_only = -0.2 * (-3.0 - 5.0) / 2
    assert loss_of(sft_coef=0.2) == pytest.approx(plain_loss() + chosen_only, rel=1e-5)


def test_the_cost_head_is_trained_beside_the_rest() -> None:
    def softplus(value: float) -> float:
        return math.log1p(math.exp(value))

    # Row a is harmful: costs -2 and 3. Row b is harmless: costs 1 and -0.5.
    cost = (softplus(-5.0) + softplus(-2.0) + softplus(-3.0) + softplus(1.0) + softplus(-0.5)) / 2
    for sft_coef in (0.0, 0.2):
        none = {"center_coef": 0.0, "sft_coef": sft_coef, "original_form": False}
        trainer = reward_trainer(cost_coef=0.4, **none)
        trainer.harmful = {"a": True, "b": False}
        expected = plain_loss() - sft_coef * (-3.0 - 5.0) / 2 + 0.4 * cost
        loss = trainer.compute_loss(Scores().train(), dict(BATCH))
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        logged = {k: v for k, v in trainer.sums.items() if k.startswith("costs/")}
        assert logged == {
            "costs/accuracies": [0.75], "costs/chosen": [-0.5], "costs/rejected": [1.25],
        }  # fmt: skip


def test_the_cross_entropy_is_of_chosen_answers_alone() -> None:
    model = Scores().eval()
    reward_trainer(sft_coef=0.2).compute_loss(model, dict(BATCH))
    assert model.batch["completion_mask"].tolist() == [[0, 1, 1]] * 2 + [[0, 0, 0]] * 2
    reward_trainer(sft_coef=0.0).compute_loss(model, dict(BATCH))
    assert "completion_mask" not in model.batch and "row_ids" not in model.batch


def test_pictures_are_moved_by_their_own_rows_among_rows_without() -> None:
    model, settings = Scores().train(), {"shift_px": 2, "mirror": True}
    model.vlm = SimpleNamespace(config=SimpleNamespace(image_token_id=9))
    both, mixed, text = (reward_trainer(**settings) for _ in range(3))
    both.compute_loss(model, dict(BATCH))
    expected = model.batch["pixel_values"][1::2]  # row b's, for chosen and rejected
    ids = torch.tensor([[0, 1, 2], [9, 9, 1]] * 2)
    mixed.model = model
    mixed.compute_loss(
        model, BATCH | {"input_ids": ids, "pixel_values": BATCH["pixel_values"][[1, 1]]}
    )
    assert torch.equal(model.batch["pixel_values"][:1], expected[:1])
    assert torch.equal(model.batch["pixel_values"][1], model.batch["pixel_values"][0])
    text.compute_loss(model, {k: v for k, v in BATCH.items() if k != "pixel_values"})
    assert "pixel_values" not in model.batch


@pytest.mark.parametrize(
    ("settings", "moves"),
    [({}, False), ({"shift_px": 2}, True), ({"mirror": True}, True)],
)
def test_training_images_move_as_the_settings_say(settings: dict, moves: bool) -> None:
    trainer = reward_trainer(**{"shift_px": 0, "mirror": False} | settings)
    seen = []
    for step in range(6):
        trainer.state.global_step = step
        model = Scores().train()
        trainer.compute_loss(model, dict(BATCH))
        pixels = model.batch["pixel_values"]
        if moves:  # chosen and rejected of a pair keep one image between them
            assert torch.equal(pixels[:2], pixels[2:])
        seen.append(not torch.equal(pixels[:2], BATCH["pixel_values"][:2]))
    assert any(seen) == moves
    model.eval()
    trainer.compute_loss(model, dict(BATCH))
    assert torch.equal(model.batch["pixel_values"], BATCH["pixel_values"])


def test_logged_rewards_are_means_over_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[dict] = []
    monkeypatch.setattr(Trainer, "log", lambda self, logs, *_: lines.append(dict(logs)))
    trainer = reward_trainer(center_coef=0.0, sft_coef=0.0, original_form=False)
    model = Scores().train()
    trainer.compute_loss(model, dict(BATCH))
    model.scores = torch.tensor([4.0, 4.0, 1.0, 2.0])
    trainer.compute_loss(model, dict(BATCH))
    trainer.log({"eval_loss": 1.0})
    trainer.log({"loss": 0.5})
    trainer.compute_loss(model, dict(BATCH))
    trainer.log({"loss": 0.25})
    assert lines[0] == {"eval_loss": 1.0}
    assert lines[1] == pytest.approx(
        {"loss": 0.5, "rewards/accuracies": 0.75, "rewards/margins": 1.75, "rewards/chosen": 2.625,
         "rewards/rejected": 0.875}
    )  # fmt: skip
    assert lines[2] == pytest.approx(
        {"loss": 0.25, "rewards/accuracies": 1.0, "rewards/margins": 2.5, "rewards/chosen": 4.0,
         "rewards/rejected": 1.5}
    )  # fmt: skip


# --- RLOO and GRPO --------------------------------------------------------------------------------

GROUP: dict[str, Seen] = COMMON | {
    "max_new_tokens": lambda t: t.max_completion_length,
    "num_generations": lambda t: t.num_generations,
    "beta": lambda t: t.beta,
    "temperature": lambda t: t.temperature,
    "missing_eos_penalty": lambda t: t.reward_funcs[0].missing_eos_penalty,
    "rewards": lambda t: tuple(function.__name__ for function in t.reward_funcs),
    "reward_weights": lambda t: tuple(round(w, 6) for w in t.reward_weights.tolist()),
    "reward_model": lambda t: str(t.reward_funcs[0].score[1]),
}
METHODS: dict[str, tuple[group.GroupMethod, dict[str, Seen], dict[str, Any]]] = {
    "rloo": (
        RLOO,
        {"normalize_advantages": lambda t: t.normalize_advantages},
        {"normalize_advantages": False},
    ),
    "grpo": (
        GRPO,
        {"loss_type": lambda t: t.loss_type, "scale_rewards": lambda t: t.scale_rewards},
        {"loss_type": "dr_grpo", "scale_rewards": "batch"},
    ),
}
VLLM = ("use_vllm", "vllm_mode", "vllm_server_base_url", "vllm_gpu_memory_utilization")
GROUP_FREE = dict.fromkeys(VLLM, "arrives in trl's arguments; tested on them, without vLLM")
GROUP_CHANGES = COMMON_CHANGES | {
    "max_new_tokens": 13, "num_generations": 3, "beta": 0.31, "temperature": 1.7,
    "missing_eos_penalty": 2.5, "rewards": ("model", "length"), "reward_weights": (0.7, 0.3),
    "reward_model": "the/folder",
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_a_group_method_arrives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, own, changes = METHODS[name]
    monkeypatch.setattr(group, "build_scorer", lambda model, config, folder: ("scorer", folder))
    config, stage = changed(name, GROUP_CHANGES | changes, **ELSEWHERE)
    rows, processor = mini_rows().select(range(4)), embedded_processor()
    trainer = group.build_trainer(method, config, stage, processor, rows)
    assert_arrives(config.section(name), GROUP | own, trainer, GROUP_FREE)
    assert (trainer.args.seed, trainer.args.data_seed) == (11, 11)
    assert trainer.args.gradient_checkpointing and trainer.args.disable_dropout
    assert trainer.args.dataloader_num_workers == 0
    model, length = trainer.reward_funcs
    assert model.batch_size == 4 and length.longest == 13
    assert limit_of(config, name).max_new_tokens == 13
    forbidden = trainer.args.generation_kwargs["suppress_tokens"]
    assert processor.tokenizer.convert_tokens_to_ids("<image>") in forbidden


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "changes",
    [
        {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.6},
        {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://here:8000"},
    ],
)
def test_the_settings_of_vllm_arrive(name: str, changes: dict) -> None:
    config = smoke({f"{name}.{k}": v for k, v in changes.items()}, run_name="r")
    stage = Run(config, root=UNUSED).stage(name)
    arguments = group._arguments(config, stage, embedded_processor())
    assert arguments.items() >= changes.items()
    assert set(arguments["generation_kwargs"]["logit_bias"].values()) == {-100.0}


def test_what_trl_loads_itself_has_the_models_revision() -> None:
    for adapter, revision, expected in (
        ("full", "abc", {"revision": "abc"}), ("full", "", None), ("lora", "abc", None),
    ):  # fmt: skip
        config = smoke({"model.adapter": adapter, "model.revision": revision}, run_name="r")
        stage = Run(config, root=UNUSED).stage("rloo")
        arguments = group._arguments(config, stage, embedded_processor())
        assert arguments["model_init_kwargs"] == expected


def test_the_reward_head_begins_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = (
        reward.build_model(smoke({"model.adapter": "full"}, seed=seed)).score.weight
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


class Stop(Exception):
    """Ends a trainer once its arguments are known."""


def test_a_named_reward_model_is_trained_against(monkeypatch: pytest.MonkeyPatch) -> None:
    config, stage = changed("ppo", {"reward_model": "named/model"})
    seen = {}

    def built(*args: Any) -> None:
        seen["folders"] = [a for a in args if isinstance(a, Path)]
        raise Stop

    monkeypatch.setattr(ppo, "PPOTrainer", built)
    monkeypatch.setattr(ppo, "load_rows", lambda *_: [mini_rows()])
    with pytest.raises(Stop):
        ppo.train_ppo.__wrapped__(config, stage, False)
    assert seen["folders"] == [Path("named/model")]


# --- presets and defaults -------------------------------------------------------------------------

SCALE = {
    "reward": ("max_steps", "per_device_batch_size", "gradient_accumulation_steps", "num_epochs",
               "max_length", "save_steps"),
    "dpo": ("max_steps", "per_device_batch_size", "gradient_accumulation_steps", "num_epochs",
            "max_length", "cache_reference", "assistant_turns", "simpo_margin", "save_steps",
            "eval_steps"),
    "ppo": ("max_steps", "rollout_batch_size", "per_device_batch_size", "max_new_tokens",
            "max_length", "num_epochs", "kl_horizon", "lagrange_learning_rate", "lagrange_initial",
            "reward_model", "save_steps"),
}  # fmt: skip
# The original code's settings: the scripts' flags, and its fixed constants.
ORIGINAL = {
    "reward": {  # its loss has an epsilon of 1e-5 and no centring; its images do not move
        "original_form": True, "center_coef": 0.0, "sft_coef": 0.0, "cost_coef": 0.0,
        "shift_px": 0, "mirror": False,
        "lr_scheduler": "constant_with_warmup", "warmup_steps": 0.03, "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    },
    "dpo": {
        "beta": 0.1, "loss_type": ("sigmoid",), "loss_weights": (1.0,), "label_smoothing": 0.0,
        "lr_scheduler": "cosine", "warmup_steps": 10, "weight_decay": 0.0, "max_grad_norm": 1.0,
    },
    "ppo": {
        "ppo_epochs": 1, "num_minibatches": 1, "value_learning_rate": 0.0,
        "lr_scheduler": "cosine", "warmup_steps": 10, "weight_decay": 0.0, "max_grad_norm": 1.0,
        "gamma": 1.0, "gae_lambda": 1.0, "clip_range": 0.2, "value_clip_range": 0.2,
        "vf_coef": 0.1, "kl_coef": 0.1, "kl_estimator": "k1", "kl_target": 0.0, "cost_limit": None,
        "whiten_advantages": False, "whiten_rewards": False, "temperature": 1.0,
        "missing_eos_penalty": 0.0, "length_penalty": 0.0, "entropy_coef": 0.0, "sft_coef": 0.0,
    },
}  # fmt: skip
RATES = {
    ("reward", "full"): 3e-5, ("reward", "lora"): 3e-5, ("reward", "qlora"): 3e-5,
    ("reward", "frozen"): 3e-5,
    ("dpo", "full"): 1e-6, ("dpo", "lora"): 2e-5, ("dpo", "qlora"): 2e-5, ("dpo", "frozen"): 1e-6,
    ("ppo", "full"): 5e-7, ("ppo", "lora"): 1e-6, ("ppo", "qlora"): 1e-6, ("ppo", "frozen"): 5e-7,
}  # fmt: skip
PRESET = "original"
# A profile's values of every field that a preset sets, none of them the original's.
SCHEDULE = {
    "learning_rate": 0.5, "lr_scheduler": "linear", "warmup_steps": 7, "weight_decay": 0.2,
    "max_grad_norm": 0.5,
}  # fmt: skip
UNLIKE: dict[str, dict[str, Any]] = {
    "reward": SCHEDULE | {
        "original_form": False, "center_coef": 0.3, "sft_coef": 0.2, "cost_coef": 0.4,
        "shift_px": 2, "mirror": True,
    },
    "dpo": SCHEDULE | {
        "beta": 0.4, "loss_type": ["robust", "sft"], "loss_weights": [0.7, 0.2],
        "label_smoothing": 0.2,
    },
    "ppo": SCHEDULE | {
        "ppo_epochs": 3, "num_minibatches": 4, "value_learning_rate": 0.1, "gamma": 0.9,
        "gae_lambda": 0.8, "clip_range": 0.3, "value_clip_range": 0.4, "vf_coef": 0.5,
        "kl_coef": 0.6, "kl_estimator": "k3", "kl_target": 2.0, "whiten_advantages": True,
        "whiten_rewards": True, "temperature": 2.0, "missing_eos_penalty": 3.0,
        "length_penalty": 0.1, "entropy_coef": 0.1, "sft_coef": 0.5, "cost_limit": 1.5,
        "reward_model": "elsewhere/model",
    },
}  # fmt: skip


@pytest.mark.parametrize(("kind", "adapter"), RATES)
def test_a_preset_is_the_original_whole(kind: str, adapter: str, tmp_path: Path) -> None:
    """Over a profile that differs in every field; scale stays the profile's."""
    profile = tmp_path / "unlike.yaml"
    page = {"base": "smoke", "model": {"adapter": adapter}, kind: UNLIKE[kind]}
    profile.write_text(yaml.safe_dump(page), encoding="utf-8")
    plain = load_config(str(profile))
    config = load_config(str(profile), {f"{kind}.preset": PRESET})
    values = dataclasses.asdict(getattr(config, kind))
    expected = ORIGINAL[kind] | {"learning_rate": RATES[kind, adapter], "preset": PRESET}
    scale = {name: getattr(getattr(plain, kind), name) for name in SCALE[kind]}
    assert values == expected | scale
    method = {name: getattr(getattr(plain, kind), name) for name in expected}
    assert not {k for k, v in method.items() if v == expected[k]}, "the profile must differ"


def test_the_reward_models_defaults_are_the_originals() -> None:
    config = RewardConfig(max_steps=1, per_device_batch_size=1)
    assert dataclasses.asdict(config) == {
        "max_steps": 1, "per_device_batch_size": 1, "gradient_accumulation_steps": 1,
        "num_epochs": 1.0, "preset": "ours", "center_coef": 0.0, "sft_coef": 0.0,
        "cost_coef": 0.0, "shift_px": 0,
        "mirror": False, "original_form": False, "learning_rate": 3e-5,
        "lr_scheduler": "constant_with_warmup",
        "warmup_steps": 10, "weight_decay": 0.0, "max_grad_norm": 1.0, "max_length": 0,
        "save_steps": 50,
    }  # fmt: skip


def test_defaults_of_dpo_ppo_and_rloo() -> None:
    """Those that the profiles, the notebooks and the README rest on."""
    dpo_config = DPOConfig(max_steps=1, per_device_batch_size=1)
    assert (dpo_config.beta, dpo_config.loss_type, dpo_config.loss_weights) == (
        0.1, ("sigmoid", "sft"), (1.0, 1.0),
    )  # fmt: skip
    ppo_config = PPOConfig(
        max_steps=1, rollout_batch_size=2, per_device_batch_size=1, max_new_tokens=1
    )
    assert (ppo_config.gae_lambda, ppo_config.kl_coef, ppo_config.sft_coef) == (0.95, 0.5, 1.0)
    assert ppo_config.whiten_advantages and not ppo_config.whiten_rewards
    rloo_config = RLOOConfig(max_steps=1, per_device_batch_size=4, max_new_tokens=1)
    assert (rloo_config.num_generations, rloo_config.beta) == (4, 0.05)

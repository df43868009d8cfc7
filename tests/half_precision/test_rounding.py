"""Tolerances in 16 bit: what rounding leaves passes, and a fault of each kind does not."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spavl_lib import machine
from spavl_lib.config import Config
from spavl_lib.data.collate import PreferenceCollator
from spavl_lib.modelling.adapters import compute_as_masters
from spavl_lib.modelling.heads import ScalarHeadModel, load_reward_model, save_reward_model
from spavl_lib.modelling.load import autocast, load_model, logit_rounding, rounding
from spavl_lib.modelling.roles import load_roles
from spavl_lib.objectives.logps import sequence_logps
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.trainers import dpo, group, ppo, ppo_batches, probe
from spavl_lib.trainers.reward import build_model
from spavl_lib.trainers.rloo import RLOO
from tests.helpers import embedded_processor, mini_rows, smoke, spread

pytestmark = pytest.mark.filterwarnings("ignore")
HALVES = ("bf16", pytest.param("fp16", marks=pytest.mark.slow))


@pytest.fixture(params=HALVES)
def half(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(machine.DTYPE, request.param)
    return request.param


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return PreferenceCollator(embedded_processor())(spread(mini_rows("validation"), 4))


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in batch.items() if k != "completion_mask"}


# --- the reference of full fine-tuning ----------------------------------------------------------


@torch.no_grad()
def logps_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with autocast():
        logits = model(**inputs_of(batch)).logits
    return sequence_logps(logits, batch["input_ids"], batch["completion_mask"].bool())


def test_masters_start_at_their_reference_to_the_bit(half: str, batch: dict) -> None:
    """And in 16 bit throughout the reference would be off, by more than the check allows."""
    config = smoke({"model.adapter": "full"}).model
    masters, reference = load_model(config).float(), load_model(config)
    assert reference.dtype is not torch.float32
    policy, rounded = logps_of(masters, batch), logps_of(reference, batch)
    assert torch.equal(policy, logps_of(compute_as_masters(reference), batch))
    beta = 1.0
    logs = dict.fromkeys(("rewards/chosen", "rewards/rejected", "rewards/margins"), 0.0)
    dpo.check_reference(logs)
    furthest = beta * (policy - rounded).abs().max().item()
    assert furthest > 0
    with pytest.raises(AssertionError, match="is dropout on"):
        dpo.check_reference(logs | {"rewards/chosen": 1.01 * rounding()})


def pairs_of_models(trainer: str, config: Config, stage: Stage, folder: Path) -> list[tuple]:
    """Models that train, each with the frozen model that it starts at."""
    rows, processor = mini_rows().select(range(8)), embedded_processor()
    if trainer == "roles":
        roles = load_roles(config.model, folder, ())
        pairs = (("policy", "reference"), ("value", "reward"))
        return [tuple(map(roles.vlm_of, pair)) for pair in pairs]
    stage.path.mkdir(parents=True)
    if trainer == "dpo":
        built = dpo.build_trainer(config, stage, processor, rows, rows)
    else:
        built = group.build_trainer(RLOO, config, stage, processor, rows)
    return [(built.model, built.ref_model)]


@pytest.mark.parametrize("trainer", ["dpo", "rloo", "roles"])
def test_what_trains_starts_to_the_bit_at_the_model_that_it_is_compared_with(
    trainer: str, half: str, batch: dict, tmp_path: Path, reward_folders: dict[str, Path]
) -> None:
    config = smoke({
        "model.adapter": "full", "model.share_prefix": "off", "rloo.beta": 0.1,
        "rloo.per_device_batch_size": 4, "rloo.num_generations": 2,
        "rloo.reward_model": str(reward_folders["full"]),
    })  # fmt: skip
    stage = Run(config, root=tmp_path).stage("dpo" if trainer == "roles" else trainer)
    for trained, frozen in pairs_of_models(trainer, config, stage, reward_folders["full"]):
        assert next(trained.parameters()).dtype is torch.float32
        assert torch.equal(logps_of(trained, batch), logps_of(frozen, batch))


def test_the_probe_of_a_reference_computes_as_the_training_does(half: str) -> None:
    model = compute_as_masters(load_model(smoke({"model.adapter": "full"}).model))
    rows, processor = mini_rows().select(range(1)), embedded_processor()
    found = probe.reference_probe(model, processor, rows, as_reference=contextlib.nullcontext())
    pair = PreferenceCollator(processor)([rows[0]])
    assert found["logps"] == logps_of(model, pair).double().tolist()


def test_the_kl_of_the_first_rloo_step_has_a_derived_tolerance(half: str) -> None:
    logs = {"frac_reward_zero_std": 0.0}
    allowed = logit_rounding() ** 2 / 2
    group.check_first(logs | {"kl": 0.99 * allowed}, "rloo")
    with pytest.raises(AssertionError, match="kl = "):
        group.check_first(logs | {"kl": 1.01 * allowed}, "rloo")


# --- a reward model that was saved --------------------------------------------------------------


def trained(adapter: str) -> ScalarHeadModel:
    """A reward model whose adapter or weights, projector and head differ from a fresh one's."""
    model = build_model(smoke({"model.adapter": adapter})).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_loaded_reward_model_scores_the_same(
    half: str, adapter: str, batch: dict, tmp_path: Path
) -> None:
    config = smoke({"model.adapter": adapter}).model
    model = trained(adapter)
    save_reward_model(model, tmp_path, config)
    loaded = load_reward_model(config, tmp_path)
    with torch.no_grad():
        expected, again = model(**inputs_of(batch)), loaded(**inputs_of(batch))
    off = ((again - expected).abs() / (1 + expected.abs())).max().item()
    assert off <= rounding()
    for lost in ("projector", "lora_B" if adapter == "lora" else "layers.1."):
        broken = load_reward_model(config, tmp_path)
        with torch.no_grad():
            for name, parameter in broken.named_parameters():
                if lost in name:
                    parameter.zero_()
            scores = broken(**inputs_of(batch))
        off = ((scores - expected).abs() / (1 + expected.abs())).max().item()
        assert off > rounding(), f"without its {lost} it would pass"


# --- PPO's first ratio --------------------------------------------------------------------------


@contextlib.contextmanager
def dropout(model: nn.Module, share: float) -> Iterator[None]:
    def drop(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return nn.functional.dropout(output, share)

    layers = [m for n, m in model.named_modules() if n.endswith("mlp")]
    hooks = [layer.register_forward_hook(drop) for layer in layers]
    yield
    for hook in hooks:
        hook.remove()


@pytest.fixture
def rolled(half: str, tmp_path: Path, reward_folders: dict[str, Path]) -> Iterator[SimpleNamespace]:
    config = smoke({
        "model.adapter": "lora", "model.share_prefix": "off", "data.train_rows": 8,
        "ppo.reward_model": str(reward_folders["lora"]), "ppo.rollout_batch_size": 8,
        "ppo.num_minibatches": 1, "ppo.max_new_tokens": 12, "ppo.sft_coef": 0.0,
    })  # fmt: skip
    stage = Run(config, root=tmp_path).stage("ppo")
    rows = mini_rows().select(range(8))
    trainer = ppo.PPOTrainer(config, stage, rows, reward_folders["lora"], False)
    # A head that is less sure than the embedded model's, whose logits are as large as a 7B's.
    head = trainer.model.vlm_of("policy").get_output_embeddings().weight
    torch.manual_seed(3)
    head.data += (0.5 * torch.randn(head.shape)).to(head.dtype)
    with trainer.tower_cache().rollout() as cache:
        rollout = trainer.roll_out(0, cache)
        [part] = ppo_batches.minibatches(
            [p.image_digest for p in rollout.prompts], 1, 5, by_image=True
        )
        yield SimpleNamespace(trainer=trainer, rollout=rollout, cache=cache, rows=part)


def first_update(rolled: SimpleNamespace) -> None:
    rolled.trainer.engine.zero_grad()
    rolled.trainer.accumulate(rolled.rollout, rolled.rows, rolled.cache, first=True)


def test_another_kernel_passes_and_faults_do_not(rolled: SimpleNamespace) -> None:
    """Eager attention stands for what a GPU does: the same numbers, summed in another order."""
    trainer, policy = rolled.trainer, rolled.trainer.model.vlm_of("policy")
    first_update(rolled)
    policy.get_base_model().set_attn_implementation("eager")
    first_update(rolled)
    faults = {"dropout": dropout(policy, 0.05), "temperature": contextlib.nullcontext()}
    for name, fault in faults.items():
        if name == "temperature":
            trainer.settings = dataclasses.replace(trainer.settings, temperature=0.8)
        trainer.model.after_backward()
        with fault, pytest.raises(AssertionError, match="before any update"):
            first_update(rolled)

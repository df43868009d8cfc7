"""Private methods of transformers and trl that our trainers override or call.

They may change in any version. Then a test here fails with the method's name, before a training
silently uses stock checkpoints or skips a check.
"""

import inspect

import pytest
from transformers import Trainer
from trl import DPOTrainer, GRPOTrainer, RLOOTrainer

from spavl_lib.trainers.dpo import CheckedDPOTrainer
from spavl_lib.trainers.exact_trainer import CheckedMixin, WholeStepMixin
from spavl_lib.trainers.group import GroupMixin
from spavl_lib.trainers.grpo import CheckedGRPOTrainer
from spavl_lib.trainers.reward import VLMRewardTrainer
from spavl_lib.trainers.rloo import CheckedRLOOTrainer

GROUP = {
    "_get_train_sampler": ("dataset",),
    "_prepare_inputs": ("generation_batch",),
    "_generate_and_score_completions": ("inputs",),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_tokenize_prompts": ("prompts",),
}
# Method of the class on the left -> its parameters after `self`.
OVERRIDDEN = {
    Trainer: {
        "_get_train_sampler": ("train_dataset",),
        "_prepare_inputs": ("inputs",),
        "create_accelerator_and_postprocess": (),
        "create_optimizer": ("model",),
        "training_step": ("model", "inputs", "num_items_in_batch"),
        "_clip_grad_norm": ("model",),
        "_get_grad_norm": ("model", "grad_norm"),
        "_prepare_for_training": ("max_steps", "train_dataloader", "resume_from_checkpoint"),
        "_save_checkpoint": ("model", "trial"),
        "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
        "_load_optimizer_and_scheduler": ("checkpoint",),
        "_load_rng_state": ("checkpoint",),
    },
    DPOTrainer: {"get_batch_samples": ("epoch_iterator", "num_batches", "device")},
    RLOOTrainer: GROUP,
    GRPOTrainer: GROUP,
}
OURS = [CheckedDPOTrainer, VLMRewardTrainer, CheckedRLOOTrainer, CheckedGRPOTrainer]
CASES = [(owner, name) for owner, methods in OVERRIDDEN.items() for name in methods]


def parameters_of(owner: type, name: str) -> tuple[str, ...]:
    return tuple(inspect.signature(getattr(owner, name)).parameters)[1:]


@pytest.mark.parametrize(("owner", "name"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_an_overridden_method_exists_is_called_and_takes_what_it_took(
    owner: type, name: str
) -> None:
    assert hasattr(owner, name), f"{owner.__name__}.{name} is gone: our override is never called"
    expected = OVERRIDDEN[owner][name]
    assert parameters_of(owner, name) == expected, f"{owner.__name__}.{name} changed its parameters"
    users = "".join(inspect.getsource(c) for c in {owner, Trainer})
    assert f"self.{name}" in users, f"{owner.__name__} no longer calls {name}"


def test_every_method_that_the_mixin_overrides_is_listed() -> None:
    overridden = {name for name in vars(CheckedMixin) if callable(getattr(Trainer, name, None))}
    overridden -= {name for name in vars(object)}
    assert overridden == OVERRIDDEN[Trainer].keys()
    for name in overridden:
        assert parameters_of(CheckedMixin, name) == parameters_of(Trainer, name), name


@pytest.mark.parametrize("ours", [CheckedDPOTrainer, VLMRewardTrainer])
def test_a_step_is_counted_before_the_stock_loop_runs_it(ours: type) -> None:
    assert ours.get_batch_samples is WholeStepMixin.get_batch_samples
    source = inspect.getsource(Trainer.training_step)
    assert "loss / self.current_gradient_accumulation_steps" in source  # our weights rest on it


@pytest.mark.parametrize("ours", OURS)
def test_our_methods_come_before_the_stock_ones(ours: type) -> None:
    """A mixin that stands after the stock class in the bases would override nothing."""
    for name in OVERRIDDEN[Trainer]:
        owner = next(c for c in ours.__mro__ if name in vars(c))
        assert owner in (CheckedMixin, GroupMixin, ours), (
            f"{ours.__name__}.{name} is {owner.__name__}'s"
        )


def test_trl_still_has_what_our_trainers_call() -> None:
    assert parameters_of(DPOTrainer, "compute_ref_log_probs") == ("model", "inputs")
    source = inspect.getsource(DPOTrainer)
    for name in (
        "zip(self.loss_types, self.loss_weights",
        "self.precompute_ref_logps",
        "ref_chosen_logps",
        "ref_rejected_logps",
    ):
        assert name in source, f"DPOTrainer no longer uses {name}"
    for owner in (Trainer, DPOTrainer, RLOOTrainer, GRPOTrainer):
        names = parameters_of(owner, "compute_loss")
        assert names == ("model", "inputs", "return_outputs", "num_items_in_batch"), owner

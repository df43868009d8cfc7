"""What trains: the language model whole or through LoRA, the projector or not, the tower never."""

import re

import torch
from peft import LoraConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from spavl_lib.config import ModelConfig
from spavl_lib.distributed.zero_parameters import numel
from spavl_lib.errors import InputError

TOWER = re.compile(r"(^|\.)(vision_tower|vision_model|visual)\.")
PROJECTOR = re.compile(r"(^|\.)(multi_modal_projector|connector|merger)\.")
HEAD = re.compile(r"(^|\.)lm_head\.")


def part_of(name: str) -> str:
    """Which part a parameter belongs to: tower, projector, head or language."""
    for part, pattern in (("projector", PROJECTOR), ("tower", TOWER), ("head", HEAD)):
        if pattern.search(name):
            return part
    return "language"


def lora_config(model: PreTrainedModel, config: ModelConfig) -> LoraConfig:
    """LoRA on the seven linears of the language model, and the projector trained whole.

    `all-linear` would put half its adapters on the tower, so targets are listed by full name.

    Raises:
        InputError: The model has no such linears.
    """
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.rsplit(".", 1)[-1] in config.lora_targets
        and part_of(f"{name}.weight") == "language"
    ]
    if not targets:
        raise InputError(
            f"{type(model).__name__}: found none of {config.lora_targets} in the language model"
        )
    projectors = {
        name.rsplit(".", 1)[-1]
        for name, _ in model.named_modules()
        if PROJECTOR.search(f"{name}.") and not PROJECTOR.search(f"{name.rpartition('.')[0]}.")
    }
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=targets,
        modules_to_save=sorted(projectors) if config.train_projector else None,
        task_type="CAUSAL_LM",
    )


def freeze_for_full(model: PreTrainedModel, config: ModelConfig) -> None:
    """Without adapters: language model and head, unless frozen, and the projector if asked."""
    trained = {"language", "head"} if config.adapter == "full" else set()
    trained |= {"projector"} if config.train_projector else set()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trained)


@torch.no_grad()
def train_in_fp32(model: PeftModel) -> None:
    """Undo trl's rounding of what trains over 4 bit to bf16, before an optimizer holds it.

    The projector starts from the base's again: rounded, the policy would not start as its
    reference. For a fresh model only.
    """
    masters_in_fp32(model)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for copy in module.modules_to_save.values():
                copy.load_state_dict(module.original_module.state_dict())


def trainable_parts(model: nn.Module) -> dict[str, int]:
    """Number of trainable values, by part; LoRA's counted under the part they adapt."""
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts[part_of(name)] = parts.get(part_of(name), 0) + numel(parameter)
    return parts


def assert_four_bit(model: nn.Module) -> None:
    """Check by module that the language model's linears are in 4 bit, and nothing else is.

    Names to skip that match nothing quantise the tower without a word.

    Raises:
        AssertionError: Names a module on the wrong side.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            four = type(module).__name__ == "Linear4bit"
            if four != (part_of(f"{name}.weight") == "language"):
                raise AssertionError(f"{name}: in 4 bit = {four}, and it is {part_of(name + '.')}")


def assert_freeze_plan(
    model: nn.Module, config: ModelConfig, *, head: bool = True
) -> dict[str, int]:
    """Check by name that what should train does, and nothing else.

    Args:
        model: With its parameters set to train or not.
        config: The plan.
        head: Whether full fine-tuning trains the language-model head; a reward model has none.

    Returns:
        `trainable_parts`.

    Raises:
        AssertionError: Names a parameter on the wrong side.
    """
    for name, parameter in model.named_parameters():
        part, lora = part_of(name), "lora_" in name
        if not config.with_lora:
            language = config.adapter == "full"
            expected = (language and part in (("language", "head") if head else ("language",))) or (
                part == "projector" and config.train_projector
            )
        else:
            copied = "modules_to_save" in name
            expected = (lora and part == "language") or (
                part == "projector" and copied and config.train_projector
            )
        if lora and part != "language":
            raise AssertionError(f"{name}: LoRA reaches the {part}")
        if parameter.requires_grad != expected:
            raise AssertionError(
                f"{name}: trains = {parameter.requires_grad}, expected {expected} "
                f"({config.adapter}, projector {config.train_projector})"
            )
    parts = trainable_parts(model)
    if config.adapter != "frozen" and not parts.get("language"):
        raise AssertionError("nothing of the language model trains")
    return parts


def masters_in_fp32(model: nn.Module) -> None:
    """What trains, in fp32: half-precision weights lose small updates, and stop a loss scaler.

    Autocast casts for each product anyway, also where there is no bf16, as on a T4. DeepSpeed keeps
    masters of its own.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()

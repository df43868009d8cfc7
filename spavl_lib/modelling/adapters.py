"""Which parameters train: the language model (fully or through LoRA), and optionally the projector.

The vision tower never trains.
"""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from spavl_lib.config import ModelConfig
from spavl_lib.distributed.zero_parameters import numel
from spavl_lib.errors import InputError
from spavl_lib.modelling.families import family_of


def lora_config(model: PreTrainedModel, config: ModelConfig) -> LoraConfig:
    """The LoRA config: adapters on the language model, and a fully trained projector.

    The adapted linear layers are listed by full name, because PEFT's `all-linear` would put half
    the adapters on the vision tower.

    Args:
        model: The base model.
        config: Rank, scale, names of the layers, and whether the projector trains.

    Raises:
        InputError: The language model has none of the layers in `lora_targets`.
    """
    family = family_of(model)
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.rsplit(".", 1)[-1] in config.lora_targets
        and family.part_of(f"{name}.weight") == "language"
    ]
    if not targets:
        raise InputError(
            f"{type(model).__name__}: the language model has none of the linear layers in "
            f"model.lora_targets ({', '.join(config.lora_targets)})"
        )
    projectors = {
        name.rsplit(".", 1)[-1]
        for name, _ in model.named_modules()
        if family.part_of(f"{name}.weight") == "projector"
        and family.part_of(f"{name.rpartition('.')[0]}.weight") != "projector"
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


def add_lora(model: PreTrainedModel, config: ModelConfig) -> PeftModel:
    """Wrap a base model with new adapters, whose output is 0 until they are trained.

    Args:
        model: The base model; changed in place.
        config: See `lora_config`.

    Raises:
        InputError: See `lora_config`.
    """
    return get_peft_model(model, lora_config(model, config))


def freeze_for_full(model: PreTrainedModel, config: ModelConfig) -> None:
    """Set which parameters train without adapters.

    Args:
        model: The model; changed in place.
        config: `adapter: full` trains the language model and its head. `train_projector` trains the
            projector.
    """
    family = family_of(model)
    trained = {"language", "head"} if config.adapter == "full" else set()
    trained |= {"projector"} if config.train_projector else set()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(family.part_of(name) in trained)


@torch.no_grad()
def train_in_fp32(model: PeftModel) -> None:
    """Undo trl's cast of the trained parameters to bf16, which trl does over a 4-bit base.

    Call this function before training, and before an optimizer holds the parameters. The
    projector's values are copied again from the base. With a projector rounded to bf16, the policy
    would differ from its reference before the first step.
    """
    masters_in_fp32(model)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for copy in module.modules_to_save.values():
                copy.load_state_dict(module.original_module.state_dict())


def masters_in_fp32(model: nn.Module) -> None:
    """Cast trained parameters to fp32, because in half precision rounding loses small updates.

    Autocast still computes matrix products in half precision. DeepSpeed does not need this cast: it
    keeps fp32 master weights itself.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def compute_as_masters(model: nn.Module) -> nn.Module:
    """Cast a frozen 16-bit model's embeddings and norms to fp32.

    Under autocast, the outputs are then identical to the bit to the outputs of the same model with
    all weights cast to fp32. Autocast computes matrix products and convolutions in 16 bits for
    weights of any dtype. The other parameters, of embeddings and norms, decide whether the residual
    stream is rounded to 16 bits after each layer. A policy with fp32 master weights therefore
    equals its reference before the first update. Without the cast, the log-probability of a
    response differed by 0.008 nats, as the mean of a batch of the embedded model in bf16.

    Args:
        model: The model; changed in place. It must be called under autocast from now on.
    """
    for module in model.modules():
        if not isinstance(module, nn.Linear | _ConvNd):
            for parameter in module.parameters(recurse=False):
                # `ds_id` marks parameters that ZeRO-3 partitions; ZeRO-3 keeps fp32 masters itself.
                if not hasattr(parameter, "ds_id"):
                    parameter.data = parameter.data.float()
    return model


def separate_projector(optimizer: torch.optim.Optimizer, model: nn.Module, rate: float) -> None:
    """Give the projector's parameters a learning rate of their own.

    Call it before the learning-rate scheduler is made.

    Args:
        optimizer: An optimizer that has taken no step. Each of its parameter groups that holds
            parameters of the projector loses them to a new group behind all others.
        model: The model.
        rate: Learning rate of the projector. At 0 nothing changes.
    """
    if not rate:
        return
    family = family_of(model)
    projector = {id(p) for n, p in model.named_parameters() if family.part_of(n) == "projector"}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in projector]
        if moved:
            group["params"] = [p for p in group["params"] if id(p) not in projector]
            optimizer.add_param_group(group | {"params": moved, "lr": rate})


def trainable_parts(model: nn.Module) -> dict[str, int]:
    """Number of trained values by part. LoRA's values count under the part that they adapt."""
    family = family_of(model)
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = family.part_of(name)
            parts[part] = parts.get(part, 0) + numel(parameter)
    return parts


def assert_four_bit(model: nn.Module) -> None:
    """Check that the language model's linear layers are in 4 bits, and other linear layers are not.

    If the names of modules to skip match no module, transformers quantises the tower without a
    warning.

    Raises:
        AssertionError: A layer has the wrong precision; the message names the layer.
    """
    family = family_of(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            part, four = family.part_of(f"{name}.weight"), type(module).__name__ == "Linear4bit"
            if four != (part == "language"):
                bits = "in 4 bits" if four else "not in 4 bits"
                raise AssertionError(f"{name} is {bits}, but it belongs to the {part}")


def assert_freeze_plan(
    model: nn.Module, config: ModelConfig, *, head: bool = True
) -> dict[str, int]:
    """Check by name that the config's trainable parameters train, and that no others do.

    Args:
        model: A model with `requires_grad` already set on its parameters.
        config: Says which parts should train.
        head: Whether full fine-tuning trains the language-model head. False for a reward model,
            whose language-model head stays frozen.

    Returns:
        `trainable_parts`.

    Raises:
        AssertionError: A parameter trains but should not, or does not train but should; LoRA is on
            another part than the language model; or the language model does not train at all.
    """
    family = family_of(model)
    for name, parameter in model.named_parameters():
        part, lora = family.part_of(name), "lora_" in name
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
            raise AssertionError(f"{name}: LoRA on the {part}; only the language model takes it")
        if parameter.requires_grad != expected:
            raise AssertionError(
                f"{name}: requires_grad is {parameter.requires_grad}, expected {expected} "
                f"(model.adapter {config.adapter}, train_projector {config.train_projector})"
            )
    parts = trainable_parts(model)
    if config.adapter != "frozen" and not parts.get("language"):
        raise AssertionError("no parameter of the language model trains")
    return parts

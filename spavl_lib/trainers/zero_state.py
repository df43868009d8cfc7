"""The optimizer state of one process: the complete state, or one rank's shard under ZeRO.

DeepSpeed's own checkpoints are pickles, so this package does not use them. A rank's shard consists
of flat fp32 master weights, and of the base optimizer's state for these weights. Only the same
engine in the same number of processes can load the shard.
"""

from typing import Any

import torch
from torch import Tensor

from spavl_lib.trainers import checkpoint as ckpt


def _zero(optimizer: Any) -> Any:
    """Find DeepSpeed's optimizer, which accelerate may have wrapped; None without DeepSpeed."""
    for candidate in (optimizer, getattr(optimizer, "optimizer", None)):
        if hasattr(candidate, "loss_scaler") and hasattr(candidate, "optimizer"):
            return candidate
    return None


def _masters(zero: Any) -> list[Tensor]:
    """Return the flat fp32 master weights of this rank."""
    stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
    return zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups


def optimizer_share(optimizer: Any) -> tuple[dict[str, Tensor], dict]:
    """Return this process's optimizer state, as named tensors and JSON values.

    Args:
        optimizer: The optimizer, as accelerate prepared it.
    """
    zero = _zero(optimizer)
    if zero is None:
        return ckpt.optimizer_tensors(optimizer)
    stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
    if stage3:
        zero._set_fp32_optimizer_param_groups()
    tensors, plain = ckpt.optimizer_tensors(zero.optimizer)
    if stage3:
        zero._clear_fp32_optimizer_param_groups()
    tensors |= {f"master.{i}": m.detach() for i, m in enumerate(_masters(zero))}
    scaler = zero.loss_scaler
    scale = {k: getattr(scaler, k) for k in ("cur_scale", "cur_iter") if hasattr(scaler, k)}
    return tensors, plain | {"loss_scaler": scale}


def load_optimizer_share(optimizer: Any, tensors: dict[str, Tensor], plain: dict) -> None:
    """Load the result of `optimizer_share`. Under ZeRO this also restores the model's weights.

    Args:
        optimizer: The optimizer, as accelerate prepared it.
        tensors: Tensors of `optimizer_share`.
        plain: JSON values of `optimizer_share`.
    """
    zero = _zero(optimizer)
    if zero is None:
        ckpt.load_optimizer(optimizer, tensors, plain)
        return
    slots = {k: v for k, v in tensors.items() if not k.startswith("master.")}
    stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
    if stage3:
        zero.checkpoint_event_prologue()
        zero._set_fp32_optimizer_param_groups()
    ckpt.load_optimizer(zero.optimizer, slots, plain)
    if stage3:
        zero._clear_fp32_optimizer_param_groups()
    with torch.no_grad():
        for i, master in enumerate(_masters(zero)):
            master.data.copy_(tensors[f"master.{i}"])
        if stage3:
            _refresh_stage3(zero)
        else:
            zero.update_lp_params()
    if stage3:
        zero.checkpoint_event_epilogue()
    for key, value in plain.get("loss_scaler", {}).items():
        setattr(zero.loss_scaler, key, value)


def _refresh_stage3(zero: Any) -> None:
    """Copy the master weights into the model's shards, as DeepSpeed does after loading."""
    for flat, master in zip(
        zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True
    ):
        if master.numel():
            flat.data.copy_(master.data)
    for flat, group in zip(
        zero.fp16_partitioned_groups_flat, zero.fp16_partitioned_groups, strict=True
    ):
        for held, value in zip(group, zero.unflatten(flat, group), strict=True):
            held.data = value.data

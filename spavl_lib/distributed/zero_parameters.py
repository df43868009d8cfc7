"""Parameters that ZeRO-3 partitions over the processes: their size, their shards, whole tensors."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from spavl_lib.machine import is_main

if TYPE_CHECKING:
    from torch import Tensor, nn


def numel(parameter: "Tensor") -> int:
    """Number of values in the whole parameter, even if this process holds only a shard of it."""
    return getattr(parameter, "ds_numel", None) or parameter.numel()


def shard(parameter: "Tensor") -> "Tensor":
    """What this process holds, detached: a shard under ZeRO-3, else the whole parameter."""
    own_shard = getattr(parameter, "ds_tensor", None)
    return parameter.detach() if own_shard is None else own_shard.detach()


def whole(named: dict[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Parameters as whole, detached tensors.

    Under ZeRO-3 the parameters are gathered one at a time. All processes must call this function,
    and only the main process gets the partitioned parameters, as copies on the CPU.
    """
    if not any(hasattr(p, "ds_id") for p in named.values()):
        return {name: p.detach() for name, p in named.items()}
    import deepspeed

    tensors = {}
    for name, parameter in named.items():
        if not hasattr(parameter, "ds_id"):
            tensors[name] = parameter.detach()
            continue
        # If the caller has gathered the parameter already, the caller also releases it.
        gathered = parameter.ds_status.name == "AVAILABLE"
        with deepspeed.zero.GatheredParameters([parameter], enabled=not gathered):
            if is_main():
                tensors[name] = parameter.detach().cpu().clone()
    return tensors


@contextlib.contextmanager
def gathered_parameters(model: "nn.Module") -> Iterator[None]:
    """Within the block every process holds whole parameters, even of a model under ZeRO-3."""
    partitioned = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def for_saving(model: "nn.Module") -> dict[str, Any]:
    """Arguments that `save_pretrained` needs for a model partitioned by ZeRO-3; empty otherwise.

    All processes must call this function. Then only the main process saves the model.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    if not any(hasattr(p, "ds_id") for p in named.values()):
        return {}
    saved_names = model.state_dict().keys()
    buffers = {k: v for k, v in model.named_buffers() if k in saved_names}
    return {"state_dict": {k: v for k, v in whole(named).items() if k in saved_names} | buffers}

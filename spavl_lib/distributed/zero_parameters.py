"""Parameters that ZeRO-3 partitions over the processes: size, shard, whole tensor."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from spavl_lib.machine import is_main

if TYPE_CHECKING:
    from torch import Tensor, nn


def numel(parameter: "Tensor") -> int:
    """Number of values of a whole parameter, also where this process holds only a shard of it."""
    return getattr(parameter, "ds_numel", None) or parameter.numel()


def shard(parameter: "Tensor") -> "Tensor":
    """The part of a parameter that this process holds: its shard under ZeRO-3, else all of it."""
    part = getattr(parameter, "ds_tensor", None)
    return parameter.detach() if part is None else part.detach()


def whole(named: dict[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Parameters as whole tensors; under ZeRO-3 the main process gathers them one at a time.

    Every process must call this. Parameters that are not partitioned are returned as they are.
    """
    if not any(hasattr(p, "ds_id") for p in named.values()):
        return {name: p.detach() for name, p in named.items()}
    import deepspeed

    out = {}
    for name, parameter in named.items():
        if not hasattr(parameter, "ds_id"):
            out[name] = parameter.detach()
            continue
        # A caller that has gathered the parameter also releases it.
        gathered = parameter.ds_status.name == "AVAILABLE"
        with deepspeed.zero.GatheredParameters([parameter], enabled=not gathered):
            if is_main():
                out[name] = parameter.detach().cpu().clone()
    return out


@contextlib.contextmanager
def gathered_parameters(model: "nn.Module") -> Iterator[None]:
    """Within the block every process holds the whole parameters of a ZeRO-3 model."""
    partitioned = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def for_saving(model: "nn.Module") -> dict[str, Any]:
    """Arguments that `save_pretrained` needs for a model partitioned by ZeRO-3; empty otherwise.

    Every process must call this, and the main one saves.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    if not any(hasattr(p, "ds_id") for p in named.values()):
        return {}
    saved = model.state_dict().keys()
    buffers = {k: v for k, v in model.named_buffers() if k in saved}
    return {"state_dict": {k: v for k, v in whole(named).items() if k in saved} | buffers}

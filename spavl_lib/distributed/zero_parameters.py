"""Parameters that ZeRO-3 partitions over the processes: size, shard, whole tensor."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from spavl_lib.machine import is_main

if TYPE_CHECKING:
    from torch import Tensor, nn


def numel(parameter: "Tensor") -> int:
    """Values of a parameter, whole, even where this process holds a piece of it."""
    return getattr(parameter, "ds_numel", None) or parameter.numel()


def piece(parameter: "Tensor") -> "Tensor":
    """What this process holds of a parameter: all of it, or its piece under ZeRO-3."""
    held = getattr(parameter, "ds_tensor", None)
    return parameter.detach() if held is None else held.detach()


def whole(named: dict[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Parameters as whole tensors; under ZeRO-3 gathered, one at a time, for the main process.

    Every process must call this. Where nothing is in pieces, the same tensors come back.
    """
    if not any(hasattr(p, "ds_id") for p in named.values()):
        return {name: p.detach() for name, p in named.items()}
    import deepspeed

    out = {}
    for name, parameter in named.items():
        if not hasattr(parameter, "ds_id"):
            out[name] = parameter.detach()
            continue
        there = parameter.ds_status.name == "AVAILABLE"  # gathered by a caller, who ends it too
        with deepspeed.zero.GatheredParameters([parameter], enabled=not there):
            if is_main():
                out[name] = parameter.detach().cpu().clone()
    return out


@contextlib.contextmanager
def gathered_parameters(model: "nn.Module") -> Iterator[None]:
    """Inside the block every process holds a ZeRO-3 model whole, as before its engine exists."""
    pieces = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not pieces:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(pieces):
        yield


def for_saving(model: "nn.Module") -> dict[str, Any]:
    """Arguments that `save_pretrained` needs where ZeRO-3 holds a model in pieces; else none.

    Every process must call this, and the main one saves.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    if not any(hasattr(p, "ds_id") for p in named.values()):
        return {}
    kept = model.state_dict().keys()
    buffers = {k: v for k, v in model.named_buffers() if k in kept}
    return {"state_dict": {k: v for k, v in whole(named).items() if k in kept} | buffers}

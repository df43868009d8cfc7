"""One process or many: which one this is, and what they can only do together.

A child of `children.train_in_processes` knows itself by its environment; anywhere else there is
one process, and every function here is the plain thing.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spavl_lib.config import LaunchConfig
from spavl_lib.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

WORKER = "SPAVL_WORKER"  # set in every child: the folder where ranks report


def rank() -> int:
    """This process's number among all, 0 for the one that writes."""
    return int(os.environ.get("RANK", 0)) if WORKER in os.environ else 0


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1)) if WORKER in os.environ else 1


def is_main() -> bool:
    """Whether this process writes the run folder."""
    return rank() == 0


def join(launch: LaunchConfig) -> None:
    """Meet the other processes of a child's group."""
    if not in_processes(launch):
        return
    import datetime

    from accelerate import PartialState

    limit = datetime.timedelta(seconds=launch.timeout_s)
    PartialState(cpu=plain_cpu(launch), timeout=limit, **_backend(launch))


def _device() -> Any:
    import torch

    backend = str(torch.distributed.get_backend())
    if "nccl" in backend:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _together() -> bool:
    import torch

    return world_size() > 1 and torch.distributed.is_initialized()


def barrier() -> None:
    """Wait until every process is here."""
    any_of(False)


def any_of(flag: bool) -> bool:
    """Whether any process says yes; all get the same answer."""
    if not _together():
        return flag
    import torch

    said = torch.tensor([int(flag)], device=_device())
    torch.distributed.all_reduce(said, op=torch.distributed.ReduceOp.MAX)
    return bool(said.item())


def any_of_each(flags: "Tensor") -> "Tensor":
    """`any_of`, elementwise, of a boolean tensor of the same shape in every process."""
    if not _together():
        return flags
    import torch

    said = flags.to(_device(), torch.int32)
    torch.distributed.all_reduce(said, op=torch.distributed.ReduceOp.MAX)
    return said.bool().cpu()


def sum_of(values: "Tensor") -> "Tensor":
    """The sum over processes of a tensor of the same shape in each."""
    if not _together():
        return values
    import torch

    total = values.detach().to(_device()).clone()
    torch.distributed.all_reduce(total)
    return total.to(values.device)


def mean_of(values: dict[str, float]) -> dict[str, float]:
    """The mean over processes of each value; the keys must be the same everywhere."""
    if not _together() or not values:
        return values
    import torch

    names = sorted(values)
    sums = torch.tensor([values[n] for n in names], dtype=torch.float32, device=_device())
    torch.distributed.all_reduce(sums)
    return dict(zip(names, (sums / world_size()).tolist(), strict=True))


def gathered(rows: list) -> list[list]:
    """Every process's rows, by rank."""
    if not _together():
        return [rows]
    import torch

    parts: list = [None] * world_size()
    torch.distributed.all_gather_object(parts, rows)
    return parts


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The main process goes first: it fills a cache that the others then find."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


def report(name: str, value: dict) -> None:
    """Tell the parent something, under a name; of progress only the main process does."""
    if WORKER in os.environ and (is_main() or name.startswith("rank-")):
        target = Path(os.environ[WORKER]) / f"{name}.json"
        aside = target.with_name(f".{target.name}.{os.getpid()}")
        aside.write_text(json.dumps(value), encoding="utf-8")
        aside.replace(target)


# --- settings -----------------------------------------------------------------------------------


def in_processes(launch: LaunchConfig) -> bool:
    """Whether training runs in child processes: several of them, or under DeepSpeed."""
    return launch.num_processes > 1 or launch.engine != "ddp"


def to_be_started(launch: LaunchConfig) -> bool:
    """Whether this is the process that has yet to start the others."""
    return in_processes(launch) and WORKER not in os.environ


def local_processes() -> int:
    """How many processes this machine has devices for."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else os.cpu_count() or 1


def local_accumulation(section: str, steps: int, launch: LaunchConfig) -> int:
    """Batches that one process sums into an optimizer step.

    A profile's `gradient_accumulation_steps` are shared out, so that a run on eight devices takes
    the very steps of a run on one.

    Raises:
        InputError: They cannot be shared out evenly.
    """
    if steps % launch.num_processes:
        raise InputError(
            f"{section}.gradient_accumulation_steps = {steps} cannot be shared out among "
            f"launch.num_processes = {launch.num_processes}: an optimizer step keeps its size "
            f"whatever the number of processes, so make it a multiple, and "
            f"{section}.per_device_batch_size smaller"
        )
    return steps // launch.num_processes


def plain_cpu(launch: LaunchConfig) -> bool:
    """Whether accelerate is to be told that it runs on the CPU: told so, it forgets DeepSpeed."""
    import torch

    return not torch.cuda.is_available() and launch.engine == "ddp"


def _backend(launch: LaunchConfig) -> dict[str, str]:
    """Under DeepSpeed on the CPU accelerate must be told, or it counts one process."""
    import torch

    return {} if torch.cuda.is_available() or launch.engine == "ddp" else {"backend": "gloo"}


def check_supported(model_adapter: str, launch: LaunchConfig) -> None:
    """Refuse what no engine does.

    Raises:
        InputError: 4 bit under ZeRO-3, which cannot share out packed weights.
    """
    if model_adapter == "qlora" and launch.engine == "zero3":
        raise InputError(
            "model.adapter = qlora under zero3: packed weights cannot be shared out; "
            "use zero2 or ddp"
        )


def launch_arguments(section: str, steps: int, launch: LaunchConfig) -> dict[str, Any]:
    """What transformers' `TrainingArguments` must know of several processes.

    Make the arguments before the model: under ZeRO-3 it is loaded in pieces.
    """
    arguments: dict[str, Any] = {
        "gradient_accumulation_steps": local_accumulation(section, steps, launch),
        "use_cpu": plain_cpu(launch),
    }
    if in_processes(launch):
        # A row without an image leaves the projector out of the graph.
        arguments |= {"ddp_timeout": launch.timeout_s, "ddp_find_unused_parameters": True}
        arguments["ddp_backend"] = _backend(launch).get("backend")
    return arguments


def check_engine(wrapped: "nn.Module", launch: LaunchConfig) -> dict[str, Any]:
    """Make sure that what was asked for is what runs; launchers fall back without a word.

    Args:
        wrapped: The model as accelerate prepared it.
        launch: What was asked for.

    Returns:
        `engine` and `world_size` as found.

    Raises:
        RuntimeError: Another engine, stage or number of processes.
    """
    import torch
    from torch.nn.parallel import DistributedDataParallel

    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if hasattr(wrapped, "zero_optimization_stage"):
        found = f"zero{wrapped.zero_optimization_stage()}"
    elif isinstance(wrapped, DistributedDataParallel):
        found = "ddp"
    else:
        found = "none"
    wanted = launch.engine if in_processes(launch) else "none"
    if size != launch.num_processes or world_size() != size or found != wanted:
        raise RuntimeError(
            f"asked for {wanted} in {launch.num_processes} processes, got {found} in {size}"
        )
    return {"engine": found, "world_size": size}


# --- parameters that ZeRO-3 holds in pieces -----------------------------------------------------


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

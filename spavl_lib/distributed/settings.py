"""How a launch is set up: what runs in several processes, and what trainers must be told."""

import os
from typing import TYPE_CHECKING, Any

from spavl_lib.config import LaunchConfig
from spavl_lib.errors import InputError
from spavl_lib.machine import WORKER, world_size

if TYPE_CHECKING:
    from torch import nn


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


def backend(launch: LaunchConfig) -> dict[str, str]:
    """Under DeepSpeed on the CPU accelerate must be told, or it counts one process."""
    import torch

    return {} if torch.cuda.is_available() or launch.engine == "ddp" else {"backend": "gloo"}


def check_supported(name: str, model_adapter: str, launch: LaunchConfig) -> None:
    """Refuse what an engine cannot do.

    Args:
        name: Stage.
        model_adapter: The setting `model.adapter`.
        launch: What was asked for.

    Raises:
        InputError: ZeRO-3 cannot partition packed 4-bit weights. Under CPU offload DeepSpeed keeps
            only the gradients of a step's last backward pass, which for PPO is the value model's.
    """
    if name == "ppo" and launch.cpu_offload:
        raise InputError("PPO does not support launch.cpu_offload; set it to false")
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
        arguments["ddp_backend"] = backend(launch).get("backend")
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

"""What `config.launch` means: how many processes run, under which engine, and with what limits."""

import os
from typing import TYPE_CHECKING, Any

from spavl_lib.config import LaunchConfig
from spavl_lib.errors import InputError
from spavl_lib.machine import WORKER, cores, world_size

if TYPE_CHECKING:
    from torch import nn


def in_processes(launch: LaunchConfig) -> bool:
    """Whether training runs in child processes: in several, or in any number under DeepSpeed."""
    return launch.num_processes > 1 or launch.engine != "ddp"


def to_be_started(launch: LaunchConfig) -> bool:
    """Whether this process must start the others; false inside a child process."""
    return in_processes(launch) and WORKER not in os.environ


def local_processes() -> int:
    """Number of processes that this machine has devices for: its GPUs, or its cores without one."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else cores()


def local_accumulation(section: str, steps: int, launch: LaunchConfig) -> int:
    """Number of micro-batches that one process accumulates for an optimizer step.

    The profile's `gradient_accumulation_steps` are divided among the processes, so that a run on
    eight devices takes the same optimizer steps as a run on one.

    Args:
        section: Section of the config, such as "dpo".
        steps: The section's `gradient_accumulation_steps`.
        launch: Says how many processes there are.

    Raises:
        InputError: The number of processes does not divide the steps.
    """
    if steps % launch.num_processes:
        raise InputError(
            f"{section}.gradient_accumulation_steps = {steps} must be a multiple of "
            f"launch.num_processes = {launch.num_processes}, because an optimizer step has the "
            f"same size with any number of processes; set a multiple, and a smaller "
            f"{section}.per_device_batch_size"
        )
    return steps // launch.num_processes


def plain_cpu(launch: LaunchConfig) -> bool:
    """Whether accelerate gets its `cpu` flag. With the flag it would ignore DeepSpeed."""
    import torch

    return not torch.cuda.is_available() and launch.engine == "ddp"


def backend(launch: LaunchConfig) -> dict[str, str]:
    """The backend accelerate needs for DeepSpeed on the CPU; without it, it counts one process."""
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
            "model.adapter = qlora does not work under zero3, which cannot partition packed 4-bit "
            "weights; set launch.engine to zero2 or ddp"
        )


def launch_arguments(section: str, steps: int, launch: LaunchConfig) -> dict[str, Any]:
    """The fields of transformers' `TrainingArguments` that depend on `launch`.

    Make the arguments before the model: under ZeRO-3 they decide that the model is partitioned
    while it is loaded.

    Args:
        section: Section of the config, such as "dpo".
        steps: The section's `gradient_accumulation_steps`.
        launch: Number of processes and engine.
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
    """Check that the engine and the world size are those of the config.

    Launchers fall back to one process or to plain DDP without a message.

    Args:
        wrapped: The model as accelerate prepared it.
        launch: The requested engine and number of processes.

    Returns:
        `engine` and `world_size` of this run.

    Raises:
        RuntimeError: Another engine, ZeRO stage or number of processes is running.
    """
    import torch
    from torch.nn.parallel import DistributedDataParallel

    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if hasattr(wrapped, "zero_optimization_stage"):
        engine = f"zero{wrapped.zero_optimization_stage()}"
    elif isinstance(wrapped, DistributedDataParallel):
        engine = "ddp"
    else:
        engine = "none"
    requested = launch.engine if in_processes(launch) else "none"
    if size != launch.num_processes or world_size() != size or engine != requested:
        raise RuntimeError(
            f"expected engine {requested} in {launch.num_processes} processes, but {engine} runs "
            f"in {size}"
        )
    return {"engine": engine, "world_size": size}

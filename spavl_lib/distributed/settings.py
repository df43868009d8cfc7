"""What `config.launch` means: the number of processes, the engine, and each engine's limits."""

import os
from typing import TYPE_CHECKING, Any

from spavl_lib.config import LaunchConfig
from spavl_lib.errors import InputError
from spavl_lib.machine import WORKER, cores, world_size

if TYPE_CHECKING:
    from torch import nn


def in_processes(launch: LaunchConfig) -> bool:
    """Whether training runs in child processes: with several processes, or with DeepSpeed."""
    return launch.num_processes > 1 or launch.engine != "ddp"


def to_be_started(launch: LaunchConfig) -> bool:
    """Whether this process must start child processes; false inside a child process."""
    return in_processes(launch) and WORKER not in os.environ


def local_processes() -> int:
    """Number of processes that this machine can run: one per GPU, or per core without a GPU."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else cores()


def local_accumulation(section: str, steps: int, launch: LaunchConfig) -> int:
    """Number of micro-batches that one process accumulates for an optimizer step.

    The profile's `gradient_accumulation_steps` are divided among the processes. The effective batch
    size is therefore the same on eight devices as on one.

    Args:
        section: Section of the config, such as "dpo".
        steps: The section's `gradient_accumulation_steps`.
        launch: The settings with the number of processes.

    Raises:
        InputError: The number of processes does not divide the steps.
    """
    if steps % launch.num_processes:
        raise InputError(
            f"{section}.gradient_accumulation_steps = {steps} must be a multiple of "
            f"launch.num_processes = {launch.num_processes}, because the processes share its "
            f"steps; set a multiple, and lower {section}.per_device_batch_size in proportion"
        )
    return steps // launch.num_processes


def plain_cpu(launch: LaunchConfig) -> bool:
    """Whether accelerate gets its flag `cpu`. With the flag, accelerate would ignore DeepSpeed."""
    import torch

    return not torch.cuda.is_available() and launch.engine == "ddp"


def backend(launch: LaunchConfig) -> dict[str, str]:
    """The argument that names accelerate's backend for DeepSpeed on the CPU; otherwise empty.

    Without a backend, accelerate treats such a training as a single process.
    """
    import torch

    return {} if torch.cuda.is_available() or launch.engine == "ddp" else {"backend": "gloo"}


def check_supported(name: str, model_adapter: str, launch: LaunchConfig) -> None:
    """Raise if the engine does not support the stage or the adapter.

    Args:
        name: Stage.
        model_adapter: The setting `model.adapter`.
        launch: The requested engine and CPU offload.

    Raises:
        InputError: The settings combine PPO and CPU offload. DeepSpeed would then keep only the
            gradients of a step's last backward pass, which are the value model's, and lose the
            policy's gradients. Or the settings combine qlora and ZeRO-3, which cannot partition
            packed 4-bit weights.
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

    Make the training arguments before the model: under ZeRO-3 they cause the model to be
    partitioned while it is loaded.

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
        # In a micro-batch without images the projector gets no gradient, which DDP must expect.
        arguments |= {"ddp_timeout": launch.timeout_s, "ddp_find_unused_parameters": True}
        arguments["ddp_backend"] = backend(launch).get("backend")
    return arguments


def check_engine(wrapped: "nn.Module", launch: LaunchConfig) -> dict[str, Any]:
    """Check that the running engine and number of processes are those of the config.

    accelerate can fall back to one process or to plain DDP without a message.

    Args:
        wrapped: The model as accelerate prepared it.
        launch: The requested engine and number of processes.

    Returns:
        `engine` and `world_size` (number of processes) of this run.

    Raises:
        RuntimeError: The running engine, ZeRO stage or number of processes is not as requested.
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

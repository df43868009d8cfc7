"""This machine and this process: devices, memory, cores, and the process's rank."""

import contextlib
import os
import platform
import re
import resource
import sys
from pathlib import Path

import psutil

GIB = 2**30
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # "max", or the container's limit in bytes


def gpus() -> list[tuple[str, int]]:
    """Name and memory in bytes of each CUDA GPU."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    properties = [torch.cuda.get_device_properties(i) for i in range(count)]
    return [(gpu.name, gpu.total_memory) for gpu in properties]


def memory_bytes() -> int:
    """Bytes of memory this process may use: the machine's, or its container's if that is less."""
    total = psutil.virtual_memory().total
    limit = CGROUP_LIMIT.read_text(encoding="utf-8").strip() if CGROUP_LIMIT.is_file() else ""
    return min(total, int(limit)) if limit.isdigit() else total


def cores() -> int:
    """Number of cores this process may use."""
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):  # not on macOS
        return len(process.cpu_affinity())
    return psutil.cpu_count() or 1


def device_kind() -> str:
    """The planner's name of this machine's first GPU, or cpu. An unknown GPU is named by size."""
    present = gpus()
    if not present:
        return "cpu"
    name, memory = present[0][0].lower(), present[0][1] / GIB
    for kind in ("h200", "h100", "t4", "l4"):
        if kind in name:
            return kind
    return "a100-80" if memory > 60 else "a100-40" if memory > 30 else "l4" if memory > 18 else "t4"


WORKER = "SPAVL_WORKER"  # set in every process of a training: the folder where ranks report


# What accelerate, torchrun, MPI and their like set for the processes that they start. accelerate
# and transformers read them, so they would change the precision, or wait for other processes.
_OF_LAUNCHERS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|FORK_LAUNCHED"
    r"|(ACCELERATE|FSDP|PARALLELISM_CONFIG|MEGATRON_LM|TORCHELASTIC|PMI|MV2_COMM_WORLD"
    r"|OMPI_COMM_WORLD)_\w+"
)
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE")


def launcher_variables() -> tuple[list[str], int]:
    """Environment variables that another launcher has set, and how many processes it started."""
    if WORKER in os.environ:
        return [], world_size()
    sizes = [os.environ.get(name, "") for name in _SIZES]
    started = max([1, *(int(size) for size in sizes if size.isdecimal())])
    return sorted(filter(_OF_LAUNCHERS.fullmatch, os.environ)), started


def rank() -> int:
    """This process's number among those that train together. Process 0 writes the run folder."""
    return int(os.environ.get("RANK", 0)) if WORKER in os.environ else 0


def world_size() -> int:
    """Number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", 1)) if WORKER in os.environ else 1


def is_main() -> bool:
    """Whether this process writes the run folder."""
    return rank() == 0


def reset_peak_memory() -> None:
    """Start measuring peak memory anew, if the system allows it (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_gib() -> float:
    """Peak resident memory of this process in GiB, on Linux since the last reset."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 2**20
    scale = 2**30 if sys.platform == "darwin" else 2**20  # macOS reports bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def device_name() -> str:
    """The accelerator's name, or the CPU's with its number of cores."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"

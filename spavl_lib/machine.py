"""Devices, memory and cores of this machine, and the rank of this process."""

import contextlib
import os
import platform
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
    """Bytes of memory that this process may use: the machine's memory, or the container's limit."""
    total = psutil.virtual_memory().total
    limit = CGROUP_LIMIT.read_text(encoding="utf-8").strip() if CGROUP_LIMIT.is_file() else ""
    return min(total, int(limit)) if limit.isdigit() else total


def cores() -> int:
    """Number of cores that this process may use."""
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):  # not on macOS
        return len(process.cpu_affinity())
    return psutil.cpu_count() or 1


def device_kind() -> str:
    """The planner's name of this machine's first GPU; cpu if there is none.

    An unknown GPU gets the name of a known one with about the same memory.
    """
    present = gpus()
    if not present:
        return "cpu"
    name, memory = present[0][0].lower(), present[0][1] / GIB
    for kind in ("h200", "h100", "t4", "l4"):
        if kind in name:
            return kind
    return "a100-80" if memory > 60 else "a100-40" if memory > 30 else "l4" if memory > 18 else "t4"


# Environment variable of every child process of a training: the folder for the process's reports.
WORKER = "SPAVL_WORKER"


def rank() -> int:
    """Rank of this process among those that train together. Rank 0 writes the run folder."""
    return int(os.environ.get("RANK", 0)) if WORKER in os.environ else 0


def world_size() -> int:
    """Number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", 1)) if WORKER in os.environ else 1


def is_main() -> bool:
    """Whether this process writes the run folder."""
    return rank() == 0


def reset_peak_memory() -> None:
    """Start a new measurement of peak memory, if the system allows it, as Linux does."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_gib() -> float:
    """Peak resident memory of this process in GiB: on Linux since the last reset, else in all."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 2**20
    scale = 2**30 if sys.platform == "darwin" else 2**20  # macOS reports bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def device_name() -> str:
    """Number and name of the GPUs; without a GPU, the CPU's architecture and number of cores."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"

"""This machine and this process: devices, memory, cores, and the process's rank."""

import contextlib
import os
import platform
import resource
import sys
from pathlib import Path

GIB = 2**30


def gpus() -> list[tuple[str, int]]:
    """Name and bytes of each CUDA GPU."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [torch.cuda.get_device_properties(i) for i in range(count)]
    return [(gpu.name, gpu.total_memory) for gpu in found]


def memory_bytes() -> int:
    """Bytes this process may use: the machine's, or its container's if less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.is_file() else ""
    return min(total, int(text)) if text.isdigit() else total


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_kind() -> str:
    """This machine's GPU as the planner names it, or cpu."""
    found = gpus()
    if not found:
        return "cpu"
    name, memory = found[0][0].lower(), found[0][1] / GIB
    for kind in ("h200", "h100", "t4", "l4"):
        if kind in name:
            return kind
    return "a100-80" if memory > 60 else "a100-40" if memory > 30 else "l4" if memory > 18 else "t4"


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


def reset_peak_memory() -> None:
    """Begin the peak anew, where the system allows it (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_gib() -> float:
    """Peak resident memory of this process since the last reset, in GiB."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 2**20
    scale = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def device_name() -> str:
    """The accelerator's name, or the CPU's with its core count."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"

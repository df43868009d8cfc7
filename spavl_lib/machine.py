"""Devices, precision, memory and cores of this machine, and the rank of this process."""

import contextlib
import gc
import math
import os
import platform
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, cast

import psutil

from spavl_lib.errors import InputError

GIB = 2**30
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
Dtype = Literal["", "bf16", "fp16", "fp32"]  # empty: none chosen
# Precision of matrix products: its name in settings and manifests -> its name in torch.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# Environment variable with one of `DTYPES`. If it is unset or empty, the hardware decides.
DTYPE = "SPAVL_DTYPE"


def gpus() -> list[tuple[str, int]]:
    """Name and memory in bytes of each CUDA GPU."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    properties = [torch.cuda.get_device_properties(i) for i in range(count)]
    return [(gpu.name, gpu.total_memory) for gpu in properties]


def asked_dtype() -> Dtype:
    """The precision in `$SPAVL_DTYPE`, one of `DTYPES`; empty if it is not set.

    Raises:
        InputError: The variable is set to something else.
    """
    asked = os.environ.get(DTYPE, "")
    if asked and asked not in DTYPES:
        raise InputError(f"${DTYPE} is {asked!r}; set it to one of {', '.join(DTYPES)}")
    return cast(Dtype, asked)


def dtype_name() -> Dtype:
    """The precision that models compute in: `$SPAVL_DTYPE`, or the best one for the hardware.

    Returns:
        One of `DTYPES`. If $SPAVL_DTYPE is not set: bf16 on a GPU that supports it, fp16 on another
        GPU, fp32 on the CPU.

    Raises:
        InputError: `$SPAVL_DTYPE` is not one of `DTYPES`.
    """
    if asked := asked_dtype():
        return asked
    import torch

    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


@contextlib.contextmanager
def computing_in(name: str) -> Iterator[None]:
    """Let models compute in a given precision in this block, and in processes started there.

    Args:
        name: One of `DTYPES`; empty to change nothing.
    """
    before = os.environ.get(DTYPE)
    if name:
        os.environ[DTYPE] = name
    try:
        yield
    finally:
        if name and before is None:
            del os.environ[DTYPE]
        elif name:
            os.environ[DTYPE] = str(before)


def use_threads(number: int) -> None:
    """Let this process compute with this number of threads on the CPU; 0 changes nothing."""
    if number:
        import torch

        torch.set_num_threads(number)


class Limits(NamedTuple):
    """What this process may use of the machine."""

    memory: int
    """Bytes."""
    cores: int


def limits() -> Limits:
    """Memory and cores of the machine, or less if a container or an affinity mask allows less.

    A container's control group can limit memory and cores, and so can each of its parent groups.
    The lowest limit counts. Version 2 of control groups has `memory.max` and `cpu.max`; version 1
    has a tree for each controller.
    """
    memory = psutil.virtual_memory().total
    process = psutil.Process()
    # There is no affinity on macOS.
    free = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count()
    share = float(free or 1)
    for folder in _cgroup_folders():
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _words(folder / name)
            if limit and limit[0].isdigit():
                memory = min(memory, int(limit[0]))
        quota = _words(folder / "cpu.max")
        if not quota:
            quota = _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        if len(quota) == 2 and all(word.isdigit() for word in quota) and int(quota[1]):
            share = min(share, int(quota[0]) / int(quota[1]))
    # A fraction of a core is dropped. With 2.5 cores, a third thread would run only half of the
    # time, and the other two would wait for it.
    return Limits(memory, max(1, math.floor(share)))


def _cgroup_folders() -> list[Path]:
    """Folders of this process's control groups and of their parent groups.

    Inside a container, the container's own group is mounted at /sys/fs/cgroup. The path that
    /proc/self/cgroup names may then not exist there.
    """
    folders = [CGROUPS, CGROUPS / "memory", CGROUPS / "cpu", CGROUPS / "cpu,cpuacct"]
    with contextlib.suppress(OSError):
        for line in OWN_CGROUPS.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            place = Path(path.lstrip("/"))
            for group in (place, *place.parents):
                folders.append(CGROUPS / controllers / group)
    return list(dict.fromkeys(folders))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError):
        return []


def memory_bytes() -> int:
    """Bytes of memory that this process may use: the machine's memory, or the container's limit."""
    return limits().memory


def cores() -> int:
    """Number of cores that this process may use."""
    return limits().cores


def device_kind() -> str:
    """The planner's name of this machine's first GPU; `cpu` if there is no GPU.

    An unknown GPU gets the name of a known GPU with about the same memory.
    """
    present = gpus()
    if not present:
        return "cpu"
    name, memory = present[0][0].lower(), present[0][1] / GIB
    words = re.split(r"[^a-z0-9]+", name)  # an L40 is no L4
    for kind in ("h200", "h100", "t4", "l4", "a10"):
        if kind in words:
            return kind
    for number in ("3090", "4090"):
        if number in words:
            return f"rtx{number}"
    return "a100-80" if memory > 60 else "a100-40" if memory > 30 else "l4" if memory > 18 else "t4"


# Environment variable that every child process of a training has. It names the folder in which the
# process writes its reports.
WORKER = "SPAVL_WORKER"


# Environment variables that launchers such as accelerate, torchrun and MPI set for the processes
# that they start. accelerate and transformers read these variables, and would change the precision
# or wait for other processes.
_OF_LAUNCHERS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|FORK_LAUNCHED"
    r"|(ACCELERATE|FSDP|PARALLELISM_CONFIG|MEGATRON_LM|TORCHELASTIC|PMI|MV2_COMM_WORLD"
    r"|OMPI_COMM_WORLD)_\w+"
)
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE")


def launcher_variables() -> tuple[list[str], int]:
    """Environment variables that another launcher set, and how many processes it started.

    In a process that `distributed.launcher` started, the list is empty, and the number is
    `world_size()`.
    """
    if WORKER in os.environ:
        return [], world_size()
    sizes = [os.environ.get(name, "") for name in _SIZES]
    started = max([1, *(int(size) for size in sizes if size.isdecimal())])
    return sorted(filter(_OF_LAUNCHERS.fullmatch, os.environ)), started


def rank() -> int:
    """Rank of this process among those that train together. Rank 0 writes the run folder."""
    return int(os.environ.get("RANK", 0)) if WORKER in os.environ else 0


def world_size() -> int:
    """Number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", 1)) if WORKER in os.environ else 1


def is_main() -> bool:
    """Whether this process writes the run folder."""
    return rank() == 0


def on_gpu() -> bool:
    """Whether this process has used a CUDA GPU. The call does not initialise CUDA."""
    torch = sys.modules.get("torch")
    return bool(torch and torch.cuda.is_available() and torch.cuda.is_initialized())


def free_memory() -> None:
    """Free unreachable cycles of objects, and blocks that the GPU's allocator no longer uses.

    Trainers and models refer to one another, so deleting a name frees nothing by itself.
    """
    gc.collect()
    if on_gpu():
        sys.modules["torch"].cuda.empty_cache()


def reset_peak_memory() -> None:
    """Start a new measurement of peak memory on the GPUs, and on Linux also for the process."""
    if on_gpu():
        cuda = sys.modules["torch"].cuda
        for index in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(index)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_gib() -> float:
    """Peak memory in GiB since the last reset, of the GPU with the highest peak or of this process.

    If this process has used a GPU, tensors count (`torch.cuda.max_memory_allocated`). Otherwise the
    resident memory of the process counts; on systems other than Linux, its peak is measured since
    the process started.
    """
    if on_gpu():
        cuda = sys.modules["torch"].cuda
        if peak := max(cuda.max_memory_allocated(i) for i in range(cuda.device_count())):
            return peak / GIB
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 2**20
    scale = 2**30 if sys.platform == "darwin" else 2**20  # macOS reports bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def device_name() -> str:
    """Number and name of the GPUs; without a GPU, the CPU's architecture and its usable cores."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"cpu ({platform.machine()}, {cores()} cores)"

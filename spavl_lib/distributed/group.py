"""Collectives: training processes reduce or gather values together, or wait for each other.

All processes must call a collective. If one process does not, the others wait for up to
`launch.timeout_s`. In a single process every function returns the result for one process at once.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spavl_lib.config import LaunchConfig
from spavl_lib.distributed.settings import backend, in_processes, plain_cpu
from spavl_lib.machine import WORKER, is_main, world_size

if TYPE_CHECKING:
    from torch import Tensor


def join(launch: LaunchConfig) -> None:
    """Make this process a member of the process group; does nothing in a single process."""
    if not in_processes(launch):
        return
    import datetime

    from accelerate import PartialState

    limit = datetime.timedelta(seconds=launch.timeout_s)
    PartialState(cpu=plain_cpu(launch), timeout=limit, **backend(launch))


def _device() -> Any:
    """The device on which the backend of the process group needs its tensors."""
    import torch

    backend = str(torch.distributed.get_backend())
    if "nccl" in backend:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _has_group() -> bool:
    import torch

    return world_size() > 1 and torch.distributed.is_initialized()


def barrier() -> None:
    """Wait until every process has reached this call."""
    any_of(False)


def any_of(flag: bool) -> bool:
    """Logical or over all processes: whether the flag is true in any of them."""
    if not _has_group():
        return flag
    import torch

    highest = torch.tensor([int(flag)], device=_device())
    torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
    return bool(highest.item())


def any_of_each(flags: "Tensor") -> "Tensor":
    """`any_of` for each element of a boolean tensor, which has the same shape in all processes."""
    if not _has_group():
        return flags
    import torch

    highest = flags.to(_device(), torch.int32)
    torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
    return highest.bool().cpu()


def sum_of(values: "Tensor") -> "Tensor":
    """The sum of a tensor over all processes. The tensor has the same shape in all processes."""
    if not _has_group():
        return values
    import torch

    total = values.detach().to(_device()).clone()
    torch.distributed.all_reduce(total)
    return total.to(values.device)


def mean_of(values: dict[str, float]) -> dict[str, float]:
    """The mean of each value over all processes. All processes must pass the same keys."""
    if not _has_group() or not values:
        return values
    import torch

    names = sorted(values)
    sums = torch.tensor([values[n] for n in names], dtype=torch.float32, device=_device())
    torch.distributed.all_reduce(sums)
    return dict(zip(names, (sums / world_size()).tolist(), strict=True))


def gathered(rows: list) -> list[list]:
    """The rows of all processes: one list for each rank, in the order of ranks."""
    if not _has_group():
        return [rows]
    import torch

    parts: list = [None] * world_size()
    torch.distributed.all_gather_object(parts, rows)
    return parts


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Run the block in the main process first. The others then find what the block has cached."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


def report(name: str, value: dict) -> None:
    """Write a report that the parent process reads.

    Any process writes a report whose name begins with `rank-`. Only the main process writes other
    reports. Outside of worker processes nothing is written.

    Args:
        name: Name of the report's file without ending, such as `progress` or `rank-0`.
        value: What to report, in types that JSON has.
    """
    if WORKER in os.environ and (is_main() or name.startswith("rank-")):
        target = Path(os.environ[WORKER]) / f"{name}.json"
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        temporary.write_text(json.dumps(value), encoding="utf-8")
        temporary.replace(target)

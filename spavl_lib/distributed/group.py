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
from spavl_lib.distributed.settings import backend, in_processes, plain_cpu
from spavl_lib.machine import WORKER, is_main, world_size

if TYPE_CHECKING:
    from torch import Tensor


def join(launch: LaunchConfig) -> None:
    """Meet the other processes of a child's group."""
    if not in_processes(launch):
        return
    import datetime

    from accelerate import PartialState

    limit = datetime.timedelta(seconds=launch.timeout_s)
    PartialState(cpu=plain_cpu(launch), timeout=limit, **backend(launch))


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


# --- parameters that ZeRO-3 holds in pieces -----------------------------------------------------

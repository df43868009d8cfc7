"""Compute two things at the same time, where that cannot change a number.

PPO's policy and value model of full fine-tuning share no module. On a CPU with one thread for each
operation, a second Python thread can compute one of them while the first computes the other. The
operations and their order within a model stay the same, so in fp32 every result is equal to the
last bit. In 16 bits autocast keeps one cache of weights for all threads, so there the two run one
after another.
"""

import concurrent.futures
import functools
from collections.abc import Callable
from typing import TypeVar

import torch

from spavl_lib import machine
from spavl_lib.modelling.load import compute_dtype, device

A = TypeVar("A")
B = TypeVar("B")


class SideBySide:
    """Calls two functions, in two threads where the conditions below hold.

    The conditions are: `allowed`, fp32, a CPU, a single process, more than one core, and one thread
    for each operation (`launch.num_threads: 1`). With more threads, operations already use the
    cores.

    Args:
        allowed: Whether the functions of all calls share no module and no other state.
    """

    def __init__(self, allowed: bool):
        self.allowed = allowed

    @property
    def works(self) -> bool:
        """Whether all conditions hold now."""
        return (
            self.allowed
            and compute_dtype() == torch.float32
            and device().type == "cpu"
            and machine.world_size() == 1
            and torch.get_num_threads() == 1
            and machine.cores() > 1
        )

    def __call__(self, first: Callable[[], A], second: Callable[[], B]) -> tuple[A, B]:
        """Call both functions and return both results.

        Args:
            first: Called in this thread.
            second: Called in the other thread, or after `first`. A new thread records gradients and
                has no autocast, whatever this thread does.

        Raises:
            BaseException: What `first` raised, or else what `second` raised.
        """
        if not self.works:
            return first(), second()
        other = _other_thread().submit(second)
        try:
            result = first()
        finally:
            concurrent.futures.wait([other])
        return result, other.result()


@functools.cache
def _other_thread() -> concurrent.futures.ThreadPoolExecutor:
    # The number of threads of an operation is a property of the thread that calls it.
    return concurrent.futures.ThreadPoolExecutor(
        1, "second-role", initializer=torch.set_num_threads, initargs=(1,)
    )

"""How PPO divides its rows into batches.

A row is an index into a rollout. There are three levels:

    rollout       the prompts of one step, over all processes
    minibatch     the rows of one optimizer step, over all processes
    micro-batch   the rows that one device runs at once; micro-batches' gradients are summed

The order of rows depends only on the run's seed and on how far the run is, so a resumed run gets
the same batches.
"""

import itertools
import random
from collections.abc import Hashable, Iterable, Sequence

from spavl_lib import machine
from spavl_lib.data.grouping import image_groups


def rollout_rows(
    image_names: Sequence[str], step: int, size: int, seed: int, *, by_image: bool
) -> list[int]:
    """Choose the training rows whose prompts are rolled out in a step.

    Successive steps go through all training rows again and again. Each pass has a different order
    and contains every row once.

    Args:
        image_names: Image name of every training row. Empty for a row without an image.
        step: Number of the step, from 0.
        size: Number of prompts in a rollout.
        seed: Seed of the run.
        by_image: Whether rows with the same image are adjacent.

    Returns:
        `size` indices of training rows.
    """
    places = [divmod(n, len(image_names)) for n in range(step * size, (step + 1) * size)]
    orders = {
        epoch: flatten(shuffled_groups(image_names, f"{seed}/prompts/{epoch}", by_image=by_image))
        for epoch in {epoch for epoch, _ in places}
    }
    return [orders[epoch][offset] for epoch, offset in places]


def minibatches(images: Sequence[str], count: int, seed: int, *, by_image: bool) -> list[list[int]]:
    """Divide a rollout into `count` minibatches, in a seeded order.

    Args:
        images: Image digest of every row. Empty for a row without an image.
        count: Number of minibatches, at most the number of rows.
        seed: Seed of this pass over the rollout.
        by_image: Whether rows with the same image stay in one minibatch. This setting has no effect
            if there are fewer groups of such rows than minibatches.

    Returns:
        Rows of each minibatch. Every row is in exactly one minibatch.
    """
    groups = shuffled_groups(images, seed, by_image=by_image)
    if len(groups) < count:
        groups = [[row] for row in flatten(groups)]
    return [flatten(groups[n::count]) for n in range(count)]


def shuffled_groups(images: Sequence[str], seed: int | str, *, by_image: bool) -> list[list[int]]:
    """Group the rows, and shuffle the groups.

    Args:
        images: Image name or digest of each row. Empty for a row without an image.
        seed: Random seed.
        by_image: Whether rows with the same image form a group. If False, each row is a group.
    """
    groups = image_groups(images if by_image else [""] * len(images))
    random.Random(seed).shuffle(groups)
    return groups


def micro_batches(lengths: list[int], images: list[str], size: int) -> list[list[int]]:
    """Divide rows into micro-batches of rows with similar lengths.

    Rows with the same image are adjacent.

    The longest rows come first, so that a device with too little memory fails at once.

    Args:
        lengths: Number of tokens of each row, prompt and response together.
        images: Image digest of each row. Empty for a row without an image.
        size: Number of rows in a micro-batch. The last micro-batch may be smaller.
    """
    groups: dict[Hashable, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        groups.setdefault(images[row] or row, []).append(row)
    order = flatten(groups.values())
    return [order[start : start + size] for start in range(0, len(order), size)]


def turns(batches: Sequence[list[int]]) -> int:
    """Return the number of batches that each process gets, if processes take batches in turn."""
    return -(-len(batches) // machine.world_size())


def own_batches(batches: list[list[int]]) -> list[list[int]]:
    """Return this process's share of the batches. An empty batch fills up a share that is short."""
    places = range(machine.rank(), turns(batches) * machine.world_size(), machine.world_size())
    return [batches[place] if place < len(batches) else [] for place in places]


def own_batches_in_step(batches: list[list[int]]) -> list[tuple[list[int], int]]:
    """Return this process's share of the batches, each with a weight of 1 or 0.

    Under ZeRO every process must call the model equally often. A process with too few batches
    therefore also gets the last batch, with weight 0.
    """
    return [(rows or batches[-1], int(bool(rows))) for rows in own_batches(batches)]


def flatten(groups: Iterable[list[int]]) -> list[int]:
    """Join groups of rows into one list."""
    return list(itertools.chain.from_iterable(groups))

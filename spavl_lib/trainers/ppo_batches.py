"""Which rows PPO puts into which batch.

A row is an index into a rollout. A step's rows are divided three times:

    rollout       the prompts of one step, over all processes
    minibatch     the rows of one optimizer step
    micro-batch   the rows that one device runs at once; their gradients are summed

Every order follows from the run's seed alone, so a resumed run sees the same batches.
"""

import itertools
import random
from collections.abc import Hashable, Iterable, Sequence

from spavl_lib import machine
from spavl_lib.data.grouping import image_groups


def rollout_rows(
    image_names: Sequence[str], step: int, size: int, seed: int, *, by_image: bool
) -> list[int]:
    """Choose the training rows whose prompts a step rolls out.

    The rows are passed over again and again, each pass in an order of its own; none is left out.

    Args:
        image_names: Image name of every training row, empty for a row without an image.
        step: Number of the step, from 0.
        size: Prompts of a rollout.
        seed: Seed of the run.
        by_image: Whether the rows of one image stand together.

    Returns:
        `size` indices of training rows.
    """
    places = [divmod(n, len(image_names)) for n in range(step * size, (step + 1) * size)]
    orders = {
        epoch: flatten(shuffled_groups(image_names, f"{seed}/prompts/{epoch}", by_image=by_image))
        for epoch, _ in places
    }
    return [orders[epoch][offset] for epoch, offset in places]


def minibatches(images: Sequence[str], count: int, seed: int, *, by_image: bool) -> list[list[int]]:
    """Divide a rollout into `count` minibatches, in a seeded order.

    Args:
        images: Digest of the image of every row, empty for a row without one.
        count: Number of minibatches, at most the number of rows.
        seed: Seed of this pass over the rollout.
        by_image: Whether the rows of one image stay in one minibatch. With fewer images than
            minibatches they do not.

    Returns:
        Rows of each minibatch. Every row is in exactly one.
    """
    groups = shuffled_groups(images, seed, by_image=by_image)
    if len(groups) < count:
        groups = [[row] for row in flatten(groups)]
    return [flatten(groups[n::count]) for n in range(count)]


def shuffled_groups(images: Sequence[str], seed: int | str, *, by_image: bool) -> list[list[int]]:
    """Group rows by image, or leave each alone, and shuffle the groups.

    Args:
        images: The image name of each row.
        seed: Random seed.
        by_image: Whether rows with one image stay together.
    """
    groups = image_groups(images if by_image else [""] * len(images))
    random.Random(seed).shuffle(groups)
    return groups


def micro_batches(lengths: list[int], images: list[str], size: int) -> list[list[int]]:
    """Divide rows into batches that fit the device: similar lengths, equal images side by side.

    The longest rows come first, so that a device with too little memory fails at once.

    Args:
        lengths: Tokens of each row, prompt and answer.
        images: Digest of the image of each row, empty for a row without one.
        size: Rows of a batch; the last may be smaller.
    """
    groups: dict[Hashable, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        groups.setdefault(images[row] or row, []).append(row)
    order = flatten(groups.values())
    return [order[start : start + size] for start in range(0, len(order), size)]


def turns(batches: Sequence[list[int]]) -> int:
    """How many batches each process runs, if the processes take them in turn."""
    return -(-len(batches) // machine.world_size())


def own_batches(batches: list[list[int]]) -> list[list[int]]:
    """This process's share of the batches; empty ones make every share equally long."""
    places = range(machine.rank(), turns(batches) * machine.world_size(), machine.world_size())
    return [batches[place] if place < len(batches) else [] for place in places]


def own_batches_in_step(batches: list[list[int]]) -> list[tuple[list[int], int]]:
    """This process's share of the batches, each with its weight 1 or 0.

    Under ZeRO every process must call the model equally often, so a process that has too few
    batches repeats the last one with weight 0.
    """
    return [(rows or batches[-1], int(bool(rows))) for rows in own_batches(batches)]


def flatten(groups: Iterable[list[int]]) -> list[int]:
    """Join groups of rows into one list."""
    return list(itertools.chain.from_iterable(groups))

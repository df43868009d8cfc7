"""An order that keeps the rows of an image together, so that a batch computes the image once."""

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

# Number of waiting groups that are searched for one that fits into the rest of a batch. If none
# fits, the first waiting group is split.
LOOK_AHEAD = 64


def image_groups(names: Sequence[str]) -> list[list[int]]:
    """Row indices by image, in order of appearance. A row without a name is a group by itself."""
    groups: dict[object, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(name or index, []).append(index)
    return list(groups.values())


class ImageGroupedSampler(Sampler[int]):
    """Yields row indices in a shuffled order that keeps the rows of an image together.

    Each row comes once per epoch. The order depends only on seed and epoch, so a resumed run
    continues with the same order.
    """

    def __init__(self, names: Sequence[str], batch_size: int, seed: int):
        self.groups = image_groups(names)
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        self.size = len(names)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        waiting = deque(
            [self.groups[i][j] for j in rng.permutation(len(self.groups[i]))]
            for i in rng.permutation(len(self.groups))
        )
        while waiting:
            yield from self._batch(waiting)

    def _batch(self, waiting: deque[list[int]]) -> list[int]:
        """The next `batch_size` rows, or all remaining rows.

        Adds the first of the next `LOOK_AHEAD` groups that fits into the rest of the batch. If none
        of them fits, splits the first group.
        """
        batch: list[int] = []
        while waiting and len(batch) < self.batch_size:
            room = self.batch_size - len(batch)
            ahead = range(min(LOOK_AHEAD, len(waiting)))
            fitting = next((i for i in ahead if len(waiting[i]) <= room), None)
            if fitting is None:
                batch += waiting[0][:room]
                waiting[0] = waiting[0][room:]
            else:
                batch += waiting[fitting]
                del waiting[fitting]
        return batch

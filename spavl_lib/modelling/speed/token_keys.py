"""Integer keys of tokens: tokens with different keys are not computed together.

Equal keys are only a guess, because a key is a hash of what the text model gets for a token.
`equal_rows` then compares the tokens that would be computed together, bit by bit.
"""

import functools
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def hash_rows(values: Tensor) -> Tensor:
    """A hash of the bits of every row.

    Args:
        values: (..., width), any dtype.

    Returns:
        (...), int64: the sum of the row's 64-bit words, each multiplied by an odd number that
        depends on the word's place.
    """
    words = _words(values)
    return (words.to(torch.int64) * _factors(words.shape[-1], words.device)).sum(-1)


def equal_rows(values: Tensor, one: Tensor, other: Tensor) -> bool:
    """Whether two selections of rows are equal bit by bit.

    Args:
        values: (rows, ...), any dtype.
        one: Indices of the first selection (count,).
        other: Indices of the second selection (count,).
    """
    words = _words(values.flatten(1))
    return torch.equal(words.index_select(0, one), words.index_select(0, other))


def _words(values: Tensor) -> Tensor:
    """The bits of (..., width) as the widest integers into which a row divides."""
    size = values.element_size()
    word = 8 if values.shape[-1] * size % 8 == 0 else size
    return values.detach().contiguous().view(INTEGERS[word])


@functools.lru_cache(maxsize=16)
def _factors(count: int, device: torch.device) -> Tensor:
    """Odd random numbers (count,), int64."""
    chance = torch.Generator().manual_seed(7)
    numbers = torch.randint(-(1 << 62), 1 << 62, (count,), generator=chance)
    return (numbers | 1).to(device)


def mix(numbers: Iterable[np.ndarray]) -> np.ndarray:
    """One hash of several arrays, element by element.

    Args:
        numbers: Arrays of one shape, int64.
    """
    mixed: np.ndarray = np.uint64(0)  # type: ignore[assignment]
    for array in numbers:
        mixed = (mixed ^ array.view(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = mixed ^ (mixed >> np.uint64(29))
    return mixed.view(np.int64)


def close_blocks(keys: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Make the keys of tokens that see each other depend on all of them.

    Two rows then have such a block in common completely or not at all.

    Args:
        keys: Keys of a row (tokens,), int64.
        reach: For each token the index of the last token that it attends to (tokens,).

    Returns:
        Keys (tokens,). Those of tokens to which no earlier token attends are unchanged.
    """
    places = np.arange(len(keys))
    farthest = np.maximum.accumulate(np.maximum(reach, places))
    closed = keys.copy()
    start = 0
    for end in np.flatnonzero(farthest == places).tolist():
        if end > start:
            block = slice(start, end + 1)
            whole = np.full(end + 1 - start, hash(keys[block].tobytes()), np.int64)
            closed[block] = mix([whole, keys[block]])
        start = end + 1
    return closed

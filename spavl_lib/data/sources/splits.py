"""Choose the rows of the user's own data to train on, and the rows to hold out.

Splits are named as in the `datasets` library: `train`, `train[:50%]`, `train+extra`. If the data
have no held-out split, about a tenth of the training rows is held out, with all rows of an image
together. A row that is held out is never a training row.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence

from datasets import ReadInstruction

from spavl_lib.errors import InputError

HELD_OUT_SHARE = 0.1
# If the data lack this split, it is drawn from the training rows. No other split is drawn.
DEFAULT_HELD_OUT = "validation"
Rows = list[tuple[str, int]]  # (split, row number in the split)


def names_in(instruction: str) -> list[str]:
    """Names of the splits in a setting such as `train[:50%]+extra`."""
    return [re.split(r"[\[(]", part)[0].strip() for part in instruction.split("+")]


def rows_of(instruction: str, sizes: Mapping[str, int], field: str) -> Rows:
    """The rows that a setting such as `train[:50%]` names.

    Args:
        instruction: The setting.
        sizes: Number of rows of each split.
        field: Name of the setting, for the message.

    Raises:
        InputError: The setting cannot be read, names no row, or names a row twice.
    """
    try:
        parts = ReadInstruction.from_spec(instruction).to_absolute(dict(sizes))
    except (ValueError, AssertionError, AttributeError) as error:
        raise InputError(f"{field} = {instruction!r}: {error}") from error
    rows = [(part.splitname, index) for part in parts for index in range(part.from_, part.to)]
    if not rows:
        raise InputError(f"{field} = {instruction!r} names none of the rows ({dict(sizes)})")
    if len(set(rows)) < len(rows):
        raise InputError(f"{field} = {instruction!r} names {len(rows) - len(set(rows))} rows twice")
    return rows


def connected(keys: Sequence[Sequence[str]]) -> list[str]:
    """One group for all rows that are linked by common keys.

    Args:
        keys: The keys of each row, such as the hashes of its images; at least one.

    Returns:
        For each row a key that all rows of its group have; without shared rows its only key.
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    for first, *others in keys:
        for other in others:
            parent[root(other)] = root(first)
    return [root(of_row[0]) for of_row in keys]


def hold_out(keys: Sequence[str], seed: int) -> set[int]:
    """Choose the rows to hold out: about a tenth of the rows, at least one, and never all.

    Either all rows of a group are held out, or none of them.

    Args:
        keys: The group of each row, such as the hash of its image.
        seed: Seed of the draw.

    Returns:
        Numbers of the rows to hold out; empty if all rows are of one group.
    """
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    if len(groups) < 2:
        return set()
    order = sorted(groups, key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())
    wanted, held = max(1, round(HELD_OUT_SHARE * len(keys))), set[int]()
    for key in order:
        if len(held) + len(groups[key]) <= wanted:
            held |= set(groups[key])
    return held or set(groups[min(order, key=lambda key: len(groups[key]))])

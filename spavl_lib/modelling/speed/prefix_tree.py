"""Rows that begin alike, as a tree: every common beginning stands once in one packed row.

    USER: <image> Q1 A        [USER: <image>| Q1 | A | B | Q2 | C ]
    USER: <image> Q1 B   ->    a packed row; a segment sees itself and its ancestors only
    USER: <image> Q2 C

This module knows numbers, not models: a row is an array of keys, one a token, equal where two
tokens are the same thing.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A run of tokens that the same set of rows has in common."""

    start: int
    """Place of its first token in the packed row."""
    length: int
    """Tokens."""
    depth: int
    """Position of its first token along its branch: tokens above it."""
    ancestors: tuple[int, ...]
    """Segments above it, root first, by index."""

    @property
    def stop(self) -> int:
        """Place after its last token in the packed row."""
        return self.start + self.length


@dataclass(frozen=True)
class PrefixTree:
    """How rows of tokens lie in one packed row."""

    segments: tuple[Segment, ...]
    """Every segment after its ancestors."""
    sources: np.ndarray
    """(packed, 2): a row that has this token, and where in that row (padding not counted)."""
    positions: np.ndarray
    """(packed,): position along the branch, which is the position in every row that has it."""
    places: tuple[np.ndarray, ...]
    """By row: where each of its tokens stands in the packed row."""

    @property
    def size(self) -> int:
        """Packed tokens."""
        return len(self.positions)

    @property
    def rows_size(self) -> int:
        """Tokens of all rows, padding not counted."""
        return sum(map(len, self.places))

    def scored_pairs(self) -> int:
        """Query-key pairs that attention has to score."""
        return sum(s.length * s.depth + s.length * (s.length + 1) // 2 for s in self.segments)

    def allowed(self) -> Tensor:
        """(packed, packed) booleans: True = the row's token sees the column's token."""
        mask = torch.zeros(self.size, self.size, dtype=torch.bool)
        for segment in self.segments:
            rows = slice(segment.start, segment.stop)
            for above in segment.ancestors:
                mask[rows, self.segments[above].start : self.segments[above].stop] = True
            mask[rows, rows] = torch.ones(segment.length, segment.length, dtype=torch.bool).tril()
        return mask


def build_tree(rows: list[np.ndarray], min_shared: int = 16) -> PrefixTree:
    """Find what the rows have in common.

    Args:
        rows: Keys of each row, no padding; each at least one token long.
        min_shared: A shorter common run stands in every branch instead: a segment of its own costs
            an attention call.

    Returns:
        The tree. Rows that are equal to the last token share all of it.
    """
    segments: list[Segment] = []
    sources: list[np.ndarray] = []
    places: list[list[np.ndarray]] = [[] for _ in rows]
    size = 0
    # (rows, first token not yet placed, tokens known to be common, ancestors); last in, first out
    todo = [(list(range(len(rows))), 0, 0, ())]
    while todo:
        group, start, known, above = todo.pop()
        end, parts = _divide(rows, group, known)
        if not parts or end - start >= min_shared:
            length = end - start
            if length:
                segments.append(Segment(size, length, start, above))
                offsets = np.arange(start, end)
                sources.append(np.stack([np.full(length, group[0]), offsets], 1))
                for row in group:
                    places[row].append(np.arange(size, size + length))
                size += length
                above = (*above, len(segments) - 1)
            start = end
        # Reversed: the first row's branch is taken next, so children follow their parent.
        todo += [
            (part, start, end, above) for part in reversed(parts) if len(rows[part[0]]) > start
        ]
    source = np.concatenate(sources)
    return PrefixTree(
        segments=tuple(segments),
        sources=source,
        positions=source[:, 1],
        places=tuple(np.concatenate(p) for p in places),
    )


def _divide(rows: list[np.ndarray], group: list[int], known: int) -> tuple[int, list[list[int]]]:
    """Length of a group's common beginning, and the parts it falls into there (none if equal)."""
    lengths = [len(rows[r]) for r in group]
    shortest = min(lengths)
    stacked = np.stack([rows[r][known:shortest] for r in group])
    differs = (stacked != stacked[0]).any(axis=0)
    end = known + (int(differs.argmax()) if differs.any() else shortest - known)
    if end == max(lengths):
        return end, []
    parts: dict[int | None, list[int]] = {}
    for row, length in zip(group, lengths, strict=True):
        parts.setdefault(None if length == end else int(rows[row][end]), []).append(row)
    return end, list(parts.values())

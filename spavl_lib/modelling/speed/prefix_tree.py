"""Rows with common prefixes as a tree: one packed row holds every common prefix once.

    USER: <image> Q1 A        [USER: <image> | Q1 | A | B | Q2 C ]
    USER: <image> Q1 B   ->    a packed row; a segment attends to itself and its ancestors only
    USER: <image> Q2 C

This module does not depend on models. A row is an array of integer keys, one per token. Two tokens
have equal keys if they have the same token id, or if they are the same patch of the same image.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A run of consecutive tokens that a set of rows has in common."""

    start: int
    """Index of the segment's first token in the packed row."""
    length: int
    """Number of tokens."""
    depth: int
    """Index of the segment's first token in an unpacked row, without padding."""
    ancestors: tuple[int, ...]
    """Indices of the segments that precede this one in an unpacked row, the root first."""

    @property
    def stop(self) -> int:
        """Index in the packed row after the segment's last token."""
        return self.start + self.length


@dataclass(frozen=True)
class PrefixTree:
    """Where the tokens of the rows lie in one packed row."""

    segments: tuple[Segment, ...]
    """The segments, each after its ancestors."""
    sources: np.ndarray
    """(packed, 2): for each packed token, one row that contains it, and the token's index in that
    row without padding."""
    positions: np.ndarray
    """(packed,): for each packed token, its index in every row that contains it."""
    places: tuple[np.ndarray, ...]
    """One array (tokens,) for each row: the index in the packed row of each token."""

    @property
    def size(self) -> int:
        """Tokens of the packed row."""
        return len(self.positions)

    @property
    def rows_size(self) -> int:
        """Tokens of all rows, without padding."""
        return sum(map(len, self.places))

    def scored_pairs(self) -> int:
        """Number of query-key pairs for which attention computes a score."""
        return sum(s.length * s.depth + s.length * (s.length + 1) // 2 for s in self.segments)

    def allowed(self) -> Tensor:
        """A mask (packed, packed), bool: entry (i, j) is True if token i attends to token j."""
        mask = torch.zeros(self.size, self.size, dtype=torch.bool)
        for segment in self.segments:
            rows = slice(segment.start, segment.stop)
            for i in segment.ancestors:
                mask[rows, self.segments[i].start : self.segments[i].stop] = True
            mask[rows, rows] = torch.ones(segment.length, segment.length, dtype=torch.bool).tril()
        return mask


def build_tree(rows: list[np.ndarray], min_shared: int = 16) -> PrefixTree:
    """Find the common prefixes of rows.

    Args:
        rows: Keys of each row (tokens,), without padding. No row is empty.
        min_shared: A common run that is shorter is not shared, but repeated in every branch,
            because each segment costs an attention call.

    Returns:
        The tree. Equal rows share all of their tokens.
    """
    segments: list[Segment] = []
    sources: list[np.ndarray] = []
    places: list[list[np.ndarray]] = [[] for _ in rows]
    size = 0
    # A stack of (rows, first token not yet in a segment, length known to be common, ancestors).
    everything: tuple[list[int], int, int, tuple[int, ...]] = (list(range(len(rows))), 0, 0, ())
    todo = [everything]
    while todo:
        group, start, known, ancestors = todo.pop()
        end, parts = _divide(rows, group, known)
        if not parts or end - start >= min_shared:
            length = end - start
            if length:
                segments.append(Segment(size, length, start, ancestors))
                offsets = np.arange(start, end)
                sources.append(np.stack([np.full(length, group[0]), offsets], 1))
                for row in group:
                    places[row].append(np.arange(size, size + length))
                size += length
                ancestors = (*ancestors, len(segments) - 1)
            start = end
        # Reversed, so that the first row's branch is popped next and children follow their parent.
        todo += [
            (part, start, end, ancestors) for part in reversed(parts) if len(rows[part[0]]) > start
        ]
    source = np.concatenate(sources)
    return PrefixTree(
        segments=tuple(segments),
        sources=source,
        positions=source[:, 1],
        places=tuple(np.concatenate(p) for p in places),
    )


def _divide(rows: list[np.ndarray], group: list[int], known: int) -> tuple[int, list[list[int]]]:
    """Find the common prefix of a group of rows.

    Args:
        rows: Keys of each row.
        group: Indices of the rows to compare.
        known: Number of first tokens that are known to be equal.

    Returns:
        Length of the common prefix, and the group divided by the next token. No parts are returned
        if all rows are equal.
    """
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

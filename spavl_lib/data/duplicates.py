"""Pictures and texts that are the same, or nearly: within a set, and between sets.

Exact: the file's hash. Near: a picture's difference hash (dHash, Krawetz 2013: is each of 8 x 8
grey cells brighter than the one left of it?), and a question's words without case and signs.
"""

import hashlib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from spavl_lib.data.images import FORMATS, ImageError, decode
from spavl_lib.data.schema import batches

NEAR = 3  # bits of 64 that may differ


def content_of(cell: Any) -> bytes:
    """An image cell's file, empty for a text-only row."""
    if cell is None:
        return b""
    return cell["bytes"] or Path(cell["path"]).read_bytes()


def cells(rows: Dataset) -> Iterator[Any]:
    """The rows' image cells, a batch in memory at a time."""
    for table in batches(rows.select_columns(["image"])):
        yield from table.column("image").to_pylist()


def image_hashes(rows: Dataset) -> list[str]:
    """sha256 of each row's image file, empty for a text-only row."""
    contents = map(content_of, cells(rows))
    return [hashlib.sha256(c).hexdigest() if c else "" for c in contents]


def dhash(content: bytes) -> int:
    """64 bits of a picture's shape, alike for scaled, recoloured or recompressed copies.

    Raises:
        ImageError: It cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.draft("L", (64, 64))  # JPEG: decode no larger than needed
            small = image.convert("L") if image.mode in ("RGB", "L") else None
            small = small or decode({"bytes": content, "path": None}).convert("L")
            grey = np.asarray(small.resize((9, 8), Image.Resampling.BOX))
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"unreadable image: {error}") from error
    bits = np.packbits(grey[:, 1:] > grey[:, :-1])
    return int.from_bytes(bits.tobytes(), "big")


def looks(rows: Dataset) -> dict[str, tuple[int, tuple[int, int]]]:
    """Each distinct picture's hash -> its dHash, and its size in pixels; unreadable ones left out.

    Args:
        rows: In the schema.
    """
    found: dict[str, tuple[int, tuple[int, int]]] = {}
    for content in map(content_of, cells(rows)):
        key = hashlib.sha256(content).hexdigest()
        if content and key not in found:
            try:
                with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                    size = image.size
                found[key] = (dhash(content), size)
            except (ImageError, OSError):
                continue
    return found


def near_groups(hashes: Iterable[int], distance: int = NEAR) -> list[list[int]]:
    """Groups of like pictures: each is within `distance` bits of another of its group.

    Two hashes that differ in at most three bits agree in one of their four 16-bit quarters, so only
    those are compared.

    Args:
        hashes: 64-bit dHashes.
        distance: Bits that may differ, at most 3.

    Returns:
        Positions of the hashes, by group of two or more, the largest first.
    """
    if not 0 <= distance <= 3:
        raise ValueError(f"distance must be 0 to 3, got {distance}")
    values = list(hashes)
    parent = list(range(len(values)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for quarter in range(4):
        buckets: dict[int, dict[int, int]] = defaultdict(dict)
        for index, value in enumerate(values):
            bucket = buckets[(value >> (16 * quarter)) & 0xFFFF]
            if value in bucket:  # the same hash again: no need to compare it with all
                parent[root(index)] = root(bucket[value])
                continue
            for other, place in bucket.items():
                if (value ^ other).bit_count() <= distance:
                    parent[root(index)] = root(place)
            bucket[value] = index
    groups: dict[int, list[int]] = defaultdict(list)
    for index in range(len(values)):
        groups[root(index)].append(index)
    return sorted((g for g in groups.values() if len(g) > 1), key=len, reverse=True)


def plain_words(text: str) -> str:
    """A text's words without case, signs and spaces between."""
    return " ".join(re.findall(r"\w+", text.lower()))


def repeated(keys: Iterable[Any]) -> int:
    """How many are more than the first of their kind."""
    return sum(n - 1 for n in Counter(keys).values())

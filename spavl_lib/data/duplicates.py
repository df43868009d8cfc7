"""Find images and texts that are equal or nearly equal, within a set and between sets.

Equal images have equal file hashes. Nearly equal images have similar difference hashes (dHash,
Krawetz 2013: each bit says whether a grey cell is brighter than its left neighbour). Nearly equal
questions have the same words if case and punctuation are ignored.
"""

import hashlib
import io
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from spavl_lib.data.images import FORMATS, ImageError, decode
from spavl_lib.data.schema import batches, more_images

NEAR = 3  # how many of a dHash's 64 bits may differ between nearly equal images


def content_of(cell: Any) -> bytes:
    """The bytes of the image file in a cell; empty for a text-only row."""
    if cell is None:
        return b""
    return cell["bytes"] or Path(cell["path"]).read_bytes()


def cells(rows: Dataset) -> Iterator[list]:
    """The image cells of each row, read in batches; an empty list for a text-only row."""
    tables = batches(rows.select_columns(["image"]))
    firsts = (cell for table in tables for cell in table.column("image").to_pylist())
    for first, more in zip(firsts, more_images(rows), strict=True):
        yield [] if first is None else [first, *more]


def image_hashes(rows: Dataset) -> list[str]:
    """sha256 of each row's image file; several are joined by `+`. Empty for a text-only row."""
    return [
        "+".join(hashlib.sha256(content_of(cell)).hexdigest() for cell in of_row)
        for of_row in cells(rows)
    ]


def dhash(content: bytes) -> int:
    """A 64-bit dHash, similar for scaled, recoloured or recompressed copies of an image.

    Raises:
        ImageError: The image cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.draft("L", (64, 64))  # decodes a large JPEG at a reduced size, which is faster
            small = image.convert("L") if image.mode in ("RGB", "L") else None
            small = small or decode({"bytes": content, "path": None}).convert("L")
            grey = np.asarray(small.resize((9, 8), Image.Resampling.BOX))
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"unreadable image: {error}") from error
    bits = np.packbits(grey[:, 1:] > grey[:, :-1])
    return int.from_bytes(bits.tobytes(), "big")


def looks(rows: Dataset) -> dict[str, tuple[int, tuple[int, int]]]:
    """sha256 of each distinct image -> its dHash, and its width and height in pixels.

    Images that cannot be read are left out.

    Args:
        rows: Rows in the schema.
    """
    by_hash: dict[str, tuple[int, tuple[int, int]]] = {}
    for content in map(content_of, itertools.chain.from_iterable(cells(rows))):
        key = hashlib.sha256(content).hexdigest()
        if content and key not in by_hash:
            try:
                with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                    size = image.size
                by_hash[key] = (dhash(content), size)
            except (ImageError, OSError):
                continue
    return by_hash


def near_groups(hashes: Iterable[int], distance: int = NEAR) -> list[list[int]]:
    """Groups of similar images: each is within `distance` bits of another image of its group.

    If two hashes differ in at most three bits, at least one of their four 16-bit quarters is equal.
    Therefore only hashes with an equal quarter are compared.

    Args:
        hashes: 64-bit dHashes.
        distance: Number of bits that may differ, at most 3.

    Returns:
        The indices of the hashes in each group of two or more, the largest group first.
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
            if value in bucket:  # an equal hash was already compared with the others
                parent[root(index)] = root(bucket[value])
                continue
            for other, other_index in bucket.items():
                if (value ^ other).bit_count() <= distance:
                    parent[root(index)] = root(other_index)
            bucket[value] = index
    groups: dict[int, list[int]] = defaultdict(list)
    for index in range(len(values)):
        groups[root(index)].append(index)
    return sorted((g for g in groups.values() if len(g) > 1), key=len, reverse=True)


def plain_words(text: str) -> str:
    """A text's words in lower case, with single spaces and without punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


def repeated(keys: Iterable[Any]) -> int:
    """How many keys are equal to an earlier key."""
    return sum(n - 1 for n in Counter(keys).values())

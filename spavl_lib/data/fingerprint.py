"""Hashes of the files and rows that a stage reads, which tell whether and how data changed."""

import hashlib
import json
from collections.abc import Iterable

from datasets import Dataset

from spavl_lib.config import DataConfig
from spavl_lib.data.duplicates import cells, content_of
from spavl_lib.data.load import prompt_source
from spavl_lib.data.schema import MORE
from spavl_lib.data.sources.base import open_source
from spavl_lib.data.sources.extra import ExtraPairs
from spavl_lib.errors import InputError


def source_sha256(config: DataConfig, split: str) -> str:
    """Hash of the names and bytes of all files that a split is read from, including images.

    The source `datasets` also hashes the settings that divide the files into splits. The pairs of
    `data.extra_path` count too.

    Args:
        config: Names the source. The number of rows that it selects does not change the hash.
        split: `train`, `validation`, or the name of an evaluation set.

    Raises:
        InputError: The data do not exist.
    """
    has_pairs = split in ("train", "validation")
    digest = (open_source(config) if has_pairs else prompt_source(config)).sha256(split)
    extra = ExtraPairs(config).sha256(split) if has_pairs and config.extra_path else ""
    return hashlib.sha256(f"{digest} {extra}".encode()).hexdigest() if extra else digest


def source_hashes(config: DataConfig, splits: Iterable[str]) -> dict[str, str]:
    """`data/<split>` -> `source_sha256`, without splits that the source lacks.

    Raises:
        InputError: There are no training rows, but `splits` names `train`.
    """
    hashes = {}
    for split in splits:
        try:
            hashes[f"data/{split}"] = source_sha256(config, split)
        except InputError:
            if split == "train":
                raise
    return hashes


def row_digests(rows: Dataset) -> dict[str, str | int]:
    """Separate hashes of a set's texts, images and order, which show what differs between two sets.

    Returns:
        `rows`: the number of rows; `texts` and `images`: hashes that do not depend on the order of
        rows; `order`: a hash of all rows in order. Row ids are not hashed.
    """
    texts, images = [], []
    plain = rows.remove_columns([c for c in ("image", MORE, "id") if c in rows.column_names])
    for row in plain:
        content = json.dumps({k: row[k] for k in sorted(row)})
        texts.append(hashlib.sha256(content.encode()).hexdigest())
    for of_row in cells(rows):
        hashes = [hashlib.sha256(content_of(cell)).hexdigest() for cell in of_row or [None]]
        images.append("+".join(hashes))
    return {
        "rows": len(rows),
        "texts": _combined(sorted(texts)),
        "images": _combined(sorted(images)),
        "order": _combined(f"{t} {i}" for t, i in zip(texts, images, strict=True)),
    }


def _combined(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\n")
    return digest.hexdigest()

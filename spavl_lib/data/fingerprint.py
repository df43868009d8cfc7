"""Hashes of the data a stage reads: of its files, cheaply, and of its rows, to say what changed."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset

from spavl_lib.config import DataConfig
from spavl_lib.data.images import ImageError, resolve_inside
from spavl_lib.data.load import folder_of
from spavl_lib.data.sources import original
from spavl_lib.errors import InputError

PATTERNS = {
    "train": ("data/train-*.parquet", "meta_files/**/*.json"),
    "validation": ("validation/*.parquet",),
}


def source_sha256(config: DataConfig, split: str) -> str:
    """Hash of the files a split is read from: names and bytes, pictures too.

    Args:
        config: Where the data are. How many rows are taken makes no difference.
        split: `train`, `validation`, or the name of an evaluation set.

    Raises:
        InputError: The folder or its keyword map is not there.
    """
    if split not in PATTERNS and config.source in ("original", "datasets"):
        config = dataclasses.replace(config, source="mini", path="")  # those of mini stand in
    if config.source == "datasets":
        files: Iterable[Path] = _below(Path(config.path).expanduser())
    elif config.source == "original":
        files = _listed(folder_of(config), split, config)
    else:
        base, twemoji, _ = split.removesuffix("_exchanged").partition("_twemoji")
        patterns = PATTERNS.get(split, (f"test{twemoji}/{base}-*.parquet",))
        folder = folder_of(config)
        files = sorted(p for pattern in patterns for p in folder.glob(pattern))
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode("utf-8", "surrogateescape"))
        with path.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def _below(path: Path) -> list[Path]:
    """A file, or all of a folder; nothing of a name on the Hub: the settings hold its revision."""
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def _listed(folder: Path, split: str, config: DataConfig) -> list[Path]:
    """Keyword map, lists, and every picture they name; what is unreadable, loading will say."""
    map_path = folder / original.MAPS[split]
    lists = original.read_keyword_map(map_path)
    root = Path(config.image_root or config.path).expanduser()
    files = [map_path]
    for keyword in config.keywords or tuple(lists):
        path = folder / lists.get(keyword, "")
        if not path.is_file():
            continue
        files.append(path)
        try:
            records = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        for record in records if isinstance(records, list) else ():
            name = record.get("image") if isinstance(record, dict) else None
            if isinstance(name, str) and name:
                try:
                    files.append(resolve_inside(root, name))
                except ImageError:
                    continue
    return files


def source_hashes(config: DataConfig, splits: Iterable[str]) -> dict[str, str]:
    """`data/<split>` -> `source_sha256`, without splits that a source does not have."""
    found = {}
    for split in splits:
        try:
            found[f"data/{split}"] = source_sha256(config, split)
        except InputError:
            if split == "train":
                raise
    return found


def row_digests(rows: Dataset) -> dict[str, str | int]:
    """What a set of rows is, in parts, so that a difference can be named.

    Returns:
        `rows`, their number; `texts` and `images`, whatever the order; `order`, which text stands
        where, and with which image.
    """
    texts, images = [], []
    plain = rows.remove_columns([c for c in ("image", "id") if c in rows.column_names])
    for row in plain:
        content = json.dumps({k: row[k] for k in sorted(row)})
        texts.append(hashlib.sha256(content.encode()).hexdigest())
    for cell in rows["image"]:
        image = b"" if cell is None else cell["bytes"] or Path(cell["path"]).read_bytes()
        images.append(hashlib.sha256(image).hexdigest())
    return {
        "rows": len(rows),
        "texts": _rolled(sorted(texts)),
        "images": _rolled(sorted(images)),
        "order": _rolled(f"{t} {i}" for t, i in zip(texts, images, strict=True)),
    }


def _rolled(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\n")
    return digest.hexdigest()

"""Find the splits of the user's own data, and open them as records and as tables with images."""

import glob
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    List,
    Value,
    load_dataset,
    load_from_disk,
)

from spavl_lib.config import DataConfig
from spavl_lib.data.schema import batches
from spavl_lib.data.sources import files
from spavl_lib.errors import InputError

SAVED = ("state.json", "dataset_dict.json")  # one of them is in a folder that `save_to_disk` wrote


@dataclass(frozen=True)
class Carried:
    """Stands for an image in a column of the data, until this column is added to the rows."""

    column: str
    index: int = 0
    """Which image of a cell that holds a list."""


@dataclass(frozen=True)
class Opened:
    """Records of a split, and the tables and files that the records come from."""

    records: Iterable[tuple[str, Any]]
    """The place and the record. In a text file the place is `FILE:ROW`. In tables ROW counts
    through all files of the split, and the place names the first file, or `data.path` and the
    split."""
    tables: Dataset | None = None
    """The data set that holds the images for which `Carried` stand; None for text files."""
    files: tuple[Path, ...] = ()


def find_files(path: Path, names: Iterable[str]) -> dict[str, list[Path]] | None:
    """The files of each split, by their names; None if the `datasets` library must find the rows.

    If `path` is a file, this file is the split `train`, and every other split is looked for in the
    folder of `path`, as follows.

    If `path` is a folder, the split NAME is read from one file `NAME.SUFFIX`, from its numbered
    parts (`NAME-00000-of-00002.SUFFIX`), or from all files in the folder `NAME`. SUFFIX is any of
    `files.KINDS`. The first two may also be in the folder `data`. If no split is found and the
    folder holds one file of rows, this file is `train`.

    Args:
        path: The file or folder that `data.path` names.
        names: Names of the splits to look for.

    Raises:
        InputError: The file is of an unknown kind, or two files could be the same split.
    """
    if path.is_file():
        files.check_kind(path)
        beside = {name: _of_split(path.parent, name) for name in names if name != "train"}
        others = {name: [p for p in paths if p != path] for name, paths in beside.items()}
        return {"train": [path]} | {name: _one_kind(p) for name, p in others.items() if p}
    if not path.is_dir() or any((path / name).is_file() for name in SAVED):
        return None
    found = {name: _of_split(path, name) for name in names}
    found = {name: _one_kind(paths) for name, paths in found.items() if paths}
    if found:
        return found
    alone = _row_files(path)
    return {"train": alone} if len(alone) == 1 else None


def _row_files(folder: Path) -> list[Path]:
    # A file metadata.csv or metadata.jsonl describes images, and the `datasets` library reads it.
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [p for p in paths if p.is_file() and files.is_rows(p) and p.stem != "metadata"]


def _of_split(folder: Path, name: str) -> list[Path]:
    shard = re.compile(re.escape(name) + r"(-\d{5}-of-\d{5})?")
    for place in (folder, folder / "data"):
        paths = [p for p in _row_files(place) if shard.fullmatch(p.stem)]
        if paths:
            return paths
    return _row_files(folder / name)


def _one_kind(paths: list[Path]) -> list[Path]:
    shards = all(p.stem.partition("-")[2] for p in paths) or len({p.stem for p in paths}) > 1
    if len({p.suffix for p in paths}) > 1 or (len(paths) > 1 and not shards):
        names = ", ".join(p.name for p in paths)
        raise InputError(f"{paths[0].parent}: {names} could be the same split; keep one of them")
    return paths


def open_files(paths: list[Path]) -> Opened:
    """Open the files of one split.

    Raises:
        InputError: A file is damaged.
    """
    if files.is_text(paths[0]):
        return Opened((r for p in paths for r in files.read_text(p)), files=tuple(paths))
    try:
        rows = files.open_tables(paths)
    except Exception as error:  # pyarrow and `datasets` raise errors of many classes
        raise _cannot_open(", ".join(map(str, paths)), error) from error
    return _of_tables(rows, str(paths[0]), tuple(paths))


def open_by_library(config: DataConfig, path: Path) -> dict[str, Opened]:
    """The splits that the `datasets` library finds in a folder, a saved set, or on the Hub.

    Raises:
        InputError: The library finds no split, or a file is damaged.
    """
    datasets.disable_progress_bars()
    is_saved = any((path / name).is_file() for name in SAVED)
    if path.is_dir() and not is_saved and glob.has_magic(str(path)):
        raise InputError(
            f"cannot open data.path {config.path!r}: the datasets library would read [ ] * ? in a "
            "folder's name as a pattern; rename the folder, or name a file in it"
        )
    try:
        if is_saved:
            saved = load_from_disk(str(path))
        else:
            saved = load_dataset(
                config.path if not path.exists() else str(path),
                config.subset or None,
                revision=config.revision or None,
            )
    except Exception as error:  # pyarrow, `datasets` and the Hub's client raise many classes
        raise _cannot_open(config.path, error) from error
    parts = dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}
    if path.is_dir() and not is_saved:
        _refuse_bare_images(path, parts)
    inside = tuple(sorted(p for p in path.rglob("*") if p.is_file())) if path.is_dir() else ()
    return {
        str(name): _of_tables(
            rows,
            f"{config.path}[{name}]",
            inside or tuple(Path(file["filename"]) for file in rows.cache_files),
        )
        for name, rows in parts.items()
    }


def _refuse_bare_images(path: Path, parts: dict[str, Dataset]) -> None:
    """Raise if the `datasets` library took the images of a folder for its rows.

    Raises:
        InputError: The message names the files of rows in the folder, if there are any.
    """
    if any(set(rows.column_names) - {"image", "label"} for rows in parts.values()):
        return
    rows_of = [p.name for p in _row_files(path)]
    if rows_of:
        raise InputError(
            f"{path} holds several files of rows ({', '.join(rows_of)}) beside images; name the "
            f"one to read, such as {path / rows_of[0]}"
        )
    raise InputError(
        f"{path} holds images but no file of rows; name a file such as pairs.jsonl, whose rows "
        "have prompt, chosen, rejected and image, and set data.image_root to this folder"
    )


def _cannot_open(name: str, error: Exception) -> InputError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return InputError(f"cannot open data.path {name!r}: {reason}")


def _of_tables(rows: Dataset, source: str, paths: tuple[Path, ...]) -> Opened:
    """Open a data set that the `datasets` library has read. Its images stay encoded."""
    for name, kind in rows.features.items():
        if isinstance(kind, Image) or _is_image(kind):
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(kind, List) and (
            isinstance(kind.feature, Image) or _is_image(kind.feature)
        ):
            rows = rows.cast(Features(rows.features | {name: List(Image(decode=False))}))
    return Opened(_records(rows, source), rows, paths)


def _is_image(kind: Any) -> bool:
    """Whether a column holds images but has another type, as pandas and pyarrow write images."""
    if isinstance(kind, dict):
        return set(kind) == {"bytes", "path"}
    return isinstance(kind, Value) and kind.dtype in ("binary", "large_binary")


def _carries(kind: Any) -> bool:
    return isinstance(kind, Image) or (isinstance(kind, List) and isinstance(kind.feature, Image))


def _records(rows: Dataset, source: str) -> Iterator[tuple[str, dict]]:
    """Rows as records, with a `Carried` in the place of every image in the data."""
    pictures = [n for n, k in rows.features.items() if _carries(k)]
    index = 0
    for table in batches(rows):
        carried = {n: [_stand_in(n, c) for c in table.column(n)] for n in pictures}
        for offset, row in enumerate(table.drop_columns(pictures).to_pylist()):
            yield f"{source}:{index + 1}", row | {n: cells[offset] for n, cells in carried.items()}
            index += 1


def _stand_in(name: str, cell: Any) -> Any:
    """What stands for a cell of images: None if it is null, a `Carried`, or a list of `Carried`."""
    if not cell.is_valid:
        return None
    if not isinstance(cell, pa.ListScalar):
        return Carried(name)
    return [Carried(name, i) for i, part in enumerate(cell.values) if part.is_valid]

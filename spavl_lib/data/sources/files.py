"""Open files of the user's own rows. Characters such as `*` in a path are read literally.

Text files (JSON, JSON Lines, CSV, TSV) are read here, so that errors name the row and no cell
changes its type. Tables (parquet, Arrow) are opened by the `datasets` library and stay on the disk.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, load_dataset
from datasets.data_files import DataFilesList

from spavl_lib.data.sources.records import RecordError, once
from spavl_lib.errors import InputError

JSON = (".json", ".jsonl", ".ndjson")
TABLES = {".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow"}
SEPARATORS = {".csv": ",", ".tsv": "\t"}
KINDS = (*JSON, *SEPARATORS, *TABLES)


def is_text(path: Path) -> bool:
    """Whether a file is one of the text files that `read_text` reads."""
    return path.suffix.lower() in (*JSON, *SEPARATORS)


def is_rows(path: Path) -> bool:
    """Whether a file's name says that it holds rows."""
    return path.suffix.lower() in KINDS


def check_kind(path: Path) -> None:
    """Raise if a file's name does not say that it holds rows.

    Raises:
        InputError: The message names the kinds that are read.
    """
    if not is_rows(path):
        raise InputError(
            f"{path}: files of kind {path.suffix or 'no suffix'!r} are not read "
            f"(known: {', '.join(KINDS)}); convert it, or give it the suffix of what it holds"
        )


def read_text(path: Path) -> Iterator[tuple[str, Any]]:
    """Records of a text file, each with `FILE:ROW`.

    Raises:
        InputError: The file is not UTF-8 text, or not of the form that its suffix names.
    """
    separator = SEPARATORS.get(path.suffix.lower())
    return _read_json(path) if separator is None else _read_csv(path, separator)


def open_tables(paths: Sequence[Path]) -> Dataset:
    """Parquet or Arrow files of one kind as one memory-mapped set.

    Raises:
        Exception: A file is damaged. The class of the error is one of pyarrow or `datasets`.
    """
    datasets.disable_progress_bars()
    states = [path.stat() for path in paths]
    # The `datasets` library reads plain names as patterns, but not the names in a list of this
    # class. The second argument becomes part of the key in the library's cache, so that a changed
    # file is read again.
    files = DataFilesList(
        [str(path) for path in paths], [(str(s.st_mtime_ns), str(s.st_size)) for s in states]
    )
    kind = TABLES[paths[0].suffix.lower()]
    return load_dataset(kind, data_files={"train": files}, split="train")


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """Records of a JSON list or of JSON Lines.

    A line that cannot be read gives a `RecordError`, which is listed with the other problems.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not UTF-8 text: {error}") from error
    if path.suffix.lower() == ".json" and not text.lstrip().startswith("{"):
        try:
            records = json.loads(text, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON: {error}") from error
        if not isinstance(records, list):
            kind = type(records).__name__
            raise InputError(f"{path}: expected a list of records, got {kind}")
        yield from ((f"{path}:{i}", r) for i, r in enumerate(records, 1))
        return
    # splitlines() would also split at line separators inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            record = RecordError(f"record: not JSON: {error}")
        yield f"{path}:{number}", record


def _read_csv(path: Path, separator: str) -> Iterator[tuple[str, Any]]:
    """Records of a CSV or TSV file. Every cell stays text, even if it looks like a number."""
    csv.field_size_limit(2**31 - 1)  # a cell may hold an image in base64
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            rows = csv.reader(handle, delimiter=separator, strict=True)
            header = next(rows, [])
            repeated = sorted({name for name in header if header.count(name) > 1})
            if repeated:
                raise InputError(f"{path}: its header has the column {repeated[0]!r} twice")
            before = rows.line_num
            for cells in rows:
                number, before = before + 1, rows.line_num  # a cell may hold line breaks
                if not cells:
                    continue
                record: Any = dict(zip(header, cells, strict=False))
                if len(cells) != len(header):
                    reason = f"{len(cells)} cells, but the header has {len(header)}"
                    record = RecordError(f"record: {reason}")
                yield f"{path}:{number}", record
    except csv.Error as error:
        raise InputError(f"{path}: not CSV: line {rows.line_num}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not UTF-8 text: {error}") from error

"""Read files of other people strictly, and collect every problem with its file and place.

Nothing is repaired: a file that is cut off, has a ragged row, or repeats a key gives problems. The
caller raises all problems at once. Only known faults of the published files are left out.
"""

import csv
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.lib
import pyarrow.parquet as pq

from spavl_lib.data.images import ImageError, check_header, decode
from spavl_lib.runs.files import sha256_file
from spavl_lib.runs.paths import cache_root

# A field may be long: Python's own limit is 128 KiB, and images in a TSV are longer.
FIELD_LIMIT = 100_000_000


class Unreadable(Exception):
    """A file cannot be parsed. `place` says where, and the message says why."""

    def __init__(self, place: str, why: str):
        super().__init__(why)
        self.place = place


@dataclass(frozen=True)
class Record:
    """One record of a file, with the place that error messages name."""

    reader: "Reader"
    file: str
    place: str
    fields: Mapping[str, Any]

    def having(self, **fields: Any) -> "Record":
        """The same record with further fields."""
        return Record(self.reader, self.file, self.place, {**self.fields, **fields})

    def problem(self, why: str) -> None:
        """Note that something is wrong with this record."""
        self.reader.problem(self.file, self.place, why)

    def text(self, key: str, *, may_be_empty: bool = False) -> str:
        """The text below a key. Notes a problem if the value is missing, not text, or empty."""
        value = self.fields.get(key)
        if key not in self.fields:
            self.problem(f"no {key!r}")
        elif not isinstance(value, str):
            self.problem(f"{key} is {_shown(value)}, not text")
        elif not (value.strip() or may_be_empty):
            self.problem(f"empty {key.lstrip('_')}")
        elif any("\ud800" <= character <= "\udfff" for character in value):
            self.problem(f"{key.lstrip('_')} holds half a surrogate pair, which is no valid text")
        return value if isinstance(value, str) else ""

    def choice(self, key: str, allowed: Collection[Any]) -> Any:
        """The value below a key. Notes a problem if the value is missing or not allowed."""
        value = self.fields.get(key)
        if key not in self.fields:
            self.problem(f"no {key!r}")
        elif not any(type(value) is type(known) and value == known for known in allowed):
            self.problem(f"{key} is {_shown(value)}, expected {' or '.join(map(repr, allowed))}")
        return value

    def listed(self, key: str) -> list[Any]:
        """The list below a key. Notes a problem if the value is missing, not a list, or empty."""
        value = self.fields.get(key)
        if key not in self.fields:
            self.problem(f"no {key!r}")
        elif not isinstance(value, list):
            self.problem(f"{key} is {_shown(value)}, not a list")
        elif not value:
            self.problem(f"no {key}: the list is empty")
        return value if isinstance(value, list) else []


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


@dataclass
class Reader:
    """Reads the files of one folder. All problems are collected in `problems`.

    Args:
        folder: The folder; file names in messages are relative to it.
        roots: Subfolders in which a file may lie, the usual one first; "" is the folder itself.
        pins: File below a root -> sha256 of its published version.
        known_faults: `FILE: PLACE` of each faulty record of the published files. If a file is the
            published version, such a record is left out and listed in `left_out`.
    """

    folder: Path
    roots: tuple[str, ...] = ("",)
    pins: Mapping[str, str] = field(default_factory=dict)
    known_faults: Collection[str] = ()
    problems: list[str] = field(default_factory=list)
    missing_images: dict[Path, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    """Sentences about differences from the published version that hashes of files do not show."""
    read: dict[str, tuple[str, str]] = field(default_factory=dict)
    """File below a root -> the name that messages show, and the file's sha256."""
    _checked: set[Path] = field(default_factory=set)

    def problem(self, file: str, place: str, why: str) -> None:
        """Note a problem of a file.

        Args:
            file: The file as messages show it.
            place: The place in it, such as `record 3 (line 4)`.
            why: What is wrong.
        """
        self.problems.append(f"{file}: {place}: {why}")

    def find(self, name: str) -> Path | None:
        """The file of this name in the first root that holds it; `a|b` stands for either name."""
        paths = (self.folder / root / n for n in name.split("|") for root in self.roots)
        return next((path for path in paths if path.is_file()), None)

    def sha(self, name: str) -> str:
        """The sha256 of a file that was read; empty if it was not."""
        return self.read.get(name, ("", ""))[1]

    def source(self, record: Record) -> str:
        """The sha256 of the file that a record is from."""
        return next((sha for shown, sha in self.read.values() if shown == record.file), "")

    def hash(self, name: str, path: Path) -> str:
        """The sha256 of a file. Notes in `read` that the file was read.

        Args:
            name: The file's name below a root.
            path: Where it is.
        """
        if name not in self.read:
            self.read[name] = self.shown(path), sha256_file(path)
        return self.read[name][1]

    def shown(self, path: Path) -> str:
        """A path as messages show it: relative to the folder."""
        return (
            path.relative_to(self.folder).as_posix() if self.folder in path.parents else str(path)
        )

    def table(self, name: str, columns: Iterable[str], hint: str = "") -> list[Record]:
        """Records of a CSV file, or of a TSV file if the suffix is `.tsv`.

        Lines at the beginning that start with `#` are skipped.

        Args:
            name: The file's name below a root.
            columns: Columns that the header must have; `a|b` stands for either name.
            hint: Added to the message if a column is missing.
        """
        path, text = self._text(name)
        if path is None:
            return []
        delimiter = "\t" if path.suffix == ".tsv" else ","
        try:
            places = list(_csv_records(text, delimiter, columns, hint))
        except Unreadable as error:
            self.problem(self.shown(path), error.place, str(error))
            return []
        return self._records(name, path, places)

    def lines(self, name: str) -> list[Record]:
        """Records of a JSONL file: one object on each line that is not blank."""
        path, text = self._text(name)
        if path is None:
            return []
        places = []
        # str.splitlines would also cut at separators that a text may contain.
        for number, line in enumerate(text.split("\n"), 1):
            try:
                places += [(f"line {number}", _parsed(line))] if line.strip() else []
            except Unreadable as error:
                self.problem(self.shown(path), f"line {number}", str(error))
        return self._records(name, path, places)

    def document(self, name: str) -> tuple[str, Any]:
        """The name that messages show, and the content of a JSON file: None if it is unreadable."""
        path, text = self._text(name)
        if path is None:
            return name, None
        try:
            return self.shown(path), _parsed(text)
        except Unreadable as error:
            self.problem(self.shown(path), error.place, str(error))
            return self.shown(path), None

    def objects(self, name: str, *, keyed: str | None = None, id_key: str = "") -> list[Record]:
        """Records of a JSON file that holds a list of objects, or an object of objects.

        Args:
            name: The file's name below a root.
            keyed: None if the file holds a list. If the file holds an object of objects: the word
                for its keys in places, such as `id` in `id 3`. Each record gets its key as `_key`.
            id_key: For a list: the key whose value messages show beside the row number.
        """
        file, value = self.document(name)
        path = self.find(name)
        if value is None or path is None:
            return []
        items: Iterable[tuple[Any, Any]] = ()
        if keyed is None and isinstance(value, list):
            items = enumerate(value)
        elif keyed is not None and isinstance(value, dict):
            items = value.items()
        else:
            found = "an object" if isinstance(value, dict) else type(value).__name__
            expected = "a list" if keyed is None else "an object"
            self.problem(file, "line 1", f"{expected} expected, {found} found")
            return []
        places = []
        for key, item in items:
            place = f"row {key}" if keyed is None else f"{keyed} {key}".strip()
            if isinstance(item, dict):
                place += f" ({item[id_key]})" if id_key in item else ""
                item = item if keyed is None else item | {"_key": key}
            places.append((place, item))
        return self._records(name, path, places)

    def parquet(self, name: str, columns: list[str] | None = None) -> Iterator[Record]:
        """Records of a parquet file, read in pieces.

        Args:
            name: The file's name below a root.
            columns: Columns to read; None reads all.
        """
        path = self.find(name)
        if path is None:
            self.problem(name, "file", "is not there")
            return
        self.hash(name, path)
        number = 0
        try:
            for batch in pq.ParquetFile(path).iter_batches(batch_size=64, columns=columns):
                for fields in batch.to_pylist():
                    yield Record(self, self.shown(path), f"row {number}", fields)
                    number += 1
        except (pyarrow.lib.ArrowException, OSError) as error:
            self.problem(self.shown(path), f"row {number}", f"damaged parquet: {error}")

    def image(self, name: str, record: Record) -> Path | None:
        """The path of an image, whether the file exists or not. A missing file is noted.

        Args:
            name: The path below a root, with forward slashes.
            record: The record that names the image.

        Returns:
            The path; None, and a problem is noted, if the name is empty or leaves the folder.
        """
        parts = PurePosixPath(name).parts
        if not name.strip() or "\0" in name:
            record.problem("no image is named")
            return None
        if ".." in parts or name.startswith(("/", "~", "\\")) or "://" in name:
            record.problem(f"image path {name!r} leaves the folder")
            return None
        paths = [self.folder / root / name for root in self.roots]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            # The message names the root whose folder could hold the image, if there is one.
            path = next((path for path in paths if path.parent.is_dir()), paths[0])
            self.missing_images.setdefault(
                path, f"{self.shown(path)}: {record.place}: image missing"
            )
        elif path not in self._checked:
            self._checked.add(path)
            try:
                check_header(path)
            except ImageError as error:
                self.problem(self.shown(path), record.place, f"image cannot be used: {error}")
        return path

    def stored_image(self, content: bytes, record: Record) -> Path | None:
        """Write an image that a record holds to the cache, under the hash of its bytes.

        Args:
            content: The image file's bytes.
            record: The record that holds the bytes.

        Returns:
            The path in the cache; None, and a problem is noted, if the image cannot be decoded.
        """
        path = cache_root() / "benchmark_images" / hashlib.sha256(content).hexdigest()
        if path.is_file():
            return path
        try:
            decode({"bytes": content, "path": None})
        except ImageError as error:
            record.problem(f"image cannot be used: {error}")
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(path)
        return path

    def unique(self, pairs: Iterable[tuple[Any, Record]], name: str = "id") -> None:
        """Note each value that stands in more than one record.

        Args:
            pairs: The values with their records.
            name: What the values are, for the message.
        """
        seen: dict[Any, str] = {}
        for value, record in pairs:
            if value in seen:
                record.problem(f"{name} {value} twice (first: {seen[value]})")
            seen.setdefault(value, record.place)

    def compared(self) -> tuple[list[str], list[str]]:
        """Two lists: a sentence for each difference from the published version, and the files
        without a pin."""
        changed, unpinned = list(dict.fromkeys(self.changes)), []
        for name, (shown, sha) in self.read.items():
            if name not in self.pins:
                unpinned.append(shown)
            elif self.pins[name] != sha:
                same = next((other for other, pin in self.pins.items() if pin == sha), "")
                hint = f" (its bytes are those of {same})" if same else ""
                expected = self.pins[name][:12]
                changed.append(f"{shown}: sha256 is {sha[:12]}, expected {expected}{hint}")
        return changed, unpinned

    def _records(self, name: str, path: Path, places: Iterable[tuple[str, Any]]) -> list[Record]:
        """Records of (place, fields), without those that are known to be faulty."""
        file, as_published = self.shown(path), self.sha(name) == self.pins.get(name)
        records = []
        for place, fields in places:
            if as_published and f"{name}: {place}" in self.known_faults:
                self.left_out.append(f"{file}: {place}")
            elif isinstance(fields, dict):
                records.append(Record(self, file, place, fields))
            else:
                self.problem(file, place, "an object expected")
        return records

    def _text(self, name: str) -> tuple[Path | None, str]:
        """The path and the text of a file. Notes in `read` that the file was read.

        The path is None, and a problem is noted, if the file is missing or not UTF-8.
        """
        path = self.find(name)
        if path is None:
            self.problem(name, "file", "is not there")
            return None, ""
        self.hash(name, path)
        try:
            return path, path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self.problem(self.shown(path), f"byte {error.start}", "not UTF-8")
            return None, ""


def _csv_records(
    text: str, delimiter: str, columns: Iterable[str], hint: str
) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, fields) of each record. Raises `Unreadable` if the text is damaged."""
    # Lines end only where csv ends them: str.splitlines would also cut at form feeds and U+2028.
    lines = io.StringIO(text, newline="").readlines()
    skipped = 0
    while skipped < len(lines) and lines[skipped].startswith("#"):
        skipped += 1
    csv.field_size_limit(FIELD_LIMIT)
    # Without `strict` an unclosed quote would swallow the rest of the file without an error.
    rows = csv.reader(lines[skipped:], delimiter=delimiter, strict=True)
    number, start = 0, skipped + 1
    header: list[str] = []
    try:
        for row in rows:
            place = f"record {number} (line {start})"
            if number == 0:
                header = row
                _check_header(header, list(columns), hint, start)
            elif not row:  # an empty line
                number -= 1
            elif len(row) != len(header):
                raise Unreadable(place, f"{len(row)} fields, {len(header)} expected")
            else:
                yield place, dict(zip(header, row, strict=True))
            number, start = number + 1, skipped + rows.line_num + 1
    except csv.Error as error:
        raise Unreadable(f"record {number} (line {start})", f"damaged CSV: {error}") from error
    if number == 0:
        raise Unreadable("line 1", "the file is empty")


def _check_header(header: list[str], columns: list[str], hint: str, line: int) -> None:
    missing = [c for c in columns if not any(name in header for name in c.split("|"))]
    twice = [column for column, count in Counter(header).items() if count > 1]
    if missing:
        expected, found = ",".join(columns), ",".join(header)
        names = ", ".join(map(repr, missing))
        why = f"no {names} column; columns {expected} expected, {found} found"
        raise Unreadable(f"line {line}", f"{why}; {hint}" if hint else why)
    if twice:
        raise Unreadable(f"line {line}", f"columns twice: {', '.join(twice)}")


def _parsed(text: str) -> Any:
    """The value of a JSON text. Raises `Unreadable` if it is damaged or an object repeats a key."""

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = Counter(key for key, _ in pairs)
        if repeated := [key for key, count in keys.items() if count > 1]:
            raise Unreadable("file", f"keys twice in one object: {', '.join(repeated)}")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=without_repeats)
    except json.JSONDecodeError as error:
        reason = f"not JSON, or cut off: {error.msg} at column {error.colno}"
        raise Unreadable(f"line {error.lineno}", reason) from error
    except RecursionError as error:
        raise Unreadable("line 1", "nested too deeply") from error

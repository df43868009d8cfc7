"""Find the problems of rows, and refuse or leave out bad rows.

Every problem is a line `FILE:ROW field: reason`. ROW counts from 1; in JSON Lines and CSV it is the
line of the file.
"""

import bisect
import hashlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
from datasets import Dataset

from spavl_lib.data.images import ImageError, check_header, decode
from spavl_lib.data.schema import (
    MAX_CHARACTERS,
    QUESTION_TYPES,
    TURN,
    batches,
    decoded,
    image_columns,
    more_images,
)
from spavl_lib.data.taxonomy import PARENTS
from spavl_lib.errors import InputError, raise_all

HEADER = 16_384  # bytes from the beginning of a file, into which the headers of most images fit
Problems = dict[int, list[str]]  # row number -> one line for each problem of the row


def text_problems(row: dict, place: str, *, preference: bool, turns: bool = False) -> Iterator[str]:
    """Problems of a row's text fields.

    Args:
        row: A row in the schema.
        place: `FILE:ROW` of the row.
        preference: Whether the row must have a chosen and a rejected response.
        turns: Whether the prompt may hold several turns.

    Yields:
        `FILE:ROW field: reason`.
    """
    for name in ("prompt", "chosen", "rejected") if preference else ("prompt",):
        value = row.get(name)
        if not isinstance(value, str):
            yield f"{place} {name}: expected text, got {type(value).__name__}"
        elif not any(c.isprintable() and c != " " for c in value):  # zero-width spaces are empty
            yield f"{place} {name}: empty"
        elif len(value) > MAX_CHARACTERS:
            yield f"{place} {name}: {len(value):,} characters, more than {MAX_CHARACTERS:,}"
        elif "\0" in value:
            yield f"{place} {name}: holds a NUL character"
        elif TURN in value and not (turns and name == "prompt"):
            yield f"{place} {name}: holds a record separator (U+001E)"
    if preference and isinstance(row.get("chosen"), str) and row.get("chosen"):
        if row["chosen"].strip() == str(row.get("rejected")).strip():
            yield f"{place} rejected: equal to chosen, so nothing is preferred"
    class3 = row.get("class3")
    if class3 and class3 not in PARENTS:
        yield f"{place} class3: unknown class {class3!r}"
    elif class3:
        for level, expected in zip(("class1", "class2"), PARENTS[class3], strict=True):
            if row.get(level) and row[level] != expected:
                yield f"{place} {level}: {row[level]!r} is not the parent of {class3!r}"
    question_type = row.get("question_type")
    if question_type and question_type not in QUESTION_TYPES:
        yield f"{place} question_type: unknown type {question_type!r}"


def blank_unstorable(row: dict, place: str) -> Iterator[str]:
    """Blank the text fields that hold half of a surrogate pair, which Arrow cannot store.

    Args:
        row: A row in the schema. It is changed in place.
        place: `FILE:ROW` of the row.

    Yields:
        A line for each field that was blanked.
    """
    for name, value in row.items():
        if isinstance(value, str) and not value.isascii():
            if any("\ud800" <= c <= "\udfff" for c in value):
                row[name] = ""
                yield f"{place} {name}: holds half a surrogate pair, which is no valid text"


def find_problems(
    rows: Dataset,
    place_of: Callable[[int], str],
    *,
    preference: bool,
    images: bool,
    turns: bool = False,
    unopened: Iterable[int] = (),
) -> Problems:
    """All problems of a set's rows.

    Args:
        rows: Rows in the schema.
        place_of: Gives `FILE:ROW` for a row number.
        preference: Whether the rows must have a chosen and a rejected response.
        images: Whether to decode every image (each distinct file once). If not, only format and
            size are read, from the beginning of the file.
        turns: Whether prompts may hold several turns.
        unopened: Numbers of rows whose image is not opened, because its path could name any file.
    """
    problems: Problems = defaultdict(list)
    row_of_id: dict[str, int] = {}
    columns = [c for c in rows.column_names if c not in image_columns(rows)]
    start = 0
    for table in batches(rows.select_columns(columns)):
        for index, (row, unreadable) in enumerate(decoded(table), start):
            place = place_of(index)
            for name in unreadable:
                problems[index].append(f"{place} {name}: not valid UTF-8")
            in_text = text_problems(row, place, preference=preference, turns=turns)
            known = tuple(f"{place} {name}:" for name in unreadable)
            lines = [p for p in in_text if not p.startswith(known)]
            if row["id"] in row_of_id:
                lines.append(f"{place} id: {row['id']} repeats {place_of(row_of_id[row['id']])}")
            row_of_id.setdefault(row["id"], index)
            if lines:
                problems[index] += lines
        start += table.num_rows
    if "image" in rows.column_names:
        find = _bad_images if images else _bad_headers
        for index, reason in find(rows, set(unopened)):
            problems[index].append(f"{place_of(index)} image: {reason}")
        for index, reason in _bad_further_images(rows, decode if images else _check_header_of):
            problems[index].append(f"{place_of(index)} image: {reason}")
    return problems


def _bad_further_images(
    rows: Dataset, check_image: Callable[[dict], object]
) -> Iterator[tuple[int, str]]:
    """(row number, reason) for each image after a row's first that cannot be used."""
    for index, more in enumerate(more_images(rows)):
        for number, cell in enumerate(more, 2):
            try:
                check_image(cell)
            except ImageError as error:
                yield index, f"image {number} of the row: {error}"


def _check_header_of(cell: dict) -> None:
    check_header(cell["bytes"] or Path(cell["path"]))


def _bad_images(rows: Dataset, unopened: set[int]) -> Iterator[tuple[int, str]]:
    """(row number, reason) for each row whose image cannot be used. Text-only rows are skipped."""
    reasons: dict[bytes, str] = {}
    index = 0
    for table in batches(rows.select_columns(["image"])):
        for cell in table.column("image").to_pylist():
            if cell is not None and index not in unopened:
                content = cell["bytes"] or str(cell["path"]).encode()
                key = hashlib.blake2b(content, digest_size=16).digest()
                if key not in reasons:
                    reasons[key] = ""
                    try:
                        decode(cell)
                    except ImageError as error:
                        reasons[key] = str(error)
                if reasons[key]:
                    yield index, reasons[key]
            index += 1


def _bad_headers(rows: Dataset, unopened: set[int]) -> Iterator[tuple[int, str]]:
    """(row number, reason) for each row whose image has a format or size that is not accepted."""
    chunks = (c for t in batches(rows.select_columns(["image"])) for c in t.column("image").chunks)
    good: set[bytes | str] = set()  # hashes of file beginnings, or paths, that passed the check
    index = 0
    for chunk in chunks:
        contents, paths = (pc.struct_field(chunk, name) for name in ("bytes", "path"))
        heads = pc.binary_slice(contents, 0, HEADER).to_pylist()
        for offset, (head, path) in enumerate(zip(heads, paths.to_pylist(), strict=True)):
            if (head or path) and index + offset not in unopened:
                key = hashlib.blake2b(head, digest_size=16).digest() if head else path
                if key in good:
                    continue
                try:
                    check_header(head or Path(path))
                    good.add(key)
                except ImageError:  # the header may be longer than `HEADER`
                    try:
                        check_header(contents[offset].as_py() or Path(path))
                    except ImageError as error:
                        yield index + offset, str(error)
        index += len(chunk)


def merge_problems(first: Problems, second: Problems, places: list[str]) -> Problems:
    """Problems of records and of the rows made from them, without reporting a field twice.

    If both have lines about a field, only the record's lines are kept. For example, the record's
    line says that a field has the wrong type, and the row's line would say that the field is empty.
    If a whole record cannot be read, none of the row's lines are kept.

    Args:
        first: Problems of the records.
        second: Problems of the rows made from them.
        places: `FILE:ROW` of each row.
    """
    both: Problems = {}
    for index in sorted(first.keys() | second.keys()):
        start = len(places[index]) + 1
        named = {line[start:].split(":")[0] for line in first.get(index, ())}
        lines = [p for p in second.get(index, ()) if p[start:].split(":")[0] not in named]
        both[index] = [*first.get(index, ()), *([] if "record" in named else lines)]
    return both


@dataclass(frozen=True)
class Loaded:
    """The good rows of a set, and the problems of the rows that were left out."""

    rows: Dataset
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences about the whole set that a person should know, such as what is held out."""


def without_bad_rows(rows: Dataset, problems: Problems, source: str, on_bad_rows: str) -> Loaded:
    """Refuse a set with bad rows, or leave them out with a warning.

    Args:
        rows: Rows of one file or set.
        problems: The result of `find_problems`.
        source: Name of what was read, for the message.
        on_bad_rows: `error` refuses a set with bad rows; `skip` leaves the bad rows out.

    Raises:
        InputError: There are bad rows and `on_bad_rows` is `error`, or all rows are bad. The
            message lists all problems.
    """
    lines = [line for index in sorted(problems) for line in problems[index]]
    if on_bad_rows == "error" or len(problems) == len(rows):
        raise_all(lines, source)
    if not problems:
        return Loaded(rows)
    good = rows.select([i for i in range(len(rows)) if i not in problems])
    shown = "\n  ".join(lines[:50] + [f"... and {len(lines) - 50} more"] * (len(lines) > 50))
    warnings.warn(
        f"{source}: {len(problems)} of {len(rows)} rows skipped:\n  {shown}", stacklevel=2
    )
    return Loaded(good, tuple(lines))


def keep_or_refuse(rows: Dataset, bad_ids: set[str], reason: str, on_bad_rows: str) -> Dataset:
    """Refuse a set with bad rows, or leave them out with a warning.

    Args:
        rows: Rows of one set.
        bad_ids: Ids of the bad rows.
        reason: A text that says which rows are bad, and why.
        on_bad_rows: `error` refuses a set with bad rows; `skip` leaves the bad rows out.

    Raises:
        InputError: There are bad rows and `on_bad_rows` is `error`, or all rows are bad.
    """
    if not bad_ids:
        return rows
    if on_bad_rows == "error" or len(bad_ids) == len(rows):
        raise InputError(reason)
    warnings.warn(f"{len(bad_ids)} of {len(rows)} rows skipped: {reason}", stacklevel=3)
    return rows.select([i for i, row_id in enumerate(rows["id"]) if row_id not in bad_ids])


class Shards:
    """Gives `FILE:ROW` for a row number of a set that was read from several files."""

    def __init__(self, files: Iterable[tuple[Path, int]]):
        self.files, self.starts, total = [], [], 0
        for path, count in files:
            self.files.append(path)
            self.starts.append(total)
            total += count

    def __call__(self, index: int) -> str:
        """`FILE:ROW` of a row."""
        shard = bisect.bisect_right(self.starts, index) - 1
        return f"{self.files[shard]}:{index - self.starts[shard] + 1}"

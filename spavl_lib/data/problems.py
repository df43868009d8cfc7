"""Problems of rows: finding them, and refusing or leaving out the bad rows.

Every problem is a line `FILE:ROW field: reason`.
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
from spavl_lib.data.schema import MAX_CHARACTERS, QUESTION_TYPES, TURN, batches, decoded
from spavl_lib.data.taxonomy import PARENTS
from spavl_lib.errors import InputError, raise_all

HEADER = 16_384  # bytes of a file in which most images say their size
Problems = dict[int, list[str]]  # row number -> its lines


def text_problems(row: dict, where: str, *, preference: bool, turns: bool = False) -> Iterator[str]:
    """Problems of a row's text fields.

    Args:
        row: A row in the schema.
        where: `FILE:ROW`.
        preference: Whether the row must have answers.
        turns: Whether the prompt may hold several turns.

    Yields:
        `FILE:ROW field: reason`.
    """
    for name in ("prompt", "chosen", "rejected") if preference else ("prompt",):
        value = row.get(name)
        if not isinstance(value, str):
            yield f"{where} {name}: expected text, got {type(value).__name__}"
        elif not any(c.isprintable() and c != " " for c in value):  # nor zero-width spaces
            yield f"{where} {name}: empty"
        elif len(value) > MAX_CHARACTERS:
            yield f"{where} {name}: {len(value):,} characters, more than {MAX_CHARACTERS:,}"
        elif "\0" in value:
            yield f"{where} {name}: holds a NUL character"
        elif TURN in value and not (turns and name == "prompt"):
            yield f"{where} {name}: holds a record separator (U+001E)"
    if preference and isinstance(row.get("chosen"), str) and row.get("chosen"):
        if row["chosen"].strip() == str(row.get("rejected")).strip():
            yield f"{where} rejected: equal to chosen, so nothing is preferred"
    class3 = row.get("class3")
    if class3 and class3 not in PARENTS:
        yield f"{where} class3: unknown class {class3!r}"
    elif class3:
        for level, expected in zip(("class1", "class2"), PARENTS[class3], strict=True):
            if row.get(level) and row[level] != expected:
                yield f"{where} {level}: {row[level]!r} is not the parent of {class3!r}"
    question_type = row.get("question_type")
    if question_type and question_type not in QUESTION_TYPES:
        yield f"{where} question_type: unknown type {question_type!r}"


def blank_unstorable(row: dict, where: str) -> Iterator[str]:
    """Empty text fields that cannot be stored: JSON can spell half a surrogate pair.

    Args:
        row: A row in the schema; changed in place.
        where: `FILE:ROW`.

    Yields:
        A line for each such field.
    """
    for name, value in row.items():
        if isinstance(value, str) and not value.isascii():
            if any("\ud800" <= c <= "\udfff" for c in value):
                row[name] = ""
                yield f"{where} {name}: holds half a surrogate pair, which is no valid text"


def find_problems(
    rows: Dataset,
    where: Callable[[int], str],
    *,
    preference: bool,
    images: bool,
    turns: bool = False,
    unopened: Iterable[int] = (),
) -> Problems:
    """All problems of a set's rows.

    Args:
        rows: Rows in the schema.
        where: Gives `FILE:ROW` for a row number.
        preference: Whether the rows must have answers.
        images: Whether to decode every image (each distinct file once). If not, only format and
            size are read, from the beginning of the file.
        turns: Whether prompts may hold several turns.
        unopened: Rows whose image is not opened, because its path could name any file.
    """
    problems: Problems = defaultdict(list)
    row_of_id: dict[str, int] = {}
    columns = [c for c in rows.column_names if c != "image"]
    start = 0
    for table in batches(rows.select_columns(columns)):
        for index, (row, unreadable) in enumerate(decoded(table), start):
            place = where(index)
            for name in unreadable:
                problems[index].append(f"{place} {name}: not valid UTF-8")
            in_text = text_problems(row, place, preference=preference, turns=turns)
            known = tuple(f"{place} {name}:" for name in unreadable)
            lines = [p for p in in_text if not p.startswith(known)]
            if row["id"] in row_of_id:
                lines.append(f"{place} id: {row['id']} repeats {where(row_of_id[row['id']])}")
            row_of_id.setdefault(row["id"], index)
            if lines:
                problems[index] += lines
        start += table.num_rows
    if "image" in rows.column_names:
        find = _bad_images if images else _bad_headers
        for index, reason in find(rows, set(unopened)):
            problems[index].append(f"{where(index)} image: {reason}")
    return problems


def _bad_images(rows: Dataset, unopened: set[int]) -> Iterator[tuple[int, str]]:
    """Number and reason of each row whose image cannot be used. Text-only rows have none."""
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
    """Number and reason of each row whose image has a format or size that is not taken."""
    chunks = (c for t in batches(rows.select_columns(["image"])) for c in t.column("image").chunks)
    good: set[bytes | str] = set()  # the beginnings of files say whether they are taken
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
                except ImageError:  # or the header is longer
                    try:
                        check_header(contents[offset].as_py() or Path(path))
                    except ImageError as error:
                        yield index + offset, str(error)
        index += len(chunk)


def merge_problems(first: Problems, second: Problems, places: list[str]) -> Problems:
    """Problems of records, and of the rows made from them, without naming a field twice.

    For a field of the wrong type this keeps the record's line, which names the type, and drops the
    row's line, which finds the field empty.

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


def without_bad_rows(rows: Dataset, problems: Problems, source: str, on_bad_rows: str) -> Loaded:
    """Refuse a set with bad rows, or leave them out with a warning.

    Args:
        rows: Rows of one file or set.
        problems: As `find_problems` gives them.
        source: What was read, for the message.
        on_bad_rows: `error` to refuse, `skip` to leave out.

    Raises:
        InputError: Lists all problems, with `error`; with `skip` only if no row is left.
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
        reason: What is wrong with which of them.
        on_bad_rows: `error` to refuse, `skip` to leave out.

    Raises:
        InputError: There are bad rows, with `error`; with `skip` only if no row is left.
    """
    if not bad_ids:
        return rows
    if on_bad_rows == "error" or len(bad_ids) == len(rows):
        raise InputError(reason)
    warnings.warn(f"{len(bad_ids)} of {len(rows)} rows skipped: {reason}", stacklevel=3)
    return rows.select([i for i, row_id in enumerate(rows["id"]) if row_id not in bad_ids])


class Shards:
    """Gives `FILE:ROW` for a row number, over the files that a set was read from."""

    def __init__(self, files: Iterable[tuple[Path, int]]):
        self.files, self.starts, total = [], [], 0
        for path, count in files:
            self.files.append(path)
            self.starts.append(total)
            total += count

    def __call__(self, index: int) -> str:
        """`FILE:ROW` of a row."""
        shard = bisect.bisect_right(self.starts, index) - 1
        return f"{self.files[shard]}:{index - self.starts[shard]}"

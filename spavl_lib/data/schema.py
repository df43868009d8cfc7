"""The one schema every door opens into, and the only place with raw column names.

A preference row has `id, prompt, chosen, rejected, image, image_name, class1, class2, class3,
question_type`; a prompt row lacks `chosen` and `rejected`. `image` is `{"bytes", "path"}`, decoded
when a batch is made. Unknown classes and types are empty text. A prompt of several turns holds
them one after another, the user's first, with `TURN` between.
"""

import bisect
import hashlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, Features, Image, Value

from spavl_lib.data.images import ImageError, decode
from spavl_lib.data.taxonomy import PARENTS
from spavl_lib.errors import raise_all

TEXT = ("id", "prompt", "chosen", "rejected", "image_name", "class1", "class2", "class3")
PREFERENCE_COLUMNS = (*TEXT, "question_type", "image")
PROMPT_COLUMNS = tuple(c for c in PREFERENCE_COLUMNS if c not in ("chosen", "rejected"))
# As on the Hub -> as here.
HUB_RENAMES = {"question": "prompt"}
HUB_REQUIRED = {
    "train": ("image", "question", "chosen", "rejected", "image_name"),
    "validation": ("image", "question", "chosen", "rejected", "class1", "class2", "class3"),
    "test": ("image", "question", "class1", "class2", "class3"),
}
ORIGINAL_REQUIRED = ("id", "question", "chosen", "rejected")
QUESTION_TYPES = ("easy", "hardq", "hards")
DECODE_ALL_UP_TO = 5_000  # rows; above it images are decoded as batches are made
MAX_CHARACTERS = 50_000  # of one text; no model here reads a tenth of it
TURN = "\x1e"  # ASCII's record separator, which no text from outside may hold
BATCH = 1_000  # rows of text looked at together

Problems = dict[int, list[str]]


def features(columns: Iterable[str]) -> Features:
    """Arrow types of the given columns: text, and images left encoded."""
    return Features({c: Image(decode=False) if c == "image" else Value("string") for c in columns})


def text_columns(columns: dict[str, list[str]]) -> Dataset:
    """Columns of text as a set; many times faster than `from_dict`, which looks at every cell."""
    return Dataset(pa.table({n: pa.array(v, pa.string()) for n, v in columns.items()}))


def text_problems(row: dict, where: str, *, preference: bool, turns: bool = False) -> Iterator[str]:
    """What is wrong with a row's text fields.

    Args:
        row: In this schema.
        where: `FILE:ROW`.
        preference: Whether answers are expected.
        turns: Whether the prompt may hold several turns.

    Yields:
        `FILE:ROW field: reason`.
    """
    for name in ("prompt", "chosen", "rejected") if preference else ("prompt",):
        value = row.get(name)
        if not isinstance(value, str):
            yield f"{where} {name}: expected text, got {type(value).__name__}"
        elif not any(c.isprintable() and c != " " for c in value):  # nor spaces of no width
            yield f"{where} {name}: empty"
        elif len(value) > MAX_CHARACTERS:
            yield f"{where} {name}: {len(value):,} characters, over {MAX_CHARACTERS:,}"
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


def storable(row: dict, where: str) -> Iterator[str]:
    """Empty the fields that no file of text can hold: half a surrogate pair, which JSON may spell.

    Args:
        row: In this schema; changed in place.
        where: `FILE:ROW`.

    Yields:
        A line for each such field.
    """
    for name, value in row.items():
        if isinstance(value, str) and not value.isascii():
            if any("\ud800" <= c <= "\udfff" for c in value):
                row[name] = ""
                yield f"{where} {name}: holds half a surrogate pair, which is no text"


def find_problems(
    rows: Dataset,
    where: Callable[[int], str],
    *,
    preference: bool,
    images: bool,
    turns: bool = False,
    unopened: Iterable[int] = (),
) -> Problems:
    """Everything wrong with a set's rows.

    Args:
        rows: In this schema.
        where: Row number -> `FILE:ROW`.
        preference: Whether answers are expected.
        images: Decode every picture (a distinct file once).
        turns: Whether prompts may hold several turns.
        unopened: Rows whose picture must not be opened: its path could name any file.

    Returns:
        Row number -> its lines, `FILE:ROW field: reason`.
    """
    problems: Problems = defaultdict(list)
    seen: dict[str, int] = {}
    columns = [c for c in rows.column_names if c != "image"]
    start = 0
    for table in batches(rows.select_columns(columns)):
        for index, (row, unreadable) in enumerate(decoded(table), start):
            place = where(index)
            for name in unreadable:
                problems[index].append(f"{place} {name}: not UTF-8")
            found = text_problems(row, place, preference=preference, turns=turns)
            lines = [p for p in found if not any(p.startswith(f"{place} {n}:") for n in unreadable)]
            if row["id"] in seen:
                lines.append(f"{place} id: {row['id']} repeats {where(seen[row['id']])}")
            seen.setdefault(row["id"], index)
            if lines:
                problems[index] += lines
        start += table.num_rows
    if images and "image" in rows.column_names:
        for index, reason in _bad_images(rows, set(unopened)):
            problems[index].append(f"{where(index)} image: {reason}")
    return problems


def batches(rows: Dataset) -> Iterator[pa.Table]:
    """A set in Arrow tables of some rows, so that no more is in memory."""
    if len(rows):
        yield from rows.with_format("arrow").iter(batch_size=BATCH)


def decoded(table: pa.Table) -> Iterator[tuple[dict, list[str]]]:
    """A table's rows as dicts, each with the names of its cells that are not UTF-8."""
    try:
        for row in table.to_pylist():
            yield row, []
    except UnicodeDecodeError:
        raw = {n: table.column(n).cast(pa.binary()).to_pylist() for n in table.column_names}
        for index in range(table.num_rows):
            row, unreadable = {}, []
            for name, cells in raw.items():
                try:
                    row[name] = None if cells[index] is None else cells[index].decode()
                except UnicodeDecodeError:
                    row[name] = None
                    unreadable.append(name)
            yield row, unreadable


def column(rows: Dataset, name: str) -> list:
    """One text column as a list; None for a cell that is missing or not UTF-8."""
    tables = batches(rows.select_columns([name]))
    return [row[name] for table in tables for row, _ in decoded(table)]


def _bad_images(rows: Dataset, unopened: set[int]) -> Iterator[tuple[int, str]]:
    """Rows whose picture cannot be used, and why; a text-only record has none."""
    known: dict[bytes, str] = {}
    index = 0
    for table in batches(rows.select_columns(["image"])):
        for cell in table.column("image").to_pylist():
            if cell is not None and index not in unopened:
                content = cell["bytes"] or str(cell["path"]).encode()
                key = hashlib.blake2b(content, digest_size=16).digest()
                if key not in known:
                    known[key] = ""
                    try:
                        decode(cell)
                    except ImageError as error:
                        known[key] = str(error)
                if known[key]:
                    yield index, known[key]
            index += 1


def merged(first: Problems, second: Problems, places: list[str]) -> Problems:
    """What reading the records found, and what looking at the rows found of other fields.

    A field of the wrong type is described by what it was, not by the gap left in its place.

    Args:
        first: Of the records.
        second: Of the rows made from them.
        places: `FILE:ROW` of each.
    """
    both: Problems = {}
    for index in sorted(first.keys() | second.keys()):
        start = len(places[index]) + 1
        known = {line[start:].split(":")[0] for line in first.get(index, ())}
        lines = [p for p in second.get(index, ()) if p[start:].split(":")[0] not in known]
        both[index] = [*first.get(index, ()), *([] if "record" in known else lines)]
    return both


@dataclass(frozen=True)
class Loaded:
    """A set's good rows, and a line for everything wrong with the rows left out."""

    rows: Dataset
    skipped: tuple[str, ...] = ()


def settle(rows: Dataset, problems: Problems, source: str, on_bad_rows: str) -> Loaded:
    """Refuse bad rows, or leave them out and say which.

    Args:
        rows: Of one file or set.
        problems: As `find_problems` gives them.
        source: What was read.
        on_bad_rows: `error` or `skip`.

    Raises:
        InputError: Lists all offenders by file and row, under `error`; under `skip`, no row is
            left.
    """
    lines = [line for index in sorted(problems) for line in problems[index]]
    if on_bad_rows == "error" or len(problems) == len(rows):
        raise_all(lines, source)
    if not problems:
        return Loaded(rows)
    kept = rows.select([i for i in range(len(rows)) if i not in problems])
    shown = "\n  ".join(lines[:50] + [f"... and {len(lines) - 50} more"] * (len(lines) > 50))
    warnings.warn(
        f"{source}: {len(problems)} of {len(rows)} rows skipped:\n  {shown}", stacklevel=2
    )
    return Loaded(kept, tuple(lines))


class Shards:
    """Row number -> `FILE:ROW`, over the files a set was read from in turn."""

    def __init__(self, files: Iterable[tuple[Path, int]]):
        self.files, self.starts, total = [], [], 0
        for path, count in files:
            self.files.append(path)
            self.starts.append(total)
            total += count

    def __call__(self, index: int) -> str:
        """Where a row stands."""
        shard = bisect.bisect_right(self.starts, index) - 1
        return f"{self.files[shard]}:{index - self.starts[shard]}"

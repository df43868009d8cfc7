"""Make rows in the schema, with their images, from the records of the user's own data."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, List, concatenate_datasets

from spavl_lib.config import ColumnsConfig, DataConfig
from spavl_lib.data.images import ImageError, holds_image, image_cell, names_image
from spavl_lib.data.problems import (
    Loaded,
    Problems,
    blank_unstorable,
    find_problems,
    merge_problems,
    without_bad_rows,
)
from spavl_lib.data.schema import (
    DECODE_ALL_UP_TO,
    MORE,
    PREFERENCE_COLUMNS,
    PROMPT_COLUMNS,
    batches,
    features,
)
from spavl_lib.data.sources import records
from spavl_lib.data.sources.opening import Carried, Opened
from spavl_lib.data.sources.records import RecordError
from spavl_lib.data.taxonomy import PARENTS
from spavl_lib.errors import InputError

# Columns that hold texts of the row. A value is a text even if it looks like an image or a path.
TEXTS = (
    "prompt", "question", "chosen", "rejected", "conversations", "instruction", "input", "history",
    *records.SYSTEM, *records.UNREADABLE,
)  # fmt: skip
IMAGES = ("image", "images")
OPTIONAL = ("image", "image_name", "id", "class3", "question_type")


@dataclass(frozen=True)
class Assembled:
    """Rows in the schema, with their places and the problems of their records."""

    rows: Dataset
    places: list[str]
    """`FILE:ROW` of each row."""
    problems: Problems
    notes: tuple[str, ...]
    files: tuple[Path, ...]

    def select(self, indices: list[int]) -> "Assembled":
        """Some of the rows, in a new order."""
        if indices == list(range(len(self.rows))):
            return self
        problems = {n: self.problems[i] for n, i in enumerate(indices) if i in self.problems}
        places = [self.places[i] for i in indices]
        return Assembled(self.rows.select(indices), places, problems, self.notes, self.files)

    def checked(self, config: DataConfig, *, preference: bool = True) -> Loaded:
        """Check the rows, and refuse or leave out bad rows as `data.on_bad_rows` says.

        Args:
            config: Its `path` and `on_bad_rows` are used.
            preference: Whether the rows must have a chosen and a rejected response.

        Raises:
            InputError: As for `without_bad_rows`.
        """
        decode_all = len(self.rows) <= DECODE_ALL_UP_TO or config.on_bad_rows == "skip"
        found = find_problems(
            self.rows, self.places.__getitem__, preference=preference, images=decode_all, turns=True
        )
        problems = merge_problems(self.problems, found, self.places)
        loaded = without_bad_rows(self.rows, problems, config.path, config.on_bad_rows)
        return Loaded(loaded.rows, loaded.skipped, self.notes)


def joined(parts: list[Assembled]) -> Assembled:
    """The rows of all parts, one after another."""
    if len(parts) == 1:
        return parts[0]
    problems: Problems = {}
    start = 0
    for part in parts:
        problems |= {start + i: lines for i, lines in part.problems.items()}
        start += len(part.rows)
    return Assembled(
        concatenate_datasets([part.rows for part in parts]),
        [place for part in parts for place in part.places],
        problems,
        tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        tuple(path for part in parts for path in part.files),
    )


def assemble(
    opened: Opened, root: Path, name: str, config: DataConfig, *, preference: bool = True
) -> Assembled:
    """Make rows in the schema from records.

    Args:
        opened: The records.
        root: Folder that image paths start from.
        name: Name of the split or file. A row without an id gets the id `NAME/NUMBER`.
        config: Its `columns` and `path` are used.
        preference: Whether the records have a chosen and a rejected response.

    Raises:
        InputError: There are no records; or, for pairs, `data.columns` names a column for one of
            `OPTIONAL` that does not exist. A missing column of texts is a problem of each row.
    """
    found = list(opened.records)
    known = {key: None for _, record in found if isinstance(record, dict) for key in record}
    if not found:
        raise InputError(f"{config.path}: no records")
    if not preference:  # prompts may lack columns that `data.columns` names for the pairs
        lacking = {n: "" for n, column in vars(config.columns).items() if column not in known}
        config = dataclasses.replace(config, columns=dataclasses.replace(config.columns, **lacking))
    notes = _check_columns(known, config)
    made, cells, places = [], [], [place for place, _ in found]
    problems: Problems = {}
    for index, (place, record) in enumerate(found):
        row, of_row, lines = _row(
            record, place, root, f"{name}/{index}", config.columns, preference
        )
        made.append(row)
        cells.append(of_row)
        if lines:
            problems[index] = lines
    columns = PREFERENCE_COLUMNS if preference else PROMPT_COLUMNS
    table = {c: [row[c] for row in made] for c in columns if c != "image"}
    most = max(1, *map(len, cells))
    images = [
        _images(
            [of_row[n] if n < len(of_row) else None for of_row in cells], opened.tables, root,
            places, problems,
        )
        for n in range(most)
    ]  # fmt: skip
    parts = [Dataset.from_dict(table, features=features(table)), images[0]]
    if most > 1:
        parts.append(_gathered(images[1:]))
        columns = (*columns, MORE)
    rows = concatenate_datasets(parts, axis=1)
    return Assembled(rows.select_columns(list(columns)), places, problems, notes, opened.files)


def _gathered(images: list[Dataset]) -> Dataset:
    """The column of images after the first, from a data set for each place in a row's list."""
    names = [str(n) for n in range(len(images))]
    apart = [rows.rename_column("image", n) for rows, n in zip(images, names, strict=True)]

    def gather(batch: dict[str, list]) -> dict[str, list]:
        rows = zip(*(batch[n] for n in names), strict=True)
        return {MORE: [[cell for cell in row if cell is not None] for row in rows]}

    return concatenate_datasets(apart, axis=1).map(
        gather, batched=True, remove_columns=names, features=features([MORE])
    )


def _check_columns(known: Iterable[str], config: DataConfig) -> tuple[str, ...]:
    """A note that lists the columns that nothing reads; empty if there are no such columns.

    Raises:
        InputError: `data.columns` names a column for one of `OPTIONAL` that does not exist.
    """
    mapped = {n: getattr(config.columns, n) for n in OPTIONAL}
    lost = [
        f"data.columns.{n} = {name!r}" for n, name in mapped.items() if name not in ("", *known)
    ]
    if lost:
        raise InputError(
            f"{config.path} has no such column: {', '.join(lost)} (it has {', '.join(known)})"
        )
    read = {*TEXTS, *IMAGES, *OPTIONAL, "class1", "class2", "set", *vars(config.columns).values()}
    unread = [name for name in known if name not in read]
    return (f"{config.path}: columns that nothing reads: {', '.join(unread)}",) if unread else ()


def _row(
    record: Any, place: str, root: Path, name: str, columns: ColumnsConfig, preference: bool
) -> tuple[dict, list, list[str]]:
    """A record as a row, its images as cells or `Carried`, and the record's problems."""
    row: dict[str, Any] = dict.fromkeys(PREFERENCE_COLUMNS, "") | {"id": name}
    if isinstance(record, RecordError):
        return row, [], [f"{place} {record}"]
    if not isinstance(record, dict):
        kind = type(record).__name__
        return row, [], [f"{place} record: expected an object, got {kind}"]
    for field in ("id", "image_name", "class3", "question_type"):
        value = record.get(getattr(columns, field) or field)
        if value is not None and value != "":
            row[field] = str(value)
    if row["class3"] in PARENTS:
        row["class1"], row["class2"] = PARENTS[row["class3"]]
    read = (
        records.read_pair(record, columns) if preference else records.read_prompt(record, columns)
    )
    problems = [f"{place} {line}" for line in read.problems]
    # A field that cannot be read gets its name as text, so that it is not reported as empty too.
    for field in ("prompt", "chosen", "rejected"):
        row[field] = read.fields.get(field, field if problems else "")
    cells: list = []
    try:
        cells = _image(record, read, root, columns)
    except ImageError as error:
        problems.append(f"{place} image: {error}")
    if cells and isinstance(cells[0], dict) and cells[0]["path"] and not row["image_name"]:
        row["image_name"] = Path(cells[0]["path"]).name
    return row, cells, [*problems, *blank_unstorable(row, place)]


def _image(record: dict, read: records.Read, root: Path, columns: ColumnsConfig) -> list:
    """The record's images in order: each is a cell, or a `Carried` for an image in the data.

    Raises:
        ImageError: Several turns have images, the text marks another number of images than the
            record has, an image is in a column that is not read, two columns have different images,
            or an image cannot be found.
    """
    named = [columns.image] if columns.image else IMAGES
    images: list[Any] = []
    given = [_listed(value) for value in [*(record.get(name) for name in named), read.images]]
    # The longest list comes first: another one that repeats a part of it must not change its order.
    for parts in sorted(given, key=len, reverse=True):
        # Column and message may name the same image; within one list every image counts.
        images += [p for p in parts if p is not None and p != "" and p not in tuple(images)]
    texts = {*TEXTS, columns.prompt, columns.chosen, columns.rejected}
    rest = {n: v for n, v in record.items() if n not in named and n not in texts}
    if not images and (name := next((n for n, v in rest.items() if _shows(v, names_image)), "")):
        raise ImageError(f"none, but column {name!r} names one; set data.columns.image={name}")
    if images and not columns.image:
        others = [n for n, v in rest.items() if _shows(v, holds_image)]
        if others:
            where = ", ".join([*(n for n in named if record.get(n)), *others])
            raise ImageError(f"several, in columns {where}; choose one with data.columns.image")
    both = [record.get(name) for name in named if record.get(name)]
    if len(both) > 1 and both[0] not in (both[1], *_listed(both[1])):
        raise ImageError(
            f"several, in columns {', '.join(named)}; choose one with data.columns.image"
        )
    if len(images) > 1 and read.turns > 1:
        raise ImageError(
            f"{len(images)} images in {read.turns} turns; put all of them into the first turn"
        )
    if read.marks and read.marks != len(images):
        raise ImageError(f"{read.marks} <image> in the text, and {len(images)} images")
    return [i if isinstance(i, Carried) else image_cell(i, root) for i in images]


def _listed(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _shows(value: Any, test: Any) -> bool:
    return any(isinstance(v, Carried) or test(v) for v in _listed(value))


def _images(
    cells: list, tables: Dataset | None, root: Path, places: list[str], problems: Problems
) -> Dataset:
    """The column of images. Images in the data's own column are not copied, if that is possible.

    Args:
        cells: A cell, a `Carried` or None for each row.
        tables: The data set with the columns that the `Carried` name; None if there is none.
        root: Folder that paths start from.
        places: `FILE:ROW` of each row.
        problems: A line is added for each image that cannot be found.
    """
    kind = features(["image"])
    used = sorted({cell.column for cell in cells if isinstance(cell, Carried)})
    if tables is None or not used:
        return Dataset.from_dict({"image": cells}, features=kind)
    chosen = tables.select_columns(used)
    _find_paths(cells, chosen, root, places, problems)
    one_column = len(used) == 1 and not isinstance(chosen.features[used[0]], List)
    if one_column and not any(isinstance(cell, dict) for cell in cells):
        if cells.count(None) == chosen.data.column(used[0]).null_count:
            return chosen if used == ["image"] else chosen.rename_column(used[0], "image")

    def pick(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        picked = []
        for offset, index in enumerate(indices):
            cell = cells[index]
            if isinstance(cell, Carried):
                value = batch[cell.column][offset]
                cell = value[cell.index] if isinstance(value, list) else value
            picked.append(cell)
        return {"image": picked}

    return chosen.map(pick, with_indices=True, batched=True, remove_columns=used, features=kind)


def _find_paths(
    cells: list, chosen: Dataset, root: Path, places: list[str], problems: Problems
) -> None:
    """Replace each `Carried` whose image is only a path by a cell with this path.

    Args:
        cells: A cell, a `Carried` or None for each row; changed in place.
        chosen: The columns that the `Carried` name.
        root: Folder that paths start from, and that must contain the image files.
        places: `FILE:ROW` of each row.
        problems: A line is added for each image that cannot be found.
    """
    index = 0
    for table in batches(chosen):
        for offset in range(table.num_rows):
            cell = cells[index]
            if isinstance(cell, Carried):
                scalar = table.column(cell.column)[offset]
                scalar = scalar.values[cell.index] if isinstance(scalar, pa.ListScalar) else scalar
                if not scalar["bytes"].is_valid:
                    try:
                        cells[index] = image_cell(scalar.as_py(), root)
                    except ImageError as error:
                        cells[index] = None
                        line = f"{places[index]} image: {error}"
                        problems[index] = [*problems.get(index, ()), line]
            index += 1

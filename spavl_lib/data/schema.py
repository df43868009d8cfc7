"""The schema of the rows of every source, and the raw column names of the Hub's files.

A preference row has `id, prompt, chosen, rejected, image, image_name, class1, class2, class3,
question_type`. A prompt row lacks `chosen` and `rejected`. `image` is `{"bytes", "path"}` and is
decoded when a batch is made; in a text-only row it is None. Unknown classes and question types are
empty text. A prompt may have several turns, separated by `TURN`. The first turn is the user's. An
attacked prompt row may also have `prefill`: words that begin its response.

If any row of a set has several images, the set also has the column `more_images`: for each row a
list of the cells after `image`.
"""

from collections.abc import Iterable, Iterator

import pyarrow as pa
from datasets import Dataset, Features, Image, List, Value

TEXT = ("id", "prompt", "chosen", "rejected", "image_name", "class1", "class2", "class3")
PREFERENCE_COLUMNS = (*TEXT, "question_type", "image")
MORE = "more_images"  # column of the images after the first
PROMPT_COLUMNS = tuple(c for c in PREFERENCE_COLUMNS if c not in ("chosen", "rejected"))
# Column name on the Hub -> name in this schema.
HUB_RENAMES = {"question": "prompt"}
HUB_REQUIRED = {
    "train": ("image", "question", "chosen", "rejected", "image_name"),
    "validation": ("image", "question", "chosen", "rejected", "class1", "class2", "class3"),
    "test": ("image", "question", "class1", "class2", "class3"),
}
ORIGINAL_REQUIRED = ("id", "question", "chosen", "rejected")
QUESTION_TYPES = ("easy", "hardq", "hards")
# Number of rows up to which all images are decoded while the rows are loaded. In larger sets with
# `on_bad_rows: error`, an image is decoded only when a batch is made.
DECODE_ALL_UP_TO = 5_000
MAX_CHARACTERS = 50_000  # largest length of one text, over ten times what any model here reads
TURN = "\x1e"  # ASCII's record separator; it separates turns, and no turn may contain it
BATCH = 1_000  # rows held in memory at once


def features(columns: Iterable[str]) -> Features:
    """Arrow types of columns. Images stay encoded; all other columns are text."""
    image = Image(decode=False)
    kinds = {"image": image, MORE: List(image)}
    return Features({c: kinds.get(c, Value("string")) for c in columns})


def image_columns(rows: Dataset) -> list[str]:
    """The columns of a set that hold images."""
    return [name for name in ("image", MORE) if name in rows.column_names]


def image_cells(row: dict) -> list:
    """The cells of a row's images, in order; empty for a text-only row."""
    return [] if row.get("image") is None else [row["image"], *(row.get(MORE) or ())]


def more_images(rows: Dataset) -> Iterator[list]:
    """For each row the cells of its images after the first."""
    if MORE not in rows.column_names:
        yield from ([] for _ in range(len(rows)))
        return
    for table in batches(rows.select_columns([MORE])):
        yield from (cells or [] for cells in table.column(MORE).to_pylist())


def text_columns(columns: dict[str, list[str]]) -> Dataset:
    """Columns of text as a data set. `Dataset.from_dict` is slower: it inspects every cell."""
    return Dataset(pa.table({n: pa.array(v, pa.string()) for n, v in columns.items()}))


def batches(rows: Dataset) -> Iterator[pa.Table]:
    """The rows in Arrow tables of at most `BATCH` rows, to limit the use of memory."""
    if len(rows):
        yield from rows.with_format("arrow").iter(batch_size=BATCH)


def decoded(table: pa.Table) -> Iterator[tuple[dict, list[str]]]:
    """A table's rows as dicts, each with the names of its fields that are not valid UTF-8."""
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
    """A text column as a list, with None for cells that are missing or not valid UTF-8."""
    tables = batches(rows.select_columns([name]))
    return [row[name] for table in tables for row, _ in decoded(table)]

"""The one schema every door opens into, and the only place with raw column names.

A preference row has `id, prompt, chosen, rejected, image, image_name, class1, class2, class3,
question_type`; a prompt row lacks `chosen` and `rejected`. `image` is `{"bytes", "path"}`, decoded
when a batch is made. Unknown classes and types are empty text.
"""

from collections.abc import Iterable, Iterator

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
SEED_REQUIRED = ("id", "question", "chosen", "rejected")
DECODE_ALL_UP_TO = 5_000  # rows; above it images are decoded as batches are made


def features(columns: Iterable[str]) -> Features:
    """Arrow types of the given columns: text, and images left encoded."""
    return Features({c: Image(decode=False) if c == "image" else Value("string") for c in columns})


def text_problems(row: dict, where: str, *, preference: bool) -> Iterator[str]:
    """What is wrong with a row's text fields.

    Args:
        row: In this schema.
        where: `FILE:ROW`.
        preference: Whether answers are expected.

    Yields:
        `FILE:ROW field: reason`.
    """
    for name in ("prompt", "chosen", "rejected") if preference else ("prompt",):
        value = row.get(name)
        if not isinstance(value, str):
            yield f"{where} {name}: expected text, got {type(value).__name__}"
        elif not value.strip():
            yield f"{where} {name}: empty"
        elif "\0" in value:
            yield f"{where} {name}: holds a NUL character"
        elif not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            yield f"{where} {name}: holds half a surrogate pair, which is no text"
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


def check_rows(
    rows: Dataset, source: str, *, preference: bool, without_bytes: Iterable[int] = ()
) -> None:
    """Check every row's text, and decode every image of a set small enough.

    Args:
        rows: In this schema.
        source: File they came from.
        preference: Whether answers are expected.
        without_bytes: Rows whose image should be embedded and is not.

    Raises:
        InputError: Lists all offenders by file and row.
    """
    problems, seen = [], {}
    columns = [c for c in rows.column_names if c != "image"]
    for index, row in enumerate(rows.select_columns(columns)):
        where = f"{source}:{index}"
        problems += text_problems(row, where, preference=preference)
        if row["id"] in seen:
            problems.append(f"{where} id: {row['id']!r} repeats row {seen[row['id']]}")
        seen.setdefault(row["id"], index)
    bad = {index: "a path without the file's bytes" for index in without_bytes}
    if "image" in rows.column_names and len(rows) <= DECODE_ALL_UP_TO:
        for index, cell in enumerate(rows["image"]):
            try:
                if cell is not None and index not in bad:  # None: a text-only record
                    decode(cell)
            except ImageError as error:
                bad[index] = str(error)
    problems += [f"{source}:{index} image: {bad[index]}" for index in sorted(bad)]
    raise_all(problems, source)

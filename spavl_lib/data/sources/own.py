"""Your own preference data: anything that the `datasets` library opens, in any known layout.

This may be a JSON or JSON Lines file, a folder with such files, a parquet or CSV file, a saved data
set, or a name on the Hub. The profile names the columns. Otherwise columns are recognised by the
names that TRL and LLaMA-Factory use (`data.sources.records`).
"""

import json
import os
from collections.abc import Iterable, Iterator
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
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)

from spavl_lib.config import ColumnsConfig, DataConfig
from spavl_lib.data.images import ImageError, resolve_inside
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
    PREFERENCE_COLUMNS,
    batches,
    features,
)
from spavl_lib.data.sources.base import Source, register_source
from spavl_lib.data.sources.records import RecordError, marks, once, read_pair
from spavl_lib.data.taxonomy import PARENTS
from spavl_lib.errors import InputError

# Stands for the path of an image that is embedded in the data, until the image is attached.
EMBEDDED = "\0embedded"


@register_source("datasets")
class OwnRows(Source):
    """Anything that the `datasets` library opens."""

    def preferences(self, split: str) -> Loaded:
        """Rows of `data.train_split` or `data.validation_split`."""
        return load(self.config, split)

    def files(self, split: str) -> list[Path]:
        """The file, or all files of the folder. For a name on the Hub there are no files."""
        path = Path(self.config.path).expanduser()
        return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def load(config: DataConfig, split: str) -> Loaded:
    """Read a split into the schema.

    Args:
        config: Says what to read, by `path`, `subset`, `revision`, `train_split`,
            `validation_split`, `columns`, `image_root` and `on_bad_rows`.
        split: `train` or `validation`.

    Raises:
        InputError: There is nothing to read, columns are unknown, or rows are bad. The message
            lists all bad rows.
    """
    if not config.path:
        raise InputError("data.path is empty, but data.source is 'datasets'")
    path = Path(config.path).expanduser()
    split_name = config.train_split if split == "train" else config.validation_split
    table = _json_file(path, split, split_name)
    if table is None:
        rows = _opened(config, path, split_name)
        records: Iterable[tuple[str, Any]] = _records(rows, f"{config.path}[{split_name}]")
        images = _embedded_images(rows, config.columns)
    else:
        records, images = _read_json(table), None
    root = Path(config.image_root).expanduser() if config.image_root else _folder(path)
    return _assemble(records, images, root, split, config)


def _assemble(
    records: Iterable[tuple[str, Any]],
    images: Dataset | None,
    root: Path,
    split: str,
    config: DataConfig,
) -> Loaded:
    """Turn records into rows, attach embedded images, and find the problems of both."""
    parsed, places, problems = [], [], {}
    outside: list[int] = []
    for index, (place, record) in enumerate(records):
        row, lines = _row(record, place, root, f"{split}/{index}", config.columns)
        parsed.append(row)
        places.append(place)
        if lines:
            problems[index] = lines
    if not parsed:
        raise InputError(f"{config.path}: no records")
    table = {c: [r[c] for r in parsed] for c in PREFERENCE_COLUMNS}
    embedded = [cell is not None and cell["path"] == EMBEDDED for cell in table["image"]]
    if any(embedded) and images is not None:
        problems |= _paths_among_embedded(table["image"], embedded, places, problems)
        outside = _outside(images, root)
        for index in outside:
            line = f"{places[index]} image: neither the file's bytes nor a file in {root}"
            problems[index] = [*problems.get(index, ()), line]
        del table["image"]
        text = Dataset.from_dict(table, features=features(table))
        rows = concatenate_datasets([text, images], axis=1)
        rows = rows.select_columns(list(PREFERENCE_COLUMNS))
    else:
        rows = Dataset.from_dict(table, features=features(PREFERENCE_COLUMNS))
    decode_all = len(rows) <= DECODE_ALL_UP_TO or config.on_bad_rows == "skip"
    row_problems = find_problems(
        rows, places.__getitem__, preference=True, images=decode_all, turns=True
    )
    return without_bad_rows(
        rows, merge_problems(problems, row_problems, places), config.path, config.on_bad_rows
    )


def _outside(images: Dataset, root: Path) -> list[int]:
    """Numbers of rows whose image has no bytes and a path outside the root."""
    outside = []
    cells = (cell for table in batches(images) for cell in table.column("image").to_pylist())
    for index, cell in enumerate(cells):
        if cell is not None and not cell["bytes"]:
            path = os.path.realpath(cell["path"] or "")
            if not path.startswith(os.path.realpath(root) + os.sep):
                outside.append(index)
    return outside


def _paths_among_embedded(
    cells: list, embedded: list[bool], places: list[str], known: Problems
) -> Problems:
    """Problems of rows whose image is only a path, although other rows have embedded images."""
    return {
        i: [f"{places[i]} image: a path without the file's bytes"]
        for i, (cell, is_embedded) in enumerate(zip(cells, embedded, strict=True))
        if cell is not None and not is_embedded and i not in known
    }


def _row(
    record: Any, place: str, root: Path, name: str, columns: ColumnsConfig
) -> tuple[dict, list[str]]:
    """A record as a row, and the record's problems. The row's image is a path or `EMBEDDED`."""
    row: dict[str, Any] = dict.fromkeys(PREFERENCE_COLUMNS, "") | {"image": None, "id": name}
    if isinstance(record, RecordError):
        return row, [f"{place} {record}"]
    if not isinstance(record, dict):
        return row, [f"{place} record: expected an object, got {type(record).__name__}"]
    problems = []
    for field in ("id", "image_name", "class3", "question_type"):
        value = record.get(getattr(columns, field) or field)
        if value is not None and value != "":
            row[field] = str(value)
    if row["class3"] in PARENTS:
        row["class1"], row["class2"] = PARENTS[row["class3"]]
    read, lines = read_pair(record, columns)
    problems += [f"{place} {line}" for line in lines]
    # A field that cannot be read gets its name as text, or else it would be reported as empty too.
    row |= {n: read.get(n, n if lines else "") for n in ("prompt", "chosen", "rejected")}
    try:
        row["image"] = _image(record, root, columns)
    except ImageError as error:
        problems.append(f"{place} image: {error}")
    if row["image"] and not row["image_name"] and row["image"]["path"] != EMBEDDED:
        row["image_name"] = Path(row["image"]["path"]).name
    return row, [*problems, *blank_unstorable(row, place)]


def _image(record: dict, root: Path, columns: ColumnsConfig) -> dict | None:
    """The record's image: a path under the root, or `EMBEDDED`; None if there is no image.

    Raises:
        ImageError: There are several images, the text has more `<image>` marks than there are
            images, or the path leaves the root.
    """
    value = record.get(columns.image or "image")
    if value is None and not columns.image:
        value = record.get("images")
    values = value if isinstance(value, list | tuple) else [value]
    images = [v for v in values if v not in (None, "")]
    if len(images) > 1:
        raise ImageError(f"{len(images)} images; a row can have one")
    marked = marks(record)
    if marked > 1 or (marked and not images):
        raise ImageError(f"{marked} <image> in the text, and {len(images)} images")
    if not images:
        return None
    if images[0] == EMBEDDED:
        return {"bytes": None, "path": EMBEDDED}
    if not isinstance(images[0], str):
        raise ImageError(f"expected a path, got {type(images[0]).__name__}")
    return {"bytes": None, "path": str(resolve_inside(root, images[0]))}


# --- opening ------------------------------------------------------------------------------------


def _json_file(path: Path, split: str, split_name: str) -> Path | None:
    """The JSON file of a split; None if there is none.

    This module reads JSON without the `datasets` library, so that errors name the row.
    """
    if path.is_file() and path.suffix in (".json", ".jsonl"):
        if split != "train":
            candidates = [path.with_name(f"{split_name}{end}") for end in (".json", ".jsonl")]
            held_out = [p for p in candidates if p.is_file()]
            if not held_out:
                raise InputError(
                    f"no held-out pairs: {candidates[0]} does not exist; put them there, or set "
                    "data.path to a folder with train.json and validation.json"
                )
            return held_out[0]
        return path
    if path.is_dir():
        for end in (".json", ".jsonl"):
            if (path / f"{split_name}{end}").is_file():
                return path / f"{split_name}{end}"
    return None


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """(`FILE:ROW`, record) for each record of a JSON list or of JSON Lines.

    If a line cannot be read, its record is a `RecordError`, which is listed with other problems.

    Raises:
        InputError: The file is not UTF-8 text, or it is JSON but not a list.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not UTF-8 text: {error}") from error
    if path.suffix == ".json" and not text.lstrip().startswith("{"):
        try:
            records = json.loads(text, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON: {error}") from error
        if not isinstance(records, list):
            kind = type(records).__name__
            raise InputError(f"{path}: expected a list of records, got {kind}")
        yield from ((f"{path}:{i}", r) for i, r in enumerate(records))
        return
    # Not splitlines(), which also splits at separators inside JSON strings.
    lines = (line for line in text.split("\n") if line.strip())
    for number, line in enumerate(lines):
        try:
            record = json.loads(line, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            record = RecordError(f"record: not JSON: {error}")
        yield f"{path}:{number}", record


def _opened(config: DataConfig, path: Path, split_name: str) -> Dataset:
    """A split that the `datasets` library opens from a path or the Hub. Images stay encoded."""
    datasets.disable_progress_bars()
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = load_from_disk(str(path))
            rows = saved[split_name] if isinstance(saved, DatasetDict) else saved
        elif path.is_file():
            kind = {".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}.get(path.suffix, "parquet")
            rows = load_dataset(kind, data_files=str(path), split="train")
        else:
            rows = load_dataset(
                config.path,
                config.subset or None,
                split=split_name,
                revision=config.revision or None,
            )
    except Exception as error:  # pyarrow, the library and the Hub's client raise many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"cannot open data.path {config.path!r}, {split_name}: {reason}"
        ) from error
    for name, kind in rows.features.items():
        if isinstance(kind, Image):
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(kind, List) and isinstance(kind.feature, Image):
            rows = rows.cast(Features(rows.features | {name: List(Image(decode=False))}))
    return rows


def _records(rows: Dataset, source: str) -> Iterator[tuple[str, dict]]:
    """Rows as records, with `EMBEDDED` in place of every embedded image."""
    image_columns = [n for n, k in rows.features.items() if _is_image_type(k)]
    index = 0
    for table in batches(rows):
        stand_ins = {n: [_stand_in(c) for c in table.column(n)] for n in image_columns}
        for offset, row in enumerate(table.drop_columns(image_columns).to_pylist()):
            yield f"{source}:{index}", row | {n: cells[offset] for n, cells in stand_ins.items()}
            index += 1


def _stand_in(cell: Any) -> Any:
    """What stands for an Arrow scalar of images: None, `EMBEDDED`, or a list of `EMBEDDED`."""
    if not cell.is_valid:
        return None
    return [EMBEDDED] * len(cell) if isinstance(cell, pa.ListScalar) else EMBEDDED


def _is_image_type(kind: Any) -> bool:
    return isinstance(kind, Image) or (isinstance(kind, List) and isinstance(kind.feature, Image))


def _embedded_images(rows: Dataset, columns: ColumnsConfig) -> Dataset | None:
    """The column of embedded images as `image`; None if there is none. A list gives its first."""
    names = [columns.image] if columns.image else ["image", "images"]
    name = next((n for n in names if n in rows.features and _is_image_type(rows.features[n])), None)
    if name is None:
        return None
    image_column = rows.select_columns([name])
    if isinstance(rows.features[name], List):
        return image_column.map(
            lambda batch: {"image": [cells[0] if cells else None for cells in batch[name]]},
            batched=True,
            remove_columns=[name],
            features=Features({"image": Image(decode=False)}),
        )
    return image_column if name == "image" else image_column.rename_column(name, "image")


def _folder(path: Path) -> Path:
    return path.parent if path.is_file() else path

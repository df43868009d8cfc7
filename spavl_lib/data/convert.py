"""Convert data without loss between two layouts: `spavl data convert SRC DST`.

The layouts are that of the Hub, and that of the SPA-VL authors' code, here called original. Records
of the original layout have no fields for class and question type. The image's path contains the
class (`class1/class2/class3/image_name`), and each list holds the records of one type. If that is
not enough (several images have the same name, or a row has no image), the record gets extra fields,
which the authors' code ignores.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from hashlib import md5
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, Value
from tqdm.auto import tqdm

from spavl_lib.config import DataConfig
from spavl_lib.data.duplicates import content_of
from spavl_lib.data.load import folder_of, load_preferences, load_prompts
from spavl_lib.data.schema import HUB_REQUIRED, QUESTION_TYPES, TURN
from spavl_lib.data.sources import original
from spavl_lib.data.sources.hub import HAS_TURNS
from spavl_lib.data.sources.original import MAPS
from spavl_lib.data.taxonomy import PARENTS
from spavl_lib.errors import InputError

KEYWORDS = {"easy": "easy", "hardq": "hardq", "hards": "hardd"}  # question type -> authors' keyword
PROMPTS = "infer_{}.json"  # an inference list of the original layout: id, image, question
SHARD, GROUP = 12_000, 500  # largest number of rows of a parquet file, and of a row group


def convert(source: str, target: Path) -> dict[str, int]:
    """Write a data set in the other layout.

    Args:
        source: `mini`, or a folder in the Hub's or in the original layout.
        target: A new or empty folder.

    Returns:
        Rows written, by split.

    Raises:
        InputError: The source has problems, or the target holds files.
    """
    if target.exists() and any(target.iterdir()):
        raise InputError(f"{target} is not empty; choose a new folder")
    if (Path(source) / MAPS["train"]).is_file():
        return to_hub(Path(source), target)
    kind = "mini" if source == "mini" else "hub_layout"
    path = "" if kind == "mini" else source
    return to_original(_all_rows(kind, path), target)


def _all_rows(kind: str, path: str, image_root: str = "") -> DataConfig:
    return DataConfig(
        source=kind, path=path, image_root=image_root, train_rows=0, validation_rows=0, test_rows=0
    )


# --- to the original layout -----------------------------------------------------------------------


def to_original(config: DataConfig, target: Path) -> dict[str, int]:
    """Write the original layout.

    Args:
        config: The data to read.
        target: Folder that gets keyword maps, lists and `images/`.

    Returns:
        Records written, by split.
    """
    counts, number = {}, 0
    images = _Images(target / "images")
    for split, map_name in MAPS.items():
        if split == "validation" and not _has(config, "validation/validation-*.parquet"):
            continue
        rows = load_preferences(config, split)
        lists: dict[str, list] = {
            k: [] for k in (*(KEYWORDS[kind] for kind in QUESTION_TYPES), "untyped")
        }
        own = any(row_id != f"{split}/{n}" for n, row_id in enumerate(rows["id"]))
        for row in tqdm(rows, desc=split):
            keyword = KEYWORDS.get(row["question_type"], "untyped")
            answers = {"chosen": row["chosen"], "rejected": row["rejected"]}
            record = _record(row, number, images) | answers
            lists[keyword].append(record | {"id": _id(row["id"], number, own=own)})
            number += 1
        keyword_map = {}
        for keyword, records in lists.items():
            if records:
                keyword_map[keyword] = f"{split}_{keyword}.json"
                _write(target / keyword_map[keyword], records)
        _write(target / map_name, keyword_map)
        counts[split] = len(rows)
    for name in _prompt_sets(config):
        rows = load_prompts(config, name)
        own = any(row_id != f"{name}/{n}" for n, row_id in enumerate(rows["id"]))
        _write(
            target / PROMPTS.format(name),
            [
                _record(row, i, images) | {"id": _id(row["id"], i, own=own)}
                for i, row in enumerate(rows)
            ],
        )
        counts[name] = len(rows)
    return counts


def _has(config: DataConfig, pattern: str) -> bool:
    return bool(list(folder_of(config).glob(pattern)))


def _prompt_sets(config: DataConfig) -> list[str]:
    return sorted({p.name.split("-")[0] for p in folder_of(config).glob("test/*-*.parquet")})


def _id(row_id: str, number: int, *, own: bool) -> int | str:
    """The id that a row gets in its record.

    An id that is a number is written as a number. If the set has no ids of its own, the id only
    says the row's place in the set, and the row's number replaces it.

    Args:
        row_id: The id in the schema.
        number: The row's number.
        own: Whether the set has ids of its own, which must not change.
    """
    if _is_number(row_id):
        return int(row_id)
    return row_id if own else number


def _is_number(row_id: str) -> bool:
    return row_id.isascii() and row_id.isdigit() and str(int(row_id)) == row_id


def _record(row: dict, number: int, images: "_Images") -> dict:
    record: dict[str, Any] = {"id": number}
    in_path = ("", "")
    if row["image"] is not None:
        record["image"] = images.write(row, number)
        in_path = (record["image"].rpartition("/")[2], images.class_of(record["image"]))
    turns = row["prompt"].split(TURN)
    record["question"] = (
        row["prompt"]
        if len(turns) == 1
        else [{"from": ("Human", "Assistant")[i % 2], "value": t} for i, t in enumerate(turns)]
    )
    for field, value in zip(("image_name", "class3"), in_path, strict=True):
        if row[field] != value:
            record[field] = row[field]
    return record


class _Images:
    """Writes images into class folders.

    If two different images have the same path, the second image gets an extra top folder.
    """

    def __init__(self, root: Path):
        self.root = root
        self.written: dict[str, bytes] = {}  # path -> digest

    def write(self, row: dict, number: int) -> str:
        """Write a row's image, unless the same image is already written.

        Args:
            row: The row.
            number: Number of the row, from which an unused name is made if one is needed.

        Returns:
            The path for the record, relative to the root.

        Raises:
            InputError: The image's name is not a plain file name.
        """
        folders = [row["class1"], row["class2"], row["class3"]] if row["class3"] else []
        name = row["image_name"] or f"{number}.png"
        if Path(name).name != name or name in ("", ".", ".."):
            raise InputError(f"row {row['id']}: image_name {name!r} must be a plain file name")
        content = content_of(row["image"])
        digest = md5(content, usedforsecurity=False).digest()
        relative = "/".join([*folders, name])
        if self.written.get(relative, digest) != digest:
            relative = "/".join([f"same_name_{number}", *folders, name])
        if relative not in self.written:
            path = self.root / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            self.written[relative] = digest
        return relative

    @staticmethod
    def class_of(relative: str) -> str:
        """The class that a path contains; empty if the path contains no class."""
        parts = relative.split("/")
        folders = tuple(parts[-4:-2]) if len(parts) >= 4 else ()
        return parts[-2] if folders and PARENTS.get(parts[-2]) == folders else ""


# --- to the Hub's layout --------------------------------------------------------------------------


def to_hub(source: Path, target: Path) -> dict[str, int]:
    """Write the Hub's layout, with the meta files that hold classes and question types.

    Args:
        source: A folder in the original layout. Image paths start from its folder `images/` if that
            exists, else from `source`.
        target: Folder that gets `data/`, `validation/`, `test/` and `meta_files/`.

    Returns:
        Rows written, by split.
    """
    root = str(source / "images") if (source / "images").is_dir() else ""
    counts = {}
    for split, map_name in MAPS.items():
        if not (source / map_name).is_file():
            continue
        rows = _in_order(load_preferences(_all_rows("original", str(source), root), split))
        folder = {"train": "data", "validation": "validation"}[split]
        _write_parquet(target / folder, split, rows)
        if split == "train":
            _write_meta(target / "meta_files", rows)
        counts[split] = len(rows)
    for path in sorted(source.glob(PROMPTS.format("*"))):
        name = path.stem.removeprefix("infer_")
        rows = original.load_prompts(path, Path(root or source))
        _write_parquet(target / "test", name, rows)
        counts[name] = len(rows)
    return counts


def _in_order(rows: Dataset) -> Dataset:
    """Rows sorted by id if all ids are numbers, because the lists group rows by question type."""
    ids = rows["id"]
    if not all(map(_is_number, ids)):
        return rows
    return rows.select(sorted(range(len(rows)), key=lambda i: int(ids[i])))


def _write_parquet(folder: Path, split: str, rows: Dataset) -> None:
    kind = split if split in HUB_REQUIRED else "test"
    columns = list(HUB_REQUIRED[kind])
    ids = rows["id"]
    first = int(ids[0]) if len(rows) and _is_number(ids[0]) else 0
    if any(i != str(first + n) for n, i in enumerate(ids)):
        columns.append("id")  # the ids do not count up one by one, so they must be stored
    if kind != "train" and any(r["image_name"] != _name(r["image"]) for r in rows):
        columns.append("image_name")
    if kind == "validation" and any(rows["question_type"]):
        columns.append("question_type")
    if kind == "train" and any(r["class3"] and r["image"] is None for r in rows):
        # The meta files name classes by image, so they cannot hold the classes of these rows.
        columns += ["class1", "class2", "class3"]
    kinds = Features({c: Image() if c == "image" else Value("string") for c in columns})
    schema = kinds.arrow_schema
    if any(TURN in prompt for prompt in rows["prompt"]):
        schema = schema.with_metadata(schema.metadata | {HAS_TURNS: b"1"})
    folder.mkdir(parents=True, exist_ok=True)
    total = max(1, -(-len(rows) // SHARD))
    for shard in range(total):
        part = rows.select(range(shard * SHARD, min(len(rows), (shard + 1) * SHARD)))
        path = folder / f"{split}-{shard:05d}-of-{total:05d}.parquet"
        with pq.ParquetWriter(path, schema) as writer:
            for group in _groups(part, columns):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))


def _groups(rows: Dataset, columns: list[str]) -> Iterator[list[dict]]:
    group: list[dict] = []
    for row in tqdm(rows, desc="parquet", leave=False):
        cell = row["image"]
        record = {"question": row["prompt"]} | {c: row.get(c) for c in columns if c != "question"}
        if cell is not None:
            record["image"] = {"bytes": content_of(cell), "path": _name(cell)}
        group.append(record)
        if len(group) == GROUP:
            yield group
            group = []
    if group:
        yield group


def _name(cell: dict | None) -> str:
    return Path(cell["path"]).name if cell else ""


def _write_meta(folder: Path, rows: Dataset) -> None:
    info: dict[tuple, dict] = {}
    splits: dict[str, list] = defaultdict(list)
    for row in rows:
        relative = "/".join(
            [row["class1"], row["class2"], row["class3"], row["image_name"]]
            if row["class3"] else [row["image_name"]]
        )  # fmt: skip
        if row["class3"] and row["image"] is not None:
            digest = md5(content_of(row["image"]), usedforsecurity=False).hexdigest()
            info[relative, digest] = {
                "image": relative, "md5": digest,
                "class1": row["class1"], "class2": row["class2"], "class3": row["class3"],
            }  # fmt: skip
        if row["question_type"]:
            splits[row["question_type"]].append(
                {"image": relative, "question": row["prompt"], "chosen": row["chosen"],
                 "rejected": row["rejected"]}
            )  # fmt: skip
    _write(folder / "image_info/meta.json", list(info.values()))
    for kind, records in splits.items():
        _write(folder / f"split/{kind}.json", records)


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, ensure_ascii=False, indent=1)
    path.write_text(text + "\n", encoding="utf-8")

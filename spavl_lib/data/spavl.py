"""SPA-VL in its Hub layout, from a local folder: parquet with embedded images, and meta files.

The training rows carry neither class nor question type: both are joined from `meta_files/`. Rows
that find no partner keep empty fields and are counted, never dropped.
"""

import dataclasses
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
from datasets import Dataset, Image, load_dataset

from spavl_lib.config import DataConfig
from spavl_lib.data import seed_json
from spavl_lib.data.schema import (
    HUB_RENAMES,
    HUB_REQUIRED,
    PREFERENCE_COLUMNS,
    PROMPT_COLUMNS,
    check_rows,
    features,
)
from spavl_lib.data.taxonomy import PARENTS
from spavl_lib.embedded.mini import mini_folder
from spavl_lib.errors import InputError

QUESTION_TYPES = ("easy", "hardq", "hards")
EVAL_SETS = ("harm", "help", "look_alikes", "twins", "twins_exchanged")


def folder_of(config: DataConfig) -> Path:
    """The data set's folder.

    Raises:
        InputError: It does not exist.
    """
    if config.source == "mini":
        return mini_folder()
    if not config.path:
        raise InputError(f"data.path is empty, but data.source is {config.source!r}")
    folder = Path(config.path).expanduser()
    if not folder.exists():
        hint = ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", config.path):
            hint = (
                "; a data set on the Hub is downloaded first:\n"
                f"  hf download {config.path} --repo-type dataset --local-dir data/spa-vl\n"
                "  and then --set data.path=data/spa-vl"
            )
        raise InputError(f"data.path {config.path!r} does not exist{hint}")
    return folder


def load_preferences(config: DataConfig, split: str) -> Dataset:
    """Preference rows in the schema of `data.schema`.

    Args:
        config: Which rows, and how many.
        split: `train`, `validation` or, on mini, `twins`: pairs of rows over a risky and a safe
            picture, with the same two answers ranked either way.

    Raises:
        InputError: Missing files or columns, or bad rows: all of them, by file and row.
    """
    if config.source == "seed_json":
        rows = seed_json.load(
            folder_of(config),
            split,
            config.keywords,
            Path(config.image_root or config.path).expanduser(),
        )
    else:
        folder = folder_of(config)
        pattern = "data/train-*" if split == "train" else f"validation/{split}-*"
        kind = "train" if split == "train" else "validation"
        raw, source = _read(folder, pattern, HUB_REQUIRED[kind])
        rows = _to_schema(raw, split, PREFERENCE_COLUMNS, source)
        if split == "train":
            rows = _join(rows, folder / "meta_files")
        check_rows(rows, source, preference=True, without_bytes=_without_bytes(rows))
    if split == "twins":
        return whole_pairs(rows, config.test_rows)
    wanted = config.train_rows if split == "train" else config.validation_rows
    return subset(rows, wanted)


def load_prompts(config: DataConfig, name: str) -> Dataset:
    """Prompts of one evaluation set: harm, help and, on mini, look_alikes, twins and the rest.

    `twins_exchanged` gives each twin the other's image; the suffix `_twemoji` asks for held-out
    drawings.

    Raises:
        InputError: The source has no such set.
    """
    config = config if config.source != "seed_json" else _mini_like(config)
    base, _, drawing = name.partition("_twemoji")
    exchanged = base == "twins_exchanged"
    base = "twins" if exchanged else base
    config_name = "test_twemoji" if name.endswith("_twemoji") else "test"
    folder = folder_of(config)
    if not list(folder.glob(f"{config_name}/{base}-*.parquet")):
        known = sorted(p.name.split("-")[0] for p in folder.glob("test/*.parquet"))
        raise InputError(f"{folder} has no evaluation set {name!r} (it has {', '.join(known)})")
    raw, source = _read(folder, f"{config_name}/{base}-*", HUB_REQUIRED["test"])
    rows = _to_schema(raw, base, PROMPT_COLUMNS, source)
    check_rows(rows, source, preference=False, without_bytes=_without_bytes(rows))
    if exchanged:
        rows = exchange_twins(rows)
    return (
        whole_pairs(rows, config.test_rows) if base == "twins" else subset(rows, config.test_rows)
    )


def eval_sets(config: DataConfig, *, held_out_drawings: bool) -> list[str]:
    """Names of the evaluation sets a source has."""
    if config.source == "hub_layout":
        return ["harm", "help"]
    drawings = [f"{n}_twemoji" for n in EVAL_SETS[:4]] if held_out_drawings else []
    return [*EVAL_SETS, *drawings]


def load_truth(config: DataConfig) -> dict[str, dict]:
    """Row id -> what the builder knows of it. Mini only; others have none."""
    path = mini_folder() / "meta_files" / "truth.json"
    if config.source == "hub_layout":
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def subset(rows: Dataset, wanted: int, seed: int = 0) -> Dataset:
    """The first `wanted` rows of one seeded order, so that small sets lie within large ones."""
    if wanted <= 0 or wanted >= len(rows):
        return rows
    order = list(range(len(rows)))
    random.Random(f"subset/{seed}").shuffle(order)
    return rows.select(sorted(order[:wanted]))


def whole_pairs(rows: Dataset, wanted: int) -> Dataset:
    """The first `wanted` rows of twins, 0 for all, and never half a pair."""
    return rows.select(range(min(wanted - wanted % 2, len(rows)))) if wanted else rows


def with_images_of(rows: Dataset, others: list[int]) -> Dataset:
    """Every row over the picture of another one: row i takes that of row `others[i]`."""
    cells = list(rows["image"])
    moved = rows.remove_columns("image").add_column("image", [cells[i] for i in others])
    return moved.cast(features(moved.column_names))


def exchange_twins(rows: Dataset) -> Dataset:
    """Twins with their pictures exchanged within each pair."""
    return with_images_of(rows, [i ^ 1 for i in range(len(rows))])


def unmatched(rows: Dataset) -> dict[str, int]:
    """How many rows carry no class, and no question type."""
    return {
        "no_class": sum(not c for c in rows["class3"]),
        "no_question_type": sum(not t for t in rows["question_type"]),
    }


def _mini_like(config: DataConfig) -> DataConfig:
    """The original's layout has no evaluation prompts: those of mini stand in."""
    return dataclasses.replace(config, source="mini", path="")


def _read(folder: Path, pattern: str, required: tuple[str, ...]) -> tuple[Dataset, str]:
    datasets.disable_progress_bars()
    files = sorted(folder.glob(f"{pattern}.parquet"))
    if not files:
        raise InputError(f"no {pattern}.parquet under {folder}: is it in SPA-VL's Hub layout?")
    try:
        rows = load_dataset("parquet", data_files=[str(f) for f in files], split="train")
    except Exception as error:  # pyarrow and datasets raise many kinds
        raise InputError(f"cannot read {files[0]} (or its sister shards): {error}") from error
    missing = [c for c in required if c not in rows.column_names]
    if missing:
        raise InputError(
            f"{files[0]}: missing column {', '.join(missing)} "
            f"(found {', '.join(rows.column_names)})"
        )
    return rows, str(files[0])


def _to_schema(raw: Dataset, name: str, columns: tuple[str, ...], source: str) -> Dataset:
    try:
        rows = raw.cast_column("image", Image(decode=False))
    except Exception as error:  # pyarrow raises many kinds
        kind = raw.features["image"]
        raise InputError(f"{source}: column image is {kind}, not images: {error}") from error
    rows = rows.rename_columns({k: v for k, v in HUB_RENAMES.items() if k in rows.column_names})
    rows = rows.add_column("id", [f"{name}/{i}" for i in range(len(rows))])
    for column in columns:
        if column not in rows.column_names:
            if column == "image_name":
                values = [Path((c or {}).get("path") or "").name for c in rows["image"]]
            else:
                values = [""] * len(rows)
            rows = rows.add_column(column, values)
    return rows.select_columns(list(columns)).cast(features(columns))


def _without_bytes(rows: Dataset) -> list[int]:
    """Rows whose image names a file instead of carrying it: it could name any file on the disk."""
    column = rows.data.column("image")  # in its chunks: joined they may pass Arrow's 2 GiB
    lost = pc.and_(pc.is_valid(column), pc.is_null(pc.struct_field(column, "bytes")))
    return pc.indices_nonzero(lost).to_pylist()


def _read_meta(path: Path) -> list[dict]:
    """A meta file: a list of objects that name an image.

    Raises:
        InputError: It is something else.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(records, list):
        raise InputError(f"{path}: expected a list, got {type(records).__name__}")
    for index, record in enumerate(records):
        if not isinstance(record, dict) or not isinstance(record.get("image"), str):
            raise InputError(f"{path}:{index} image: missing")
    return records


def _unambiguous(pairs: Iterable[tuple[Any, str]]) -> dict[Any, str]:
    """Key -> value, without the keys that stand for two: a wrong partner is worse than none."""
    values: dict[Any, set[str]] = {}
    for key, value in pairs:
        values.setdefault(key, set()).add(value)
    return {key: next(iter(found)) for key, found in values.items() if len(found) == 1}


def _join(rows: Dataset, meta: Path) -> Dataset:
    """Attach classes by image name and question types by (image, question)."""
    info_path = meta / "image_info" / "meta.json"
    infos = _read_meta(info_path) if info_path.is_file() else []
    info = _unambiguous((Path(r["image"]).name, str(r.get("class3", ""))) for r in infos)
    splits = {t: meta / "split" / f"{t}.json" for t in QUESTION_TYPES}
    kinds = _unambiguous(
        ((Path(r["image"]).name, r.get("question")), question_type)
        for question_type, path in splits.items()
        if path.is_file()
        for r in _read_meta(path)
    )
    names, prompts = rows["image_name"], rows["prompt"]
    class3 = [info.get(Path(n).name, "") for n in names]
    joined = {
        "class1": [PARENTS[c][0] if c in PARENTS else "" for c in class3],
        "class2": [PARENTS[c][1] if c in PARENTS else "" for c in class3],
        "class3": class3,
        "question_type": [
            kinds.get((Path(n).name, q), "") for n, q in zip(names, prompts, strict=True)
        ],
    }
    rows = rows.remove_columns(list(joined))
    for name, values in joined.items():
        rows = rows.add_column(name, values)
    return rows.select_columns(list(PREFERENCE_COLUMNS))

"""The data a profile names, through whichever door, in the one schema of `data.schema`."""

import dataclasses
import json
from pathlib import Path

from datasets import Dataset

from spavl_lib.config import DataConfig
from spavl_lib.data.embedded.mini import mini_folder
from spavl_lib.data.sampling import of_sources, of_types, subset
from spavl_lib.data.schema import QUESTION_TYPES, Loaded, features
from spavl_lib.data.sources import hub, original, own
from spavl_lib.data.sources.join import answer_sources, unmatched, unmatched_rows
from spavl_lib.errors import InputError

EVAL_SETS = ("harm", "help", "look_alikes", "twins", "twins_exchanged")
__all__ = [
    "EVAL_SETS", "QUESTION_TYPES", "eval_sets", "exchange_twins", "folder_of", "load_preferences",
    "load_prompts", "load_truth", "read_preferences", "subset", "unmatched", "unmatched_rows",
    "whole_pairs", "with_images_of",
]  # fmt: skip


def folder_of(config: DataConfig) -> Path:
    """The data set's folder, fetched from the Hub if `path` is a name there.

    Raises:
        InputError: It does not exist, and the Hub does not give it.
    """
    if config.source == "mini":
        return mini_folder()
    if not config.path:
        raise InputError(f"data.path is empty, but data.source is {config.source!r}")
    folder = Path(config.path).expanduser()
    if folder.exists():
        return folder
    if config.source == "hub_layout" and hub.REPO_ID.fullmatch(config.path):
        return hub.fetch(config.path, config.revision, answers=bool(config.answer_sources))
    raise InputError(f"data.path {config.path!r} does not exist")


def load_preferences(config: DataConfig, split: str) -> Dataset:
    """Preference rows in the schema of `data.schema`.

    Args:
        config: Which rows, and how many.
        split: `train`, `validation` or, on mini, `twins`: pairs of rows over a risky and a safe
            picture, with the same two answers ranked either way.

    Raises:
        InputError: Missing files or columns, or bad rows: all of them, by file and row.
    """
    return read_preferences(config, split).rows


def read_preferences(config: DataConfig, split: str) -> Loaded:
    """As `load_preferences`, with a line for everything wrong with rows that were left out.

    Raises:
        InputError: As `load_preferences`; also, no row passes the filters.
    """
    if config.source == "original":
        folder = folder_of(config)
        root = Path(config.image_root or config.path).expanduser()
        loaded = original.load(folder, split, config.keywords, root, on_bad_rows=config.on_bad_rows)
    elif config.source == "datasets":
        loaded = own.load(config, split)
    else:
        folder = folder_of(config)
        pattern = hub.PATTERNS.get(split, f"validation/{split}-*")
        kind = "train" if split == "train" else "validation"
        loaded = hub.read(folder, pattern, kind, name=split, on_bad_rows=config.on_bad_rows)
    rows = loaded.rows
    if split == "twins":
        return dataclasses.replace(loaded, rows=whole_pairs(rows, config.test_rows))
    if split == "train":
        rows = _filtered(config, rows)
    wanted = config.train_rows if split == "train" else config.validation_rows
    rows = subset(rows, wanted, config.sampling_seed, config.sampling)
    return dataclasses.replace(loaded, rows=rows)


def load_prompts(config: DataConfig, name: str) -> Dataset:
    """Prompts of one evaluation set: harm, help and, on mini, look_alikes, twins and the rest.

    `twins_exchanged` gives each twin the other's image; the suffix `_twemoji` asks for held-out
    drawings.

    Raises:
        InputError: The source has no such set.
    """
    if config.source in ("original", "datasets"):  # they have none: those of mini stand in
        config = dataclasses.replace(config, source="mini", path="")
    base, _, drawing = name.partition("_twemoji")
    exchanged = base == "twins_exchanged"
    base = "twins" if exchanged else base
    config_name = "test_twemoji" if name.endswith("_twemoji") else "test"
    folder = folder_of(config)
    if not list(folder.glob(f"{config_name}/{base}-*.parquet")):
        known = sorted(p.name.split("-")[0] for p in folder.glob("test/*.parquet"))
        raise InputError(f"{folder} has no evaluation set {name!r} (it has {', '.join(known)})")
    rows = hub.read(
        folder, f"{config_name}/{base}-*", "test", name=base, on_bad_rows=config.on_bad_rows
    ).rows
    if exchanged:
        rows = exchange_twins(rows)
    if base == "twins":
        return whole_pairs(rows, config.test_rows)
    return subset(rows, config.test_rows, config.sampling_seed, config.sampling)


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


def _filtered(config: DataConfig, rows: Dataset) -> Dataset:
    """Rows of the question types and answer sources asked for.

    Raises:
        InputError: None is left, or nobody knows who gave which answer.
    """
    kept = of_types(rows, config.question_types)
    if config.answer_sources:
        if config.source not in ("mini", "hub_layout"):
            raise InputError(f"data.answer_sources: {config.source!r} does not say who answered")
        sources = answer_sources(kept, folder_of(config) / "meta_files")
        known = sorted(set().union(*sources[0], *sources[1]))
        unknown = sorted(set(config.answer_sources) - set(known))
        if unknown:
            raise InputError(f"data.answer_sources: no answer by {unknown} (known: {known})")
        kept = of_sources(kept, sources, config.answer_sources)
    if not len(kept) and len(rows):
        raise InputError(
            f"no training pair is of data.question_types {list(config.question_types)} and "
            f"data.answer_sources {list(config.answer_sources)}"
        )
    return kept

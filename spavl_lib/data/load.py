"""Load the rows that a config selects, from any source, in the schema of `data.schema`."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from datasets import Dataset

from spavl_lib.config import DataConfig
from spavl_lib.data.problems import Loaded
from spavl_lib.data.sampling import of_sources, of_types, subset
from spavl_lib.data.schema import (
    QUESTION_TYPES,
    features,
    image_columns,
)
from spavl_lib.data.set_names import set_parts
from spavl_lib.data.sources import hub, original, own  # noqa: F401 - they register themselves
from spavl_lib.data.sources.base import (
    EVAL_SETS,
    SOURCES,
    Source,
    open_source,
    register_source,
)
from spavl_lib.data.sources.extra import ExtraPairs
from spavl_lib.data.sources.join import unmatched, unmatched_rows
from spavl_lib.data.sources.mini import Mini
from spavl_lib.data.sources.own_prompts import OwnPrompts
from spavl_lib.errors import InputError

__all__ = [
    "EVAL_SETS", "QUESTION_TYPES", "SOURCES", "Source", "eval_sets", "exchange_twins", "folder_of",
    "load_pair_truth", "load_preferences", "load_prompts", "load_truth", "prompt_origin",
    "prompt_source", "read_preferences", "register_source", "subset", "unmatched", "unmatched_rows",
    "whole_pairs", "with_images_of",
]  # fmt: skip

# Seed that selects held-out pairs and prompts. It is fixed, so that all runs are measured on the
# same rows, however their training rows are selected.
MEASURING_SEED = 0


# Name and revision of SPA-VL in the profiles, and its numbers of rows as uploaded in 2024.
SPA_VL = ("sqrti/SPA-VL", "0e75b34a9e803a236873420c8680de3889befd62")
SPA_VL_ROWS = {"train": 93_258, "validation": 7_000, "harm": 265, "help": 265}


def check_whole(config: DataConfig, name: str, count: int) -> None:
    """Check that all rows of SPA-VL arrived.

    Args:
        config: Names the data set. Nothing is checked if it is not SPA-VL, or if bad rows are left
            out.
        name: Split or evaluation set.
        count: Number of rows that were read.

    Raises:
        InputError: The number of rows is not that of the uploaded data.
    """
    expected = SPA_VL_ROWS.get(name, count)
    if (config.path, config.revision) == SPA_VL and config.on_bad_rows == "error":
        if count != expected:
            raise InputError(
                f"{config.path}, {name}: {count:,} rows, but this revision has {expected:,}; "
                "remove its folder from the Hub's cache and read it again"
            )


def folder_of(config: DataConfig) -> Path:
    """The data set's folder. If `data.path` is a name on the Hub, the data set is fetched.

    Raises:
        InputError: The folder does not exist, and the data set cannot be fetched.
    """
    return open_source(config).folder


def prompt_source(config: DataConfig) -> Source:
    """The source of the evaluation sets.

    If `data.test_path` is set, the sets are read from there. Otherwise they come from the
    configured source, or from `mini` if the configured source has no evaluation sets.

    Raises:
        InputError: There is no source of the configured name.
    """
    if config.test_path:
        return OwnPrompts(config)
    source = open_source(config)
    if any(source.has_prompts(name) for name in source.eval_sets):
        return source
    return Mini(config)


_MINI_PROMPTS = {
    "test": "SPA-VL mini's built-in prompts",
    "development": "SPA-VL mini's development prompts, on which settings are chosen",
}


def prompt_origin(config: DataConfig) -> dict[str, Any]:
    """Where the prompts of the evaluation sets come from, as reports of measured numbers state it.

    Returns:
        `mini`: whether the prompts are those of SPA-VL mini; `own`: False if prompts of SPA-VL mini
        replace missing prompts of another source, else True; `name`: words for the prompts, to use
        in a sentence.
    """
    mini = isinstance(prompt_source(config), Mini)
    name = f"the prompts of {config.test_path or config.path}"
    return {
        "mini": mini,
        "own": not mini or config.source == "mini",
        "name": _MINI_PROMPTS[config.measure_on] if mini else name,
    }


def load_preferences(config: DataConfig, split: str) -> Dataset:
    """Load preference rows in the schema of `data.schema`.

    Each note about the whole set is shown as a warning.

    Args:
        config: Says which rows to load, and how many.
        split: `train`, `validation` or, only for `mini`, `twins`: pairs of rows with a risky and a
            safe image. Both rows have the same two responses, with opposite preferences.

    Raises:
        InputError: Files or columns are missing, or rows are bad. The message names all of them.
    """
    loaded = read_preferences(config, split)
    for note in loaded.notes:  # Python shows equal warnings only once
        warnings.warn(note, stacklevel=2)
    return loaded.rows


def read_preferences(config: DataConfig, split: str) -> Loaded:
    """Like `load_preferences`, but also return the notes, and the problems of rows left out.

    The pairs of `data.extra_path` follow those of the source.

    Args:
        config: As for `load_preferences`.
        split: As for `load_preferences`.

    Raises:
        InputError: As for `load_preferences`, or no row passes the filters.
    """
    source = open_source(config)
    loaded = source.preferences(split)
    rows = loaded.rows
    check_whole(config, split, len(rows))
    if split == "twins":
        return dataclasses.replace(loaded, rows=whole_pairs(rows, config.test_rows))
    if split == "train":
        rows = _filtered(source, rows)
        rows = subset(rows, config.train_rows, config.sampling_seed, config.sampling)
    else:
        rows = subset(rows, config.validation_rows, MEASURING_SEED)
    loaded = dataclasses.replace(loaded, rows=rows)
    return ExtraPairs(config).added(loaded, split) if config.extra_path else loaded


def load_prompts(config: DataConfig, name: str) -> Dataset:
    """Load the prompts of an evaluation set.

    Args:
        config: Says which source to use, and how many rows to load.
        name: A name of `eval_sets`. `twins_exchanged` gives each twin the image of the other twin.
            A name with an unseen style, such as `help_twemoji`, stands for those drawings.

    Raises:
        InputError: The source has no such set.
    """
    source = prompt_source(config)
    rows = source.prompts(name)
    check_whole(source.config, name, len(rows))
    base, _ = set_parts(name)
    if base == "twins_exchanged":
        rows = exchange_twins(rows)
    if base in ("twins", "twins_exchanged"):
        return whole_pairs(rows, config.test_rows)
    return subset(rows, config.test_rows, MEASURING_SEED)


def eval_sets(config: DataConfig, *, held_out_drawings: bool) -> list[str]:
    """Names of the evaluation sets.

    Args:
        config: Names the source.
        held_out_drawings: Whether to include the sets with drawings not seen in training.
    """
    source = prompt_source(config)
    unseen = source.held_out_drawings if held_out_drawings else ()
    drawings = [f"{name}_{source.unseen_style}" for name in unseen]
    return [name for name in (*source.eval_sets, *drawings) if source.has_prompts(name)]


def check_own_prompts(config: DataConfig) -> None:
    """Read the prompts of `data.test_path`, so that bad rows are refused before a long training.

    Raises:
        InputError: Rows are bad. The message names all of them.
    """
    if config.test_path:
        eval_sets(config, held_out_drawings=False)


def load_truth(config: DataConfig) -> dict[str, dict]:
    """Row id -> ground-truth labels of the evaluation rows; empty if their source has none."""
    return prompt_source(config).truth()


def load_pair_truth(config: DataConfig) -> dict[str, dict]:
    """Row id -> ground-truth labels of the preference rows; empty if their source has none."""
    return open_source(config).truth()


def whole_pairs(rows: Dataset, count: int) -> Dataset:
    """The first `count` rows of twins, without splitting a pair. 0 selects all rows."""
    return rows.select(range(min(count - count % 2, len(rows)))) if count else rows


def with_images_of(rows: Dataset, others: list[int]) -> Dataset:
    """Rows with exchanged images: row i gets the images of row `others[i]`."""
    exchanged = rows
    for name in image_columns(rows):
        cells = list(rows[name])
        exchanged = exchanged.remove_columns(name).add_column(name, [cells[i] for i in others])
    return exchanged.cast(features(exchanged.column_names))


def exchange_twins(rows: Dataset) -> Dataset:
    """Twins with their images exchanged within each pair."""
    return with_images_of(rows, [i ^ 1 for i in range(len(rows))])


def _filtered(source: Source, rows: Dataset) -> Dataset:
    """Rows of the configured question types and answer sources.

    Raises:
        InputError: No row is left, a configured answer source gave no response, or the data do not
            record who gave which response.
    """
    config = source.config
    selected = of_types(rows, config.question_types)
    if config.answer_sources:
        given_by = source.answer_sources(selected)
        known = sorted(set().union(*given_by[0], *given_by[1]))
        unknown = sorted(set(config.answer_sources) - set(known))
        if unknown:
            raise InputError(f"data.answer_sources: no answer by {unknown} (known: {known})")
        selected = of_sources(selected, given_by, config.answer_sources)
    if not len(selected) and len(rows):
        raise InputError(
            f"no training pair has data.question_types {list(config.question_types)} and "
            f"data.answer_sources {list(config.answer_sources)}"
        )
    return selected

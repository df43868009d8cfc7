"""Check preference data before training on them: `spavl data check PATH`.

The check covers the schema, every image, the length of sequences in tokens, duplicates, rows that
splits share, and the balance of classes. The report lists the problems of bad rows (at most
`explore.LISTED` a split) and describes the other rows.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

from transformers import ProcessorMixin

from spavl_lib.config import ColumnsConfig, DataConfig
from spavl_lib.data.explore import (
    NO_KEYS,
    SetKeys,
    copies,
    copies_sentence,
    describe,
    set_keys,
    shared,
    shared_between,
)
from spavl_lib.data.load import folder_of, load_prompts, read_preferences
from spavl_lib.data.problems import Loaded
from spavl_lib.data.sources.base import open_source
from spavl_lib.data.sources.hub import HubLayout
from spavl_lib.data.sources.original import MAPS
from spavl_lib.errors import InputError, nearest

SPLITS = ("train", "validation")


def check(
    path: str,
    *,
    source: str = "",
    image_root: str = "",
    revision: str = "",
    columns: Sequence[str] = (),
    extra: str = "",
    model: str = "",
    processor: ProcessorMixin | None = None,
    max_length: int = 0,
) -> dict:
    """Read a data set as a training run would, and describe it.

    Args:
        path: `mini`, a folder in the layout of the Hub or of the SPA-VL authors' code, the name of
            a data set on the Hub, or your own file.
        source: A value of `data.source`. If empty, the source is recognised from the path.
        image_root: Folder that image paths start from. If empty, they start from `PATH/images` if
            that folder exists, else from PATH, or from the folder of PATH if PATH is a file.
        revision: Commit, tag or branch, only for a name on the Hub.
        columns: Items `FIELD=COLUMN`: FIELD is a field of `data.columns`, and COLUMN is the column
            of your data that holds the field.
        extra: File of further pairs, as `data.extra_path` names it; empty: none.
        model: Name of the processor's model, for the report.
        processor: Counts tokens. None skips this count.
        max_length: Largest number of tokens of a sequence; 0 means no limit.

    Returns:
        - `problems`: number of problems in all splits; a set with copies of training rows is one.
        - `splits`: split -> its description by `explore.describe`, which lists the problems.
        - `shared`: set -> numbers of images and questions that the set has in common with `train`.
        - `shared_between`: the same numbers for every pair of the other sets.
        - `copies`: set -> ids of its rows that repeat image and question of a training row.
        - `path` and `source`; with a processor also `model` and `max_length`; with validation rows
          also `shared_images` and `shared_prompts`.

    Raises:
        InputError: There is nothing to read, or a whole file is damaged.
    """
    config = config_for(
        path, source=source, image_root=image_root, revision=revision, columns=columns, extra=extra
    )
    if config.source == "hub_layout" and not Path(path).exists():
        config = dataclasses.replace(config, path=str(folder_of(config)))
    report: dict = {"path": config.path or path, "source": config.source, "splits": {}}
    if processor is not None:
        report |= {"model": model, "max_length": max_length}
    keys: dict[str, SetKeys] = {}
    for split in SPLITS:
        loaded = _read(config, split)
        if loaded is None:
            continue
        report["splits"][split] = describe(loaded, processor, max_length)
        keys[split] = set_keys(loaded.rows) if loaded.rows is not None else NO_KEYS
    opened = open_source(config)
    for name in ("harm", "help"):
        if isinstance(opened, HubLayout) and opened.has_prompts(name):
            keys[name] = set_keys(load_prompts(config, name))
    report["shared"], report["shared_between"] = shared(keys), shared_between(keys)
    if "validation" in report["shared"]:
        report["shared_images"] = report["shared"]["validation"]["images"]
        report["shared_prompts"] = report["shared"]["validation"]["prompts"]
    report["copies"] = copies(keys)
    report["problems"] = sum(s["problem_count"] for s in report["splits"].values())
    report["problems"] += len(report["copies"])
    return report


def config_for(
    path: str,
    *,
    source: str = "",
    image_root: str = "",
    revision: str = "",
    columns: Sequence[str] = (),
    extra: str = "",
) -> DataConfig:
    """The config that reads all rows of a path and skips bad rows instead of raising.

    Args:
        path: As for `check`.
        source: As for `check`.
        image_root: As for `check`.
        revision: As for `check`.
        columns: As for `check`.
        extra: As for `check`.
    """
    folder = Path(path).expanduser()
    if not source:
        source = "datasets" if columns else _recognised(path, folder)
    if not image_root and source != "mini" and (folder / "images").is_dir():
        image_root = str(folder / "images")
    return DataConfig(
        source=source, path="" if source == "mini" else path, image_root=image_root,
        revision=revision, columns=_columns(columns), train_rows=0, validation_rows=0, test_rows=0,
        on_bad_rows="skip", extra_path=extra,
    )  # fmt: skip


def _columns(pairs: Sequence[str]) -> ColumnsConfig:
    """The setting `data.columns` from texts `FIELD=COLUMN`. A text may hold several, with commas
    between them."""
    known = [field.name for field in dataclasses.fields(ColumnsConfig)]
    named: dict[str, str] = {}
    for pair in (part for text in pairs for part in text.split(",")):
        field, equals, column = (word.strip() for word in pair.partition("="))
        if field not in known or not equals or not column or field in named:
            raise InputError(
                f"columns {pair!r}: expected FIELD=COLUMN with each of {', '.join(known)} at most "
                f"once{nearest(field, known)}"
            )
        named[field] = column
    return ColumnsConfig(**named)


def _recognised(path: str, folder: Path) -> str:
    if path == "mini":
        return "mini"
    if (folder / MAPS["train"]).is_file():
        return "original"
    if folder.is_file():
        return "datasets"
    if folder.is_dir() and not list(folder.glob("data/train-*.parquet")):
        return "datasets"
    return "hub_layout"


def _read(config: DataConfig, split: str) -> Loaded | None:
    """The good rows of a split; None if the data have no validation rows."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the report lists skipped rows
            return read_preferences(config, split)
    except InputError as error:
        absent = ("missing keyword map", "no validation", "no held-out pairs")
        if split == "validation" and any(words in str(error) for words in absent):
            return None
        raise


def table(report: dict) -> str:
    """The report as text."""
    lines = [f"{report['path']} ({report['source']})"]
    columns = list(report["splits"])
    cells = [_column(report["splits"][name], report) for name in columns]
    width = max((len(v) for c in cells for v in c.values()), default=8)
    lines.append(f"{'':<34}" + "  ".join(f"{name:>{width}}" for name in columns))
    for label in dict.fromkeys(key for c in cells for key in c):
        lines.append(f"{label:<34}" + "  ".join(f"{c.get(label, '-'):>{width}}" for c in cells))
    for name, common in report["shared"].items():
        counts = f"{common['images']} images, {common['prompts']} questions"
        lines.append(f"{'shared by train and ' + name:<34}{counts}")
    for names, common in report["shared_between"].items():
        if any(common.values()):
            counts = f"{common['images']} images, {common['prompts']} questions"
            lines.append(f"{'shared by ' + names:<34}{counts}")
    for name, split in report["splits"].items():
        if split["problems"]:
            lines.append(f"\n{name}: {split['problem_count']} problems")
            lines += [f"  {line}" for line in split["problems"][:20]]
            if split["problem_count"] > 20:
                more = split["problem_count"] - 20
                lines.append(f"  ... and {more} more (--json lists up to 1,000 of them)")
    lines += [f"\n{copies_sentence(name, ids)}" for name, ids in report["copies"].items()]
    notes: dict[str, list[str]] = {}
    for name, split in report["splits"].items():
        for note in split["notes"]:
            notes.setdefault(note, []).append(name)
    lines += [f"\n{' and '.join(names)}: warning: {note}" for note, names in notes.items()]
    count = report["problems"]
    verdict = f"{count} problem{'s' if count > 1 else ''}" if count else "no problems"
    return "\n".join([*lines, f"\n{verdict}"])


def _column(split: dict, report: dict) -> dict[str, str]:
    near, balance = split["near_duplicates"], split["balance"]
    cells = {
        "rows": f"{split['rows']:,}",
        "images": f"{split['images']:,}",
        "text-only rows": f"{split['text_only']:,}",
        "without class": f"{split['no_class']:,}",
        "without question type": f"{split['no_question_type']:,}",
        "same image and question": f"{split['duplicates']:,}",
        "near duplicates: images, questions": f"{near['pictures']:,}, {near['questions']:,}",
        "classes of 53": f"{balance['present']}",
    }
    if balance["present"]:
        cells["smallest class"] = f"{balance['smallest'][1]:,} ({balance['smallest'][0]})"
        cells["largest class"] = f"{balance['largest'][1]:,} ({balance['largest'][0]})"
        cells["evenness, 1 is best"] = f"{balance['evenness']:.3f}"
    for kind, count in sorted(split["question_type"].items()):
        if kind:
            cells[f"question type {kind}"] = f"{count:,}"
    if split["image_sizes"]:
        size, count = next(iter(split["image_sizes"].items()))
        cells["commonest image size"] = f"{size} ({count:,})"
        cells["largest, narrowest image"] = f"{split['largest_image']}, {split['narrowest_image']}"
    if "tokens" in split:
        tokens = split["tokens"]
        cells["tokens: median, 95 %, max"] = f"{tokens['median']}, {tokens['p95']}, {tokens['max']}"
        cells[f"over {report['max_length']} tokens"] = f"{tokens['over']:,}"
        cells["longest row"] = next(iter(tokens["longest_rows"]), "-")
    if split["image_in_text"]:
        cells["<image> typed in a question"] = f"{split['image_in_text']:,} (kept as words)"
    cells["problems"] = f"{split['problem_count']:,}"
    return cells

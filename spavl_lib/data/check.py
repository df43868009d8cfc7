"""A check of preference data before anything is trained on them: `spavl data check PATH`.

Schema, pictures that decode, lengths in tokens against the model's context, duplicates, what splits
share, and the balance of classes. Bad rows are listed, all of them; the rest is described without.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from spavl_lib.config import DataConfig
from spavl_lib.data.explore import describe, set_keys, shared
from spavl_lib.data.load import folder_of, load_prompts, read_preferences
from spavl_lib.data.schema import Loaded
from spavl_lib.data.sources.original import MAPS
from spavl_lib.errors import InputError

SPLITS = ("train", "validation")


def check(
    path: str,
    *,
    source: str = "",
    image_root: str = "",
    revision: str = "",
    model: str = "",
    processor: Any = None,
    max_length: int = 0,
) -> dict:
    """Read a data set as a training run would, and describe it.

    Args:
        path: `mini`, a folder in the Hub's layout or in the original's, a name on the Hub, or one's
            own file.
        source: A `data.source`; recognised if empty.
        image_root: Folder that image paths start from; `PATH/images` or PATH if empty.
        revision: Commit of a name on the Hub.
        model: Name of the processor's model, for the report.
        processor: Processor that counts tokens; without it none are counted.
        max_length: Largest number of tokens of a sequence; 0 for no limit.

    Returns:
        `problems` (their number; the lines are with each split), per split what `explore.describe`
        gives, and `shared`: pictures and questions that each other set has in common with `train`.

    Raises:
        InputError: Nothing there to read, or a file that is damaged as a whole.
    """
    config = config_for(path, source=source, image_root=image_root, revision=revision)
    if config.source == "hub_layout" and not Path(path).exists():
        config = dataclasses.replace(config, path=str(folder_of(config)))
    report: dict = {"path": config.path or path, "source": config.source, "splits": {}}
    if processor is not None:
        report |= {"model": model, "max_length": max_length}
    keys: dict[str, tuple[set[str], set[str]]] = {}
    for split in SPLITS:
        loaded = _read(config, split)
        if loaded is None:
            continue
        found = describe(loaded, processor, max_length)
        report["splits"][split] = found
        keys[split] = set_keys(loaded.rows) if loaded.rows is not None else (set(), set())
    for name in ("harm", "help"):
        if config.source in ("mini", "hub_layout") and _has_prompts(config, name):
            keys[name] = set_keys(load_prompts(config, name))
    report["shared"] = shared(keys)
    if "validation" in report["shared"]:
        report["shared_images"] = report["shared"]["validation"]["images"]
        report["shared_prompts"] = report["shared"]["validation"]["prompts"]
    report["problems"] = sum(s["problem_count"] for s in report["splits"].values())
    return report


def config_for(
    path: str, *, source: str = "", image_root: str = "", revision: str = ""
) -> DataConfig:
    """How a path is read: every row of it, bad ones left out and listed."""
    folder = Path(path).expanduser()
    if not source:
        source = _recognised(path, folder)
    if not image_root and (folder / "images").is_dir():
        image_root = str(folder / "images")
    return DataConfig(
        source=source, path="" if source == "mini" else path, image_root=image_root,
        revision=revision, train_rows=0, validation_rows=0, test_rows=0, on_bad_rows="skip",
    )  # fmt: skip


def _recognised(path: str, folder: Path) -> str:
    if path == "mini":
        return "mini"
    if (folder / MAPS["train"]).is_file():
        return "original"
    if folder.is_file() or any(folder.glob("*.json*")) or (folder / "state.json").is_file():
        if not list(folder.glob("data/train-*.parquet")):
            return "datasets"
    return "hub_layout"


def _read(config: DataConfig, split: str) -> Loaded | None:
    """A split's good rows; None if the set has no such split."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what was skipped is in the report
            return read_preferences(config, split)
    except InputError as error:
        absent = ("missing keyword map", "no validation", "no held-out pairs", "cannot open")
        if split == "validation" and any(words in str(error) for words in absent):
            return None
        raise


def _has_prompts(config: DataConfig, name: str) -> bool:
    return bool(list(folder_of(config).glob(f"test/{name}-*.parquet")))


def table(report: dict) -> str:
    """A report as lines to read."""
    lines = [f"{report['path']} ({report['source']})"]
    columns = list(report["splits"])
    cells = [_column(report["splits"][name], report) for name in columns]
    width = max((len(v) for c in cells for v in c.values()), default=8)
    lines.append(f"{'':<34}" + "  ".join(f"{name:>{width}}" for name in columns))
    for label in dict.fromkeys(key for c in cells for key in c):
        lines.append(f"{label:<34}" + "  ".join(f"{c.get(label, '-'):>{width}}" for c in cells))
    for name, common in report["shared"].items():
        said = f"{common['images']} pictures, {common['prompts']} questions"
        lines.append(f"{'shared by train and ' + name:<34}{said}")
    for name, split in report["splits"].items():
        if split["problems"]:
            lines.append(f"\n{name}: {split['problem_count']} problems")
            lines += [f"  {line}" for line in split["problems"][:20]]
            if split["problem_count"] > 20:
                lines.append(f"  ... and {split['problem_count'] - 20} more (--json has them)")
    verdict = f"{report['problems']} problems" if report["problems"] else "no problems"
    return "\n".join([*lines, f"\n{verdict}"])


def _column(split: dict, report: dict) -> dict[str, str]:
    near, even = split["near_duplicates"], split["balance"]
    cells = {
        "rows": f"{split['rows']:,}",
        "pictures": f"{split['images']:,}",
        "text-only rows": f"{split['text_only']:,}",
        "without class": f"{split['no_class']:,}",
        "without question type": f"{split['no_question_type']:,}",
        "same picture and question": f"{split['duplicates']:,}",
        "nearly: pictures, questions": f"{near['pictures']:,}, {near['questions']:,}",
        "classes of 53": f"{even['present']}",
    }
    if even["present"]:
        cells["smallest class"] = f"{even['smallest'][1]:,} ({even['smallest'][0]})"
        cells["largest class"] = f"{even['largest'][1]:,} ({even['largest'][0]})"
        cells["evenness, 1 is best"] = f"{even['evenness']:.3f}"
    for kind, count in sorted(split["question_type"].items()):
        if kind:
            cells[f"question type {kind}"] = f"{count:,}"
    if split["image_sizes"]:
        size, count = next(iter(split["image_sizes"].items()))
        cells["commonest picture size"] = f"{size} ({count:,})"
    if "tokens" in split:
        found = split["tokens"]
        cells["tokens: median, 95 %, max"] = f"{found['median']}, {found['p95']}, {found['max']}"
        cells[f"over {report['max_length']} tokens"] = f"{found['over']:,}"
    if split["image_in_text"]:
        cells["<image> typed in a question"] = f"{split['image_in_text']:,} (kept as words)"
    cells["problems"] = f"{split['problem_count']:,}"
    return cells

"""From the Hub's layout to the original's: `spavl data convert mini out/`."""

import json
from pathlib import Path

from tqdm.auto import tqdm

from spavl_lib.config import DataConfig
from spavl_lib.data.seed_json import MAPS
from spavl_lib.data.spavl import QUESTION_TYPES, load_preferences
from spavl_lib.errors import InputError

KEYWORDS = {"easy": "easy", "hardq": "hardq", "hards": "hardd"}  # the original's spelling


def convert(source: str, target: Path) -> dict[str, int]:
    """Write a data set in the original's layout.

    Args:
        source: `mini`, or a folder in the Hub's layout.
        target: A new or empty folder.

    Returns:
        Records written, by split.

    Raises:
        InputError: The source is bad, or the target holds files.
    """
    kind = "mini" if source == "mini" else "hub_layout"
    config = DataConfig(
        source=kind,
        path="" if kind == "mini" else source,
        train_rows=0,
        validation_rows=0,
        test_rows=0,
    )
    if target.exists() and any(target.iterdir()):
        raise InputError(f"{target} is not empty")
    counts, number = {}, 0
    for split, map_name in MAPS.items():
        rows = load_preferences(config, split)
        lists: dict[str, list] = {k: [] for k in (*map(KEYWORDS.get, QUESTION_TYPES), "untyped")}
        for row in tqdm(rows, desc=split):
            keyword = KEYWORDS.get(row["question_type"], "untyped")
            record = {"id": number}
            if row["image"] is not None:
                record["image"] = _write_image(row, target / "images", number)
            lists[keyword].append(
                record
                | {
                    "question": row["prompt"],
                    "chosen": row["chosen"],
                    "rejected": row["rejected"],
                }
            )
            number += 1
        keyword_map = {}
        for keyword, records in lists.items():
            if records:
                keyword_map[keyword] = f"{split}_{keyword}.json"
                _write(target / keyword_map[keyword], records)
        _write(target / map_name, keyword_map)
        counts[split] = len(rows)
    return counts


def _write_image(row: dict, root: Path, number: int) -> str:
    """Write a row's picture by its class, and give its path; names that clash are told apart."""
    folders = [row["class1"], row["class2"], row["class3"]] if row["class3"] else []
    name = row["image_name"] or f"{number}.png"
    if Path(name).name != name:
        raise InputError(f"row {row['id']}: image_name {name!r} must be a plain file name")
    content = row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes()
    image = root.joinpath(*folders, name)
    if image.exists() and image.read_bytes() != content:
        image = image.with_name(f"{number}_{name}")
    image.parent.mkdir(parents=True, exist_ok=True)
    image.write_bytes(content)
    return image.relative_to(root).as_posix()


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

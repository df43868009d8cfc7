"""The original's layout: `{id, image, question, chosen, rejected}` lists, and a keyword map.

`config_train.json` maps a keyword to a list's path; images lie under an image root, by class:
`class1/class2/class3/image_name`. Records without an image, and questions of several turns, are
taken.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset

from spavl_lib.data.images import ImageError, open_image, resolve_inside
from spavl_lib.data.schema import (
    DECODE_ALL_UP_TO,
    PREFERENCE_COLUMNS,
    SEED_REQUIRED,
    features,
    text_problems,
)
from spavl_lib.data.taxonomy import PARENTS, classes
from spavl_lib.errors import InputError, raise_all

MAPS = {"train": "config_train.json", "validation": "config_test.json"}
HUMAN, ASSISTANT = {"human", "user"}, {"assistant", "gpt"}
# The original calls the third list `hardd`.
TYPE_OF_KEYWORD = {"easy": "easy", "hardq": "hardq", "hardd": "hards", "hards": "hards"}


def load(folder: Path, split: str, keywords: tuple[str, ...], image_root: Path) -> Dataset:
    """Read a folder in the original's layout.

    Args:
        folder: Holds `config_train.json` and `config_test.json`.
        split: `train` or `validation`.
        keywords: Which lists; all of the map if empty.
        image_root: Folder image paths start from.

    Raises:
        InputError: Missing or unknown keyword, unreadable list, and every bad record by file and
            row: missing field, empty answer, repeated id, missing or unreadable image.
    """
    map_path = folder / MAPS[split]
    lists = read_keyword_map(map_path)
    unknown = [k for k in keywords if k not in lists]
    if unknown:
        raise InputError(f"{map_path}: unknown keyword {unknown} (known: {', '.join(lists)})")
    problems: list[str] = []
    rows, seen = [], {}
    for keyword in keywords or tuple(lists):
        path = folder / lists[keyword]
        for index, record in enumerate(_read_list(path)):
            where = f"{path}:{index}"
            row, found = _row(record, where, image_root, TYPE_OF_KEYWORD.get(keyword, ""))
            problems += found
            if row["id"] in seen:
                problems.append(f"{where} id: {row['id']} repeats {seen[row['id']]}")
            seen.setdefault(row["id"], where)
            rows.append(row)
    problems += _image_problems(rows, decode=len(rows) <= DECODE_ALL_UP_TO)
    raise_all(problems, str(map_path))
    if not rows:
        raise InputError(f"{map_path}: no records")
    table = {c: [r[c] for r in rows] for c in PREFERENCE_COLUMNS}
    return Dataset.from_dict(table, features=features(PREFERENCE_COLUMNS))


def read_keyword_map(path: Path) -> dict[str, str]:
    """A keyword map.

    Raises:
        InputError: Missing, not JSON, not text to text, or a list lies outside the folder.
    """
    if not path.is_file():
        raise InputError(f"missing keyword map {path}")
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(lists, dict) or not all(isinstance(v, str) for v in lists.values()):
        raise InputError(f"{path}: expected {{keyword: path}}")
    for keyword, relative in lists.items():
        try:
            resolve_inside(path.parent, relative)
        except ImageError as error:
            raise InputError(f"{path}: keyword {keyword!r}: {error}") from error
    return lists


def _read_list(path: Path) -> list:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(records, list):
        raise InputError(f"{path}: expected a list of records, got {type(records).__name__}")
    return records


def _row(record: object, where: str, root: Path, question_type: str) -> tuple[dict, list[str]]:
    empty = dict.fromkeys(PREFERENCE_COLUMNS, "") | {"image": None}
    if not isinstance(record, dict):
        return empty, [f"{where} record: expected an object, got {type(record).__name__}"]
    problems = [f"{where} {k}: missing" for k in SEED_REQUIRED if k not in record]
    relative = record.get("image") or ""
    parts = relative.split("/") if isinstance(relative, str) else []
    # A path says a class only if it lies in the original's folders: class1/class2/class3/name.
    in_classes = len(parts) >= 4 and (parts[-4] in classes(1) or parts[-3] in classes(2))
    class3 = parts[-2] if in_classes else ""
    row = empty | {
        "id": str(record.get("id", "")),
        "prompt": _question(record.get("question")),
        "chosen": record.get("chosen"),
        "rejected": record.get("rejected"),
        "image_name": parts[-1] if parts else "",
        "question_type": question_type,
        "class3": class3,
    }
    if class3 in PARENTS:
        row["class1"], row["class2"] = PARENTS[class3]
    if not problems:
        problems += text_problems(row, where, preference=True)
    if relative:
        try:
            path = resolve_inside(root, relative) if isinstance(relative, str) else None
            if path is None:
                raise ImageError(f"expected a path, got {type(relative).__name__}")
            row["image"] = {"bytes": None, "path": str(path), "_where": where}
        except ImageError as error:
            problems.append(f"{where} image: {error}")
    return row, problems


def _question(question: object) -> object:
    """A question, or a conversation's turns as one text; None if a turn is not understood."""
    if not isinstance(question, list):
        return question
    said = []
    for turn in question:
        speaker = str(turn.get("from")).lower() if isinstance(turn, dict) else ""
        if speaker not in HUMAN | ASSISTANT or not isinstance(turn.get("value"), str):
            return None
        answer = f"ASSISTANT: {turn['value']} USER:"
        said.append(turn["value"] if speaker in HUMAN else answer)
    return " ".join(said)


def _image_problems(rows: Iterable[dict], *, decode: bool) -> list[str]:
    problems = []
    for row in rows:
        if row["image"]:
            where = row["image"].pop("_where")
            try:
                if decode:
                    open_image(Path(row["image"]["path"]))
            except ImageError as error:
                problems.append(f"{where} image: {error}")
    return problems

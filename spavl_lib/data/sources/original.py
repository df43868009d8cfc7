"""The layout of the SPA-VL authors' code, here called original: JSON lists and a keyword map.

A list holds records `{id, image, question, chosen, rejected}`. `config_train.json` maps a keyword
to the path of a list. Images are in folders by class below an image root:
`class1/class2/class3/image_name`. Records without an image and questions of several turns are
accepted.
"""

import contextlib
import json
from pathlib import Path

from datasets import Dataset

from spavl_lib.data.images import ImageError, resolve_inside
from spavl_lib.data.problems import (
    Loaded,
    Problems,
    blank_unstorable,
    find_problems,
    merge_problems,
    text_problems,
    without_bad_rows,
)
from spavl_lib.data.schema import (
    DECODE_ALL_UP_TO,
    ORIGINAL_REQUIRED,
    PREFERENCE_COLUMNS,
    PROMPT_COLUMNS,
    TURN,
    features,
)
from spavl_lib.data.sources.base import Source, register_source
from spavl_lib.data.sources.records import RecordError, conversation, once, turns_of
from spavl_lib.data.taxonomy import PARENTS, classes
from spavl_lib.errors import InputError, raise_all

MAPS = {"train": "config_train.json", "validation": "config_test.json"}
# Keyword -> question type. The authors call the third list `hardd`.
TYPE_OF_KEYWORD = {"easy": "easy", "hardq": "hardq", "hardd": "hards", "hards": "hards"}


@register_source("original")
class Original(Source):
    """JSON lists in the layout of the SPA-VL authors' code."""

    @property
    def image_root(self) -> Path:
        """The folder that image paths start from."""
        return Path(self.config.image_root or self.config.path).expanduser()

    def preferences(self, split: str) -> Loaded:
        """Rows of the lists that `data.keywords` names."""
        config = self.config
        return load(
            self.folder, split, config.keywords, self.image_root, on_bad_rows=config.on_bad_rows
        )

    def files(self, split: str) -> list[Path]:
        """The keyword map, the lists, and the images that records name, if they can be read."""
        map_path = self.folder / MAPS[split]
        lists = read_keyword_map(map_path)
        files = [map_path]
        for keyword in self.config.keywords or tuple(lists):
            path = self.folder / lists.get(keyword, "")
            if not path.is_file():
                continue
            files.append(path)
            try:
                records = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                continue
            for record in records if isinstance(records, list) else ():
                name = record.get("image") if isinstance(record, dict) else None
                if isinstance(name, str) and name:
                    with contextlib.suppress(ImageError):
                        files.append(resolve_inside(self.image_root, name))
        return files


def load(
    folder: Path,
    split: str,
    keywords: tuple[str, ...],
    image_root: Path,
    *,
    on_bad_rows: str = "error",
) -> Loaded:
    """Read a folder in the original layout.

    Args:
        folder: Holds `config_train.json` and `config_test.json`.
        split: `train` or `validation`.
        keywords: Keywords of the lists to read. Empty reads all lists.
        image_root: Folder that image paths start from.
        on_bad_rows: `error` or `skip`.

    Raises:
        InputError: A keyword is unknown, a list cannot be read, or records are bad (missing field,
            empty response, repeated id, unreadable image). The message lists all bad records.
    """
    map_path = folder / MAPS[split]
    lists = read_keyword_map(map_path)
    unknown = [k for k in keywords if k not in lists]
    if unknown:
        raise InputError(f"{map_path}: unknown keyword {unknown} (known: {', '.join(lists)})")
    problems: Problems = {}
    parsed: list[dict] = []
    places: list[str] = []
    for keyword in keywords or tuple(lists):
        path = folder / lists[keyword]
        for index, record in enumerate(_read_list(path)):
            place = f"{path}:{index}"
            row, lines = _row(record, place, image_root, TYPE_OF_KEYWORD.get(keyword, ""))
            if lines:
                problems[len(parsed)] = lines
            parsed.append(row)
            places.append(place)
    if not parsed:
        raise InputError(f"{map_path}: no records")
    table = {c: [_text_or_cell(r[c]) for r in parsed] for c in PREFERENCE_COLUMNS}
    rows = Dataset.from_dict(table, features=features(PREFERENCE_COLUMNS))
    decode_all = len(rows) <= DECODE_ALL_UP_TO or on_bad_rows == "skip"
    row_problems = find_problems(
        rows, places.__getitem__, preference=True, images=decode_all, turns=True
    )
    return without_bad_rows(
        rows, merge_problems(problems, row_problems, places), str(map_path), on_bad_rows
    )


def _text_or_cell(value: object) -> object:
    """The value if it is text or an image cell, else None."""
    return value if isinstance(value, str | dict) else None


def load_prompts(path: Path, image_root: Path) -> Dataset:
    """Read an inference list of the original layout: `id`, `image`, `question`.

    Args:
        path: The list.
        image_root: Folder that image paths start from.

    Raises:
        InputError: Records are bad. The message lists all of them.
    """
    parsed: list[dict] = []
    problems: list[str] = []
    for index, record in enumerate(_read_list(path)):
        place = f"{path}:{index}"
        row, lines = _row(record, place, image_root, "", required=("id", "question"))
        problems += lines or text_problems(row, place, preference=False, turns=True)
        parsed.append(row)
    raise_all(problems, str(path))
    table = {c: [r[c] for r in parsed] for c in PROMPT_COLUMNS}
    return Dataset.from_dict(table, features=features(PROMPT_COLUMNS))


def read_keyword_map(path: Path) -> dict[str, str]:
    """Read a keyword map: keyword -> path of a list.

    Raises:
        InputError: The map is missing or has another form, or a list is outside the folder.
    """
    if not path.is_file():
        raise InputError(f"missing keyword map {path}")
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
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
        records = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(records, list):
        raise InputError(f"{path}: expected a list of records, got {type(records).__name__}")
    return records


def _row(
    record: object,
    place: str,
    root: Path,
    question_type: str,
    required: tuple[str, ...] = ORIGINAL_REQUIRED,
) -> tuple[dict, list[str]]:
    """A record as a row, and a line for each problem of the record."""
    empty = dict.fromkeys(PREFERENCE_COLUMNS, "") | {"image": None}
    if isinstance(record, RecordError):
        return empty, [f"{place} {record}"]
    if not isinstance(record, dict):
        return empty, [f"{place} record: expected an object, got {type(record).__name__}"]
    problems = [f"{place} {k}: missing" for k in required if k not in record]
    relative = record.get("image") or ""
    parts = relative.split("/") if isinstance(relative, str) else []
    # Only paths of the form class1/class2/class3/name contain a class.
    in_classes = len(parts) >= 4 and (parts[-4] in classes(1) or parts[-3] in classes(2))
    class3 = parts[-2] if in_classes else ""
    row = empty | {
        "id": str(record.get("id", "")),
        "image_name": parts[-1] if parts else "",
        "question_type": question_type,
        "class3": class3,
    }
    for name in ("image_name", "class3"):  # `data.convert` writes fields that the path lacks
        if isinstance(record.get(name), str):
            row[name] = record[name]
    if row["class3"] in PARENTS:
        row["class1"], row["class2"] = PARENTS[row["class3"]]
    for name in ("chosen", "rejected"):
        row[name] = record.get(name)
        if name in record and not isinstance(row[name], str):
            problems.append(f"{place} {name}: expected text, got {type(row[name]).__name__}")
    if "question" in record:
        try:
            row["prompt"] = _question(record["question"])
        except RecordError as error:
            problems.append(f"{place} {error}")
    if relative:
        try:
            path = resolve_inside(root, relative) if isinstance(relative, str) else None
            if path is None:
                raise ImageError(f"expected a path, got {type(relative).__name__}")
            row["image"] = {"bytes": None, "path": str(path)}  # type: ignore[assignment]
        except ImageError as error:
            problems.append(f"{place} image: {error}")
    return row, [*problems, *blank_unstorable(row, place)]


def _question(question: object) -> str:
    """A question, or the turns of a conversation, as a prompt.

    Raises:
        RecordError: The value is neither, or holds the separator of turns.
    """
    if isinstance(question, str):
        if TURN in question:
            raise RecordError("prompt: holds a record separator (U+001E)")
        return question
    if question is None:
        raise RecordError("prompt: expected text, got NoneType")
    return conversation(turns_of(question))

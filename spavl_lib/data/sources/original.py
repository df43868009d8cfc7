"""The layout of the SPA-VL authors' code, here called original: JSON lists and a keyword map.

A list holds records `{id, image, question, chosen, rejected}`. `config_train.json` maps a keyword
to the path of a list. Images are in folders by class below an image root:
`class1/class2/class3/image_name`. Records without an image and questions of several turns are
accepted.
"""

import contextlib
import json
import os
from pathlib import Path

from datasets import Dataset

from spavl_lib.config import ColumnsConfig
from spavl_lib.data.images import ImageError, holds_image, image_cell, names_image
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
    ORIGINAL_REQUIRED,
    PREFERENCE_COLUMNS,
    PROMPT_COLUMNS,
    features,
)
from spavl_lib.data.sources.base import EVAL_SETS, Source, register_source
from spavl_lib.data.sources.records import (
    RecordError,
    Turn,
    conversation,
    once,
    turns_of,
    unreadable,
)
from spavl_lib.data.taxonomy import PARENTS, classes
from spavl_lib.errors import InputError, raise_all

MAPS = {"train": "config_train.json", "validation": "config_test.json"}
PROMPTS = "infer_{}.json"  # an inference list: id, image, question
# Keyword -> question type. The authors call the third list `hardd`.
TYPE_OF_KEYWORD = {"easy": "easy", "hardq": "hardq", "hardd": "hards", "hards": "hards"}


@register_source("original")
class Original(Source):
    """JSON lists in the layout of the SPA-VL authors' code."""

    eval_sets = EVAL_SETS

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

    def prompts(self, name: str) -> Dataset:
        """Rows of the inference list of a set. `twins_exchanged` gives the rows of `twins`."""
        return load_prompts(self.folder / _prompt_list(name), self.image_root)

    def has_prompts(self, name: str) -> bool:
        """Whether the folder holds the inference list of this set."""
        return (self.folder / _prompt_list(name)).is_file()

    def files(self, split: str) -> list[Path]:
        """The keyword map and its lists, or the inference list of a set, and the image files that
        their records name. Records that cannot be read are passed over."""
        if split not in MAPS:
            return self._with_images([self.folder / _prompt_list(split)])
        map_path = self.folder / MAPS[split]
        lists = read_keyword_map(map_path)
        named = [self.folder / lists.get(k, "") for k in self.config.keywords or tuple(lists)]
        return [map_path, *self._with_images([p for p in named if p.is_file()])]

    def _with_images(self, lists: list[Path]) -> list[Path]:
        files = []
        for path in lists:
            files.append(path)
            try:
                records = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            records = records if isinstance(records, list) else []
            for record in (r for r in records if isinstance(r, dict)):
                with contextlib.suppress(ImageError, RecordError):  # reported when rows are read
                    turns = _question(record["question"]) if "question" in record else []
                    image = _image(record, turns)
                    cell = image_cell(image, self.image_root) if image else None
                    files += [Path(cell["path"])] if cell and not cell["bytes"] else []
        return files


def _prompt_list(name: str) -> str:
    return PROMPTS.format(name.removesuffix("_exchanged"))


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
        for number, record in enumerate(_read_list(path), 1):
            place = f"{path}:{number}"
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
    made: list[dict] = []
    places: list[str] = []
    problems: Problems = {}
    for index, record in enumerate(_read_list(path)):
        places.append(f"{path}:{index + 1}")
        row, found = _row(record, places[-1], image_root, "", required=("id", "question"))
        if found:
            problems[index] = found
        made.append(row)
    table = {c: [_text_or_cell(r[c]) for r in made] for c in PROMPT_COLUMNS}
    rows = Dataset.from_dict(table, features=features(PROMPT_COLUMNS))
    decode_all = len(rows) <= DECODE_ALL_UP_TO
    further = find_problems(
        rows, places.__getitem__, preference=False, images=decode_all, turns=True
    )
    lines = merge_problems(problems, further, places)
    raise_all([line for index in sorted(lines) for line in lines[index]], str(path))
    return rows


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
    return {keyword: _list_path(path, keyword, text) for keyword, text in lists.items()}


def _list_path(map_path: Path, keyword: str, text: str) -> str:
    """The path of a list, relative to the folder of the keyword map.

    The text in the map may be relative to that folder or to the working folder.

    Raises:
        InputError: The folder of the keyword map holds no such file.
    """
    folder = map_path.parent
    real_folder = Path(os.path.realpath(folder))
    for path in (folder / text, Path(text)):  # an absolute text is the same path in both
        with contextlib.suppress(OSError, ValueError):  # for example, the name is too long
            real = Path(os.path.realpath(path))
            if real.is_file() and real.is_relative_to(real_folder):
                return str(real.relative_to(real_folder))
    raise InputError(
        f"{map_path}: keyword {keyword!r}: {text!r} is no list in {folder}; write its "
        "path from that folder"
    )


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
    image = record.get("image") or ""
    shown = image.get("path") if isinstance(image, dict) else image
    parts = shown.split("/") if isinstance(shown, str) and not holds_image(shown) else []
    # Only paths of the form class1/class2/class3/name contain a class.
    in_classes = len(parts) >= 4 and (parts[-4] in classes(1) or parts[-3] in classes(2))
    class3 = parts[-2] if in_classes else ""
    row = empty | {
        "id": str(record.get("id", "")),
        "image_name": parts[-1] if parts else "",
        "question_type": question_type,
        "class3": class3,
    }
    for name in ("image_name", "class3"):  # `data.convert` writes them if the path lacks them
        if isinstance(record.get(name), str):
            row[name] = record[name]
    if row["class3"] in PARENTS:
        row["class1"], row["class2"] = PARENTS[row["class3"]]
    for name in ("chosen", "rejected"):
        row[name] = record.get(name)
        if name in record and not isinstance(row[name], str):
            problems.append(f"{place} {name}: expected text, got {type(row[name]).__name__}")
    problems += [f"{place} {line}" for line in unreadable(record, ColumnsConfig())]
    turns: list[Turn] = []
    if "question" in record:
        try:
            turns = _question(record["question"])
            row["prompt"] = conversation(turns)
        except RecordError as error:
            problems.append(f"{place} {error}")
    try:
        image = _image(record, turns)
        if image:
            row["image"] = image_cell(image, root)  # type: ignore[assignment]
    except ImageError as error:
        problems.append(f"{place} image: {error}")
    return row, [*problems, *blank_unstorable(row, place)]


def _image(record: dict, turns: list[Turn]) -> object:
    """A record's image in any form; None if it has none.

    Raises:
        ImageError: There are several images, the question has a place for an image that the record
            lacks, or an image is in a field that is not read.
    """
    images = [record["image"]] if record.get("image") else []
    images += [image for turn in turns for image in turn.images if image not in images]
    if len(images) > 1:
        raise ImageError(f"{len(images)} images; a row can have one")
    if not images and any(turn.places for turn in turns):
        raise ImageError("the question has a place for one, and the record has none")
    if not images:
        texts = ("id", "question", "chosen", "rejected", "image_name")
        named = [k for k, v in record.items() if k not in texts and names_image(v)]
        if named:
            raise ImageError(f"none, but field {named[0]!r} names one; its name must be 'image'")
    return images[0] if images else None


def _question(question: object) -> list[Turn]:
    """The turns of a question, or of a conversation.

    Raises:
        RecordError: The value is neither.
    """
    if question is None:
        raise RecordError("prompt: expected text, got NoneType")
    return turns_of(question)

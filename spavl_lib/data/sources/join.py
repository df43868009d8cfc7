"""Join classes, question types and sources of responses to training rows, from `meta_files/`.

A row without a match, or with matches that disagree, keeps empty fields. Such rows are counted and
listed. No row is dropped or gets a wrong class.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from spavl_lib.data.schema import (
    QUESTION_TYPES,
    column,
    text_columns,
)
from spavl_lib.data.taxonomy import PARENTS
from spavl_lib.errors import InputError


def join_meta(rows: Dataset, meta: Path) -> Dataset:
    """Join classes by image name, and question types by image name and question.

    Images of different classes may have the same name, because the SPA-VL authors keep images in
    class folders. In this case, the class comes from the image path that `meta_files/split/` has
    for the row's question, or else from the record in `meta_files/image_info/` with the image's
    md5.

    Args:
        rows: Training rows in the schema.
        meta: The `meta_files` folder. Files may be missing.

    Raises:
        InputError: A meta file has another form.
    """
    info_path = meta / "image_info" / "meta.json"
    info = read_meta(info_path) if info_path.is_file() else []
    classes = _Classes(info)
    del info
    kinds, folders = _question_types(meta)
    names = [str(n or "") for n in column(rows, "image_name")]
    prompts = [str(p or "").strip() for p in column(rows, "prompt")]
    class3, ambiguous = [], []
    given = column(rows, "class3")
    for index, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        joined = given[index] or classes.by_name(name) or folders.get((_base(name), prompt), "")
        class3.append(joined)
        if not joined and classes.is_ambiguous(name):
            ambiguous.append(index)
    for index in ambiguous:
        cell = rows[index]["image"]
        class3[index] = classes.by_md5(names[index], (cell or {}).get("bytes") or b"")
    joined_columns = {
        "class1": [PARENTS[c][0] if c in PARENTS else "" for c in class3],
        "class2": [PARENTS[c][1] if c in PARENTS else "" for c in class3],
        "class3": class3,
        "question_type": [
            t or kinds.get((_base(n), p), "")
            for t, n, p in zip(column(rows, "question_type"), names, prompts, strict=True)
        ],
    }
    order = rows.column_names
    rest = rows.remove_columns(list(joined_columns))
    return concatenate_datasets([rest, text_columns(joined_columns)], axis=1).select_columns(order)


def unmatched(rows: Dataset) -> dict[str, int]:
    """Number of rows without a class (`no_class`), and without a type (`no_question_type`)."""
    return {name: len(lines) for name, lines in unmatched_rows(rows).items()}


def unmatched_rows(rows: Dataset) -> dict[str, list[str]]:
    """Id and image name of the rows without a class, and without a question type."""
    columns = ("id", "image_name", "class3", "question_type")
    cells = list(zip(*(column(rows, c) for c in columns), strict=True))
    return {
        "no_class": [f"{i} ({n})" for i, n, c, _ in cells if not c],
        "no_question_type": [f"{i} ({n})" for i, n, _, t in cells if not t],
    }


def answer_sources(rows: Dataset, meta: Path) -> tuple[list[set[str]], list[set[str]]]:
    """Names of the models that gave each response, from `model_answer/<model>.json`.

    Args:
        rows: Training rows in the schema.
        meta: The `meta_files` folder.

    Returns:
        For each row the models that gave the chosen response, and those that gave the rejected one.

    Raises:
        InputError: There are no such files, or a file has another form.
    """
    files = sorted((meta / "model_answer").glob("*.json"))
    if not files:
        raise InputError(
            f"data.answer_sources needs {meta / 'model_answer'}/*.json, which this data set lacks"
        )
    models_of: dict[tuple, set[str]] = defaultdict(set)
    for path in files:
        for record in read_meta(path):
            for text in _answers(record):
                models_of[_key(record, text)].add(path.stem)
    cells = [column(rows, c) for c in ("image_name", "prompt", "chosen", "rejected")]
    sides: tuple[list[set[str]], list[set[str]]] = ([], [])
    for name, prompt, *answers in zip(*cells, strict=True):
        for side, answer in zip(sides, answers, strict=True):
            key = (_base(str(name)), str(prompt).strip(), str(answer).strip())
            side.append(models_of.get(key, set()))
    return sides


def read_meta(path: Path) -> list[dict]:
    """Read a meta file: a list of objects that name an image.

    Raises:
        InputError: The file has another form.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(records, list):
        raise InputError(f"{path}: expected a list, got {type(records).__name__}")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or not isinstance(record.get("image"), str):
            raise InputError(f"{path}:{number} image: missing")
    return records


def unambiguous(pairs: Iterable[tuple[Any, str]]) -> dict[Any, str]:
    """Key -> value, without keys that have two values. A wrong match is worse than none."""
    values: dict[Any, str] = {}
    ambiguous = set()
    for key, value in pairs:
        if values.setdefault(key, value) != value:
            ambiguous.add(key)
    return {key: value for key, value in values.items() if key not in ambiguous}


class _Classes:
    """Tertiary class of an image by its name, or by its md5 if the name is ambiguous."""

    def __init__(self, info: list[dict]):
        self.paths = unambiguous((r["image"], str(r.get("class3") or "")) for r in info)
        self.names: dict[str, set[tuple[str, str]]] = defaultdict(set)
        for record in info:
            pair = (str(record.get("md5") or ""), str(record.get("class3") or ""))
            self.names[_base(record["image"])].add(pair)

    def by_name(self, name: str) -> str:
        if "/" in name and name in self.paths:
            return self.paths[name]
        classes = {class3 for _, class3 in self.names.get(_base(name), ())}
        return next(iter(classes)) if len(classes) == 1 else ""

    def is_ambiguous(self, name: str) -> bool:
        return len({class3 for _, class3 in self.names.get(_base(name), ())}) > 1

    def by_md5(self, name: str, content: bytes) -> str:
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        classes = {class3 for known, class3 in self.names[_base(name)] if known == md5}
        return next(iter(classes)) if len(classes) == 1 else ""


def _question_types(meta: Path) -> tuple[dict, dict]:
    """(image name, question) -> question type, and (image name, question) -> tertiary class.

    The class is known if the image path in the record contains its class folders.
    """
    seen: list[tuple[Any, str]] = []
    folders: list[tuple[Any, str]] = []
    for question_type in QUESTION_TYPES:
        path = meta / "split" / f"{question_type}.json"
        for record in read_meta(path) if path.is_file() else ():
            key = (_base(record["image"]), str(record.get("question") or "").strip())
            seen.append((key, question_type))
            parts = record["image"].split("/")
            if len(parts) >= 4 and PARENTS.get(parts[-2]) == tuple(parts[-4:-2]):
                folders.append((key, parts[-2]))
    return unambiguous(seen), unambiguous(folders)


def _answers(record: dict) -> Iterator[str]:
    """The texts of a model's response: every text field except image, question and id."""
    for name, value in record.items():
        if name not in ("image", "question", "id") and isinstance(value, str):
            yield value


def _key(record: dict, text: str) -> tuple[str, str, str]:
    question = str(record.get("question") or "").strip()
    return _base(record["image"]), question, text.strip()


def _base(name: str) -> str:
    return name.rpartition("/")[2]

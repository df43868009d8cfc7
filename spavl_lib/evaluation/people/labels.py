"""The labels of one rater: a file that is appended and flushed to disk line by line."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from spavl_lib.errors import InputError, raise_all
from spavl_lib.evaluation.people.answers import Key
from spavl_lib.evaluation.verdicts import Refused
from spavl_lib.runs.files import append_durably, writing
from spavl_lib.runs.text import say

REFUSED: tuple[Refused, ...] = ("yes", "partial", "no")
NAME = re.compile(r"[\w][\w.@+-]{0,63}")


@dataclass(frozen=True)
class Label:
    """A person's answers to the two questions about a response. For `harmful`, None is unsure."""

    harmful: bool | None
    refused: Refused


class LabelFile:
    """The labels of one rater, in `FOLDER/RATER.jsonl`.

    Each line holds one label, or takes a label back (`undone`). A line is on disk when `add`
    returns. If a crash has left half of a last line, that half is removed and reported, and the
    next label is written in its place.
    """

    def __init__(self, folder: Path, rater: str, answers: Mapping[Key, str]):
        """Read the rater's file, if it exists.

        Args:
            folder: The run's folder of labels.
            rater: The rater's name, which names the file.
            answers: The hash of each answer that may be labelled.

        Raises:
            InputError: The name cannot name a file, or lines are damaged, as in `read_labels`.
        """
        if not NAME.fullmatch(rater) or rater.endswith("."):
            raise InputError(
                f"rater {rater!r}: expected a name of letters, digits and . @ + - _ that can name "
                "a file"
            )
        self.path, self.rater = folder / f"{rater}.jsonl", rater
        self._answers = dict(answers)
        self._mend()
        self.labels = read_labels(self.path, self._answers)
        self._size = self.path.stat().st_size if self.path.is_file() else 0

    def _mend(self) -> None:
        """End the last line, or remove it if only half of it was written."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        if not content or content.endswith(b"\n"):
            return
        begin = content.rfind(b"\n") + 1
        with writing(self.path), self.path.open("r+b") as file:
            if _is_whole(content[begin:]):
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
            else:
                file.truncate(begin)
                number = content.count(b"\n") + 1
                say(f"{self.path}:{number}: only half of the line was written; it is removed")
            file.flush()
            os.fsync(file.fileno())

    def add(self, key: Key, label: Label) -> None:
        """Write one label.

        Raises:
            InputError: The answer is not in the sample or has another label, or another labelling
                panel has written to the file.
            DiskError: There is no space or no permission.
        """
        if key not in self._answers:
            raise InputError(f"{key} is not in the sample, so it cannot be labelled")
        if self.labels.get(key, label) != label:
            raise InputError(f"{key} has another label by {self.rater}; take it back first")
        if key not in self.labels:
            self._append(key, asdict(label))
            self.labels[key] = label

    def undo(self, key: Key) -> Label:
        """Take a label back, and return it.

        Raises:
            InputError: There is no such label, or another labelling panel has written to the file.
        """
        if key not in self.labels:
            raise InputError(f"{key} has no label by {self.rater}")
        self._append(key, {"undone": True})
        return self.labels.pop(key)

    def _append(self, key: Key, facts: dict[str, Any]) -> None:
        model, set_name, row = key
        page = {"model": model, "set": set_name, "id": row, "answer": self._answers[key], **facts}
        page["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        if (self.path.stat().st_size if self.path.is_file() else 0) != self._size:
            raise InputError(
                f"{self.path} was changed by another panel; open this one again to go on"
            )
        self._size += append_durably(self.path, [page])


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def read_labels(path: Path, answers: Mapping[Key, str]) -> dict[Key, Label]:
    """The labels in a rater's file, in the order in which they were given.

    If only half of the last line was written, the line is left out and reported; `LabelFile`
    removes it.

    Args:
        path: The file, which may be missing.
        answers: The hash of each answer that may be labelled.

    Raises:
        InputError: Lines are damaged, name an answer that is not in the sample, hold the hash of
            another text, contradict an earlier line, or take back a label that does not exist. The
            message lists all these lines.
    """
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    labels: dict[Key, Label] = {}
    given: dict[Key, int] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not _is_whole(line):
            if line:
                say(f"{path}:{number}: only half of the line was written; it is left out")
            continue
        try:
            key, label = _parse(line, answers)
            earlier = labels.get(key)
            if label is None:
                if earlier is None:
                    raise ValueError(f"takes back a label of {key}, which has none")
                del labels[key]
            elif earlier is not None and earlier != label:
                raise ValueError(f"contradicts line {given[key]}, another label of {key}")
            else:
                labels.setdefault(key, label)
                given[key] = number
        except (ValueError, TypeError) as error:
            problems.append(f"{path}:{number}: {error}")
        except KeyError as error:
            problems.append(f"{path}:{number}: {error} is missing")
    raise_all(problems, f"labels by {path.stem}")
    return labels


def _parse(line: bytes, answers: Mapping[Key, str]) -> tuple[Key, Label | None]:
    """The answer that a line is about, and its label; None if the line takes the label back."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"expected one JSON object a line: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    key = Key(str(row["model"]), str(row["set"]), str(row["id"]))
    if key not in answers:
        raise ValueError(f"{key} is not in the sample")
    if row["answer"] != answers[key]:
        raise ValueError(f"{key}: the label belongs to another answer than the run holds")
    if row.get("undone") is True:
        return key, None
    harmful, refused = row["harmful"], row["refused"]
    if harmful is not None and not isinstance(harmful, bool):
        raise ValueError(f"harmful: expected true, false or null, got {harmful!r}")
    if refused not in REFUSED:
        raise ValueError(f"refused: expected one of {', '.join(REFUSED)}, got {refused!r}")
    return key, Label(harmful, refused)


def read_raters(folder: Path, answers: Mapping[Key, str]) -> dict[str, dict[Key, Label]]:
    """Rater -> labels, for every rater who has given at least one label.

    Args:
        folder: The run's folder of labels.
        answers: The hash of each answer that may be labelled.

    Raises:
        InputError: As in `read_labels`, for all files together.
    """
    raters, problems = {}, []
    for path in sorted(folder.glob("*.jsonl")):
        try:
            labels = read_labels(path, answers)
        except InputError as error:
            problems.append(str(error))
            continue
        if labels:
            raters[path.stem] = labels
    if problems:
        raise InputError("\n".join(problems))
    return raters

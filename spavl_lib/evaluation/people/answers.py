"""The judged answers of a run, read from `evaluation/verdicts/MODEL/SET.jsonl`."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from spavl_lib.errors import InputError, raise_all


class Key(NamedTuple):
    """The name of an answer within a run: its model, test set and prompt."""

    model: str
    set_name: str
    row: str
    """Id of the prompt."""

    def __str__(self) -> str:
        return f"{self.model}/{self.set_name}/{self.row}"


@dataclass(frozen=True)
class Answer:
    """A model's answer with the judge's verdict. A verdict that the judge did not give is None."""

    key: Key
    prompt: str
    response: str
    group: str
    """Rows of one group ask the same question. Cross-fitting keeps a group in one fold."""
    verdict: str
    """The judge's verdict in words, for the strata of the sample."""
    refused: bool | None
    """Whether the answer refuses. A partial refusal counts as no refusal."""
    harmful: bool | None

    @property
    def digest(self) -> str:
        """A hash of prompt and response. A label names this hash, and counts for no other text."""
        return text_digest(self.prompt, self.response)


def text_digest(prompt: str, response: str) -> str:
    """16 hex digits of a hash of a prompt and its response."""
    text = json.dumps([prompt, response])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def labels_folder(run_path: Path) -> Path:
    """The folder of a run that holds the sample, each rater's labels and the fitted judge."""
    return run_path / "evaluation" / "labels"


def read_answers(run_path: Path, sets: tuple[str, ...] | None = None) -> list[Answer]:
    """All judged answers of a run, in the order of models, sets and rows.

    Args:
        run_path: The run's folder.
        sets: Test sets to read; None for all.

    Raises:
        InputError: There are no judged answers, or rows are damaged. The message lists each file
            and line.
    """
    folder = run_path / "evaluation" / "verdicts"
    answers: list[Answer] = []
    problems: list[str] = []
    for path in sorted(folder.glob("*/*.jsonl")):
        if sets is not None and path.stem not in sets:
            continue
        seen: dict[str, int] = {}
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line and number == len(lines):
                continue
            place = f"{path.parent.name}/{path.name}:{number}"
            try:
                row = json.loads(line)
                answer = _answer(row, path)
            except (ValueError, KeyError, TypeError) as error:
                problems.append(f"{place}: no judged answer ({type(error).__name__}: {error})")
                continue
            first = seen.setdefault(answer.key.row, number)
            if first != number:
                problems.append(f"{place}: id {answer.key.row!r} is in line {first} too")
            answers.append(answer)
    raise_all(problems, str(folder))
    if not answers:
        wanted = f" in the sets {', '.join(sets)}" if sets is not None else ""
        raise InputError(f"{folder} holds no judged answers{wanted}: evaluate the run first")
    return answers


def _answer(row: dict[str, Any], path: Path) -> Answer:
    """An answer from a row of the evaluation stage, or from a row with the keys of `Verdict`."""
    key = Key(path.parent.name, path.stem, str(row["id"]))
    if "verdict" in row:  # in such a row `harmful` says whether the request is harmful
        refused, harmful = row["verdict"] == "refused", row["unsafe"]
        words = str(row["verdict"])
    else:
        refused = None if row["refused"] is None else row["refused"] == "yes"
        harmful = row["harmful"]
        words = f"refused {row['refused'] or 'unknown'}"
    if harmful is not None and not isinstance(harmful, bool):
        raise TypeError(f"expected true, false or null, got {harmful!r}")
    if harmful is not None:
        words += ", unsafe" if harmful else ", safe"
    group = str(row.get("group") or key.row)
    return Answer(key, str(row["prompt"]), str(row["response"]), group, words, refused, harmful)

"""Answers that were made elsewhere: they are read from a file, and matched to benchmark rows.

A file has one of these forms: the output of the original's `infer_json.py` (a list of objects with
id, query and response), JSONL with the same keys, a JSON object {id: answer}, lmms-eval's
`--log_samples` JSONL, or VLMEvalKit's result as TSV or CSV (columns index and prediction).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spavl_lib.errors import InputError, raise_all
from spavl_lib.evaluation.benchmarks.base import EXACT_RULES, BenchmarkRow
from spavl_lib.evaluation.benchmarks.reading import Reader, Record

# In lmms-eval's POPE, `question_id` is the published id, and `id` is another number.
ID_KEYS = ("question_id", "id", "index", "qid")
ANSWER_KEYS = ("response", "prediction", "answer", "text")


@dataclass(frozen=True)
class Answer:
    """An answer of a file, with what the file says about the question."""

    id: str
    """The question's id in the file."""
    response: str
    """The answer. An empty one stays empty: whoever judges it counts it as unjudged."""
    place: str
    """`FILE: PLACE`, for messages."""
    asked: str = ""
    """The question with its template, if the file repeats it."""
    subset: str = ""
    """The set that the question is from, if the file names the set."""
    target: str = ""
    """The right answer, if the file repeats it."""


@dataclass(frozen=True)
class Answers:
    """Answers that belong to rows, and rows that have no answer."""

    responses: dict[str, str]
    """Row id -> answer."""
    unanswered: tuple[str, ...]
    """Ids of rows without an answer. These rows are counted as unjudged."""


def read_answers(path: str | Path) -> list[Answer]:
    """All answers of a file, in its order.

    Args:
        path: The file. Its form is recognised by its suffix and keys.

    Raises:
        InputError: The file is missing or damaged, has none of the known forms, or has two answers
            for one id. All problems are listed.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".json", ".jsonl", ".tsv", ".csv"):
        raise InputError(
            f"{path}: answers are read from .json, .jsonl, .tsv or .csv; save another table as .tsv"
        )
    reader = Reader(path.parent)
    pairs = [(answer, record) for record in _records(path, reader) for answer in _answer(record)]
    seen: dict[tuple[str, str], Answer] = {}
    for answer, record in pairs:
        first = seen.setdefault((answer.subset, answer.id), answer)
        if first is not answer:
            how = "the same answer" if first.response == answer.response else "different answers"
            record.problem(f"id {answer.id} twice, with {how} (first: {first.place})")
    raise_all(reader.problems, str(path))
    if not pairs:
        raise InputError(f"{path}: no answers")
    return [answer for answer, _ in pairs]


def match_answers(answers: Sequence[Answer], rows: Iterable[BenchmarkRow]) -> Answers:
    """Give each answer to its row: by the row's id, or by the native id if that is unambiguous.

    Args:
        answers: The answers of a file.
        rows: All rows that were asked.

    Raises:
        InputError: An answer's id belongs to no row, or to several rows; two answers belong to one
            row; or the file gives for an answer another question, or another right answer, than
            the row has. All problems are listed.
    """
    by_key: dict[str, list[BenchmarkRow]] = defaultdict(list)
    rows = list(rows)
    for row in rows:
        native = row.id.split(":", 2)[2]
        for key in {row.id, f"{row.subset}:{native}", native}:
            by_key[key].append(row)
    problems, responses = [], {}
    for answer in answers:
        found = by_key.get(f"{answer.subset}:{answer.id}") or by_key.get(answer.id) or []
        why = ""
        if not found:
            why = f"nobody asked id {answer.id}"
        elif len(found) > 1:
            why = f"id {answer.id} may be {found[0].id} or {found[1].id}: write these ids"
        elif found[0].id in responses:
            why = f"a second answer for {found[0].id}"
        elif answer.asked and _plain(found[0].prompt) not in _plain(answer.asked):
            why = f"its question is not that of {found[0].id}"
        elif answer.target and found[0].rule in EXACT_RULES and _differ(answer, found[0]):
            why = f"its right answer is {answer.target!r}, not that of {found[0].id}"
        if why:
            problems.append(f"{answer.place}: {why}")
        else:
            responses[found[0].id] = answer.response
    raise_all(problems, "answers that belong to no row")
    return Answers(responses, tuple(row.id for row in rows if row.id not in responses))


def _differ(answer: Answer, row: BenchmarkRow) -> bool:
    return answer.target.strip().lower() != row.reference.strip().lower()


def _plain(text: str) -> str:
    return " ".join(text.split())


def _records(path: Path, reader: Reader) -> list[Record]:
    if path.suffix in (".tsv", ".csv"):
        return reader.table(path.name, ("index", "prediction"))
    if path.suffix == ".jsonl":
        return reader.lines(path.name)
    file, value = reader.document(path.name)
    if isinstance(value, dict):
        pairs = value.items()
        return [Record(reader, file, key, {"id": key, "response": text}) for key, text in pairs]
    if value is not None and not isinstance(value, list):
        reader.problem(file, "line 1", "a list or an object expected")
    rows = enumerate(value if isinstance(value, list) else ())
    return [
        Record(reader, file, f"row {i}", row if isinstance(row, dict) else {}) for i, row in rows
    ]


def _answer(record: Record) -> Iterator[Answer]:
    """Yield the answer of a record. If the record lacks an id or an answer, note a problem
    instead."""
    fields: Any = record.fields
    asked = next((fields[key] for key in ("query", "question", "prompt") if fields.get(key)), "")
    subset, target = "", fields.get("answer") if "prediction" in fields else ""
    if "doc_id" in fields:  # lmms-eval; `doc` holds the question's own fields
        doc = fields["doc"] if isinstance(fields.get("doc"), dict) else {}
        number = next((doc[key] for key in ID_KEYS if key in doc), fields["doc_id"])
        values = fields.get("filtered_resps") or fields.get("resps")
        while isinstance(values, list) and len(values) == 1:
            values = values[0]
        asked, subset = fields.get("input") or "", str(doc.get("category", ""))
        target = fields.get("target")
    else:
        number = next((fields[key] for key in ID_KEYS if key in fields), None)
        values = next((fields[key] for key in ANSWER_KEYS if key in fields), None)
    if not isinstance(number, str | int) or isinstance(number, bool) or number == "":
        record.problem(f"no id ({', '.join(ID_KEYS)})")
    elif not isinstance(values, str):
        record.problem(f"no answer as text ({', '.join(ANSWER_KEYS)})")
    else:
        place = f"{record.file}: {record.place}"
        asked, target = (text if isinstance(text, str) else "" for text in (asked, target))
        yield Answer(str(number), values, place, asked, subset, target)

"""Judge the answers of a benchmark, and keep every verdict as soon as it is there."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from spavl_lib.config import EvaluationConfig
from spavl_lib.errors import InputError, Preempted
from spavl_lib.evaluation.benchmark_runs.asking import prompt_row
from spavl_lib.evaluation.benchmark_runs.journal import Journal
from spavl_lib.evaluation.benchmarks import (
    OWN_SAFETY_RULES,
    RULES,
    WARNING_RULES,
    BenchmarkRow,
)
from spavl_lib.evaluation.judges import Judge, axes_of, judge_records, make_judge
from spavl_lib.evaluation.judges.reference import READERS
from spavl_lib.evaluation.verdicts import EMPTY, Axis, Verdict
from spavl_lib.runs.files import read_json, write_json
from spavl_lib.runs.provenance import canonical_sha256

CHUNK = 64  # answers that are judged between two writes
# Judge -> the setting that the text after a colon sets, as in `phrases:gcg` and `guard:MODEL`.
ARGUMENTS = {
    "phrases": "judge_phrases", "guard": "judge_model", "endpoint": "judge_model",
    "head": "judge_model", "grade": "judge_model",
}  # fmt: skip
SETTINGS = {
    "phrases": ("judge_phrases",),
    "guard": ("judge_model", "judge_revision", "judge_images"),
    # The budget changes no verdict.
    **dict.fromkeys(("endpoint", "grade"), ("judge_model", "judge_url", "judge_images")),
}


@dataclass(frozen=True)
class BenchmarkJudge:
    """A judge of benchmark answers: it gives a `Verdict` for each."""

    spec: str
    """What the user wrote, such as `phrases:gcg`."""
    name: str
    axes: tuple[Axis, ...]
    """The questions that it answers: `refused`, `harmful`, `warned`, `right`."""
    settings: Mapping[str, Any]
    """Everything that its verdicts depend on, besides its code."""
    judge: Judge

    def __call__(self, rows: Sequence[BenchmarkRow], responses: Sequence[str]) -> list[Verdict]:
        """The verdict of each response.

        Args:
            rows: The rows that were asked.
            responses: An answer to each of them, not empty.

        Raises:
            InputError: The judge fails, or returns something other than a `Verdict`.
        """
        records = [_record(row, text) for row, text in zip(rows, responses, strict=True)]
        return judge_records(self.judge, records)

    def describe(self) -> dict[str, Any]:
        """What the protocol card says of the judge."""
        about = {"name": self.name, "axes": list(self.axes), "settings": dict(self.settings)}
        scale = getattr(self.judge, "scale", None)
        return about | ({"scale": list(scale)} if scale else {})

    @property
    def file(self) -> str:
        """Name of the judge's files, without ending. Other settings give another name."""
        name = re.sub(r"[^\w.+-]+", "-", self.name).strip(".-")
        return f"{name}-{canonical_sha256(self.describe())[:8]}"


def open_judge(spec: str, settings: EvaluationConfig) -> BenchmarkJudge:
    """The judge of a name.

    Args:
        spec: `NAME`, or `NAME:ARGUMENT`: the list of phrases, or the judge model.
        settings: All other settings.

    Raises:
        InputError: There is no such judge, or it lacks a setting.
    """
    name, sign, argument = spec.partition(":")
    if sign:
        if name not in ARGUMENTS:
            raise InputError(f"judge {spec!r}: {name} takes no argument after a colon")
        from spavl_lib.config.validation import build, to_plain

        plain = to_plain(settings) | {ARGUMENTS[name]: argument}
        settings = build(EvaluationConfig, plain, prefix="evaluation.")
    judge = make_judge(name, {}, dataclasses.replace(settings, judge=name))
    plain_settings = {key: getattr(settings, key) for key in SETTINGS.get(name, ())}
    return BenchmarkJudge(spec, judge.name, axes_of(judge), plain_settings, judge)


def _record(row: BenchmarkRow, response: str) -> dict[str, Any]:
    """A record as judges take it. Judges without a fixed prompt follow its `rule`, and say whether
    the response warns if it `asks_warning`. `form` and `reference` say what the right answer is."""
    prompt = row.prompt
    if row.context and not row.prompt.startswith(row.context):
        prompt = f"{row.prompt}\n\n(The image shows: {row.context})"
    rule: dict[str, Any] = {"rule": RULES[row.rule]} if row.rule in OWN_SAFETY_RULES else {}
    if row.rule in WARNING_RULES:
        rule["asks_warning"] = True
    if row.rule in READERS:
        rule["form"] = row.rule
    if row.rule in (*READERS, "reference"):  # elsewhere it is no good answer
        rule["reference"] = row.reference
    return prompt_row(row) | {"prompt": prompt, "response": response} | rule


def answer_sha(record: Mapping[str, Any]) -> str:
    """A hash of an answer, by which a verdict belongs to it."""
    text = f"{record['id']}\0{record['response']}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def judge_answers(
    judge: BenchmarkJudge,
    rows: Sequence[BenchmarkRow],
    answers: Mapping[str, Mapping[str, Any]],
    folder: Path,
    should_stop: object = False,
) -> dict[str, Verdict]:
    """Judge the answers that this judge has not judged yet, and return all verdicts by row id.

    An empty answer, or one with an error, is unjudged and is not shown to the judge.

    Args:
        judge: The judge.
        rows: The rows that were asked.
        answers: Row id -> record of `answers.jsonl`.
        folder: The folder of verdicts, for `JUDGE.jsonl` and `JUDGE.json`.
        should_stop: Truthy once the process is asked to stop; polled between chunks.

    Raises:
        InputError: The judge fails, or the file holds verdicts on other answers.
        Preempted: The process was asked to stop. The verdicts are kept.
    """
    journal = Journal(folder / f"{judge.file}.jsonl")
    hashes = {row.id: answer_sha(answers[row.id]) for row in rows}
    other = [
        row.id
        for row in rows
        if row.id in journal.records and journal.records[row.id].get("answer") != hashes[row.id]
    ]
    if other:
        raise InputError(
            f"{journal.path} judges other answers than answers.jsonl holds now, to {len(other)} "
            f"rows ({', '.join(other[:20])}); delete it to judge again"
        )
    write_json(folder / f"{judge.file}.json", judge.describe())
    todo = [row for row in rows if row.id not in journal.records]
    bar = tqdm(
        total=len(rows), initial=len(rows) - len(todo), desc=judge.name, unit="row", leave=False
    )
    with bar:
        for start in range(0, len(todo), CHUNK):
            if should_stop:
                raise Preempted(
                    f"stopped with {len(journal.records)} of {len(rows)} answers judged by "
                    f"{judge.name}; run the same command to continue"
                )
            chunk = todo[start : start + CHUNK]
            reasons = {row.id: why_not(answers[row.id]) for row in chunk}
            shown = [row for row in chunk if not reasons[row.id]]
            found = judge(shown, [answers[row.id]["response"] for row in shown]) if shown else []
            verdicts = dict(zip([row.id for row in shown], found, strict=True))
            journal.append(
                {"id": row.id, "answer": hashes[row.id]}
                | verdicts.get(row.id, Verdict(why_unjudged=reasons[row.id])).to_dict()
                for row in chunk
            )
            bar.update(len(chunk))
    return {row.id: verdict_of(journal.records[row.id]) for row in rows}


def why_not(answer: Mapping[str, Any]) -> str:
    """Why an answer cannot be judged; empty if it can."""
    if error := answer.get("error"):
        return f"no answer: {error}"
    return "" if answer["response"].strip() else EMPTY


def verdict_of(record: Mapping[str, Any]) -> Verdict:
    """The verdict in a line of `verdicts/JUDGE.jsonl`."""
    names = [field.name for field in dataclasses.fields(Verdict)]
    return Verdict(**{name: record[name] for name in names if name in record})


def other_verdicts(
    folder: Path,
    rows: Sequence[BenchmarkRow],
    answers: Mapping[str, Mapping[str, Any]],
    known: Sequence[str],
) -> dict[str, tuple[dict[str, Any], dict[str, Verdict]]]:
    """Verdicts of judges that an earlier call used, if they judged all of these answers.

    Args:
        folder: The folder of verdicts.
        rows: The rows that were asked.
        answers: Row id -> record of `answers.jsonl`.
        known: Names of files, without ending, that are not wanted.

    Returns:
        Name of the judge's files -> the judge's description, and its verdicts by row id.
    """
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        about = path.with_suffix(".json")
        if path.stem in known or not about.is_file():
            continue
        records = Journal(path).records
        if all(records.get(r.id, {}).get("answer") == answer_sha(answers[r.id]) for r in rows):
            found[path.stem] = (
                read_json(about),
                {row.id: verdict_of(records[row.id]) for row in rows},
            )
    return found


def rule_texts(rows: Sequence[BenchmarkRow]) -> dict[str, str]:
    """The rules of some rows, in the words that judges are given."""
    return {rule: RULES[rule] for rule in sorted({row.rule for row in rows})}

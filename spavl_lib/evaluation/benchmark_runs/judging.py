"""Judge the answers of a benchmark, and write the verdicts to disk after every `CHUNK` answers."""

import dataclasses
import hashlib
import json
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
from spavl_lib.evaluation.benchmark_runs.results import rows_on
from spavl_lib.evaluation.benchmarks import (
    CLOSED_RULES,
    OWN_SAFETY_RULES,
    RULES,
    WARNING_RULES,
    BenchmarkRow,
)
from spavl_lib.evaluation.judges import (
    Judge,
    axes_of,
    check_judge,
    judge_records,
    make_judge,
    rubric,
)
from spavl_lib.evaluation.verdicts import EMPTY, Axis, Verdict
from spavl_lib.machine import free_memory
from spavl_lib.runs.files import read_json, write_json
from spavl_lib.runs.provenance import canonical_sha256
from spavl_lib.runs.signals import RESUME

CHUNK = 64  # answers that are judged between two writes
# Judge -> the setting that is set by the text after the colon, as in `phrases:gcg`, `guard:MODEL`.
ARGUMENTS = {
    "phrases": "judge_phrases", "guard": "judge_model", "endpoint": "judge_model",
    "head": "judge_model", "grade": "judge_model",
}  # fmt: skip
# Judge -> the settings that its verdicts depend on.
SETTINGS = {
    "phrases": ("judge_phrases",),
    "guard": ("judge_model", "judge_revision", "judge_images"),
    # `judge_budget` is left out: it decides how many answers are judged, not the verdicts on them.
    **dict.fromkeys(("endpoint", "grade"), ("judge_model", "judge_url", "judge_images")),
}


@dataclass
class BenchmarkJudge:
    """A judge of benchmark answers. It gives a `Verdict` on each answer."""

    spec: str
    """What the user wrote, such as `phrases:gcg`."""
    name: str
    axes: tuple[Axis, ...]
    """The questions that it answers: `refused`, `harmful`, `warned`, `right`."""
    settings: Mapping[str, Any]
    """Everything that its verdicts depend on, besides its code and the record."""
    judge: Judge | None
    """None once the judge is closed, so that its model leaves the memory."""
    scale: tuple[int, int] | None = None
    """Lowest and highest grade of a judge that grades."""
    follows_rules: bool = False
    """Whether the judge follows the rule of a row's benchmark. If not, it follows its own rule."""

    def __call__(self, rows: Sequence[BenchmarkRow], responses: Sequence[str]) -> list[Verdict]:
        """The verdict of each response.

        Args:
            rows: The rows that were asked.
            responses: The answer to each row. No answer is empty.

        Raises:
            InputError: The judge fails, or returns something other than a `Verdict`.
        """
        assert self.judge is not None, "the judge is closed"
        records = [judged_record(row, text) for row, text in zip(rows, responses, strict=True)]
        return judge_records(self.judge, records, check=False)

    def describe(self) -> dict[str, Any]:
        """What the protocol card says of the judge."""
        rules = "the benchmark's" if self.follows_rules else "the judge's own"
        about = {"name": self.name, "axes": list(self.axes), "settings": dict(self.settings)}
        return about | {"rules": rules} | ({"scale": list(self.scale)} if self.scale else {})

    def close(self) -> None:
        """Free the memory of the judge's model. `describe` still works."""
        self.judge = None
        free_memory()

    @property
    def file(self) -> str:
        """Name of the judge's files, without extension. Other settings give another name."""
        name = re.sub(r"[^\w.+-]+", "-", self.name).strip(".-")
        return f"{name}-{canonical_sha256(self.describe())[:8]}"

    def answers_anything(self, rows: Sequence[BenchmarkRow]) -> bool:
        """Whether the judge gives grades, or answers a question that a row's rule asks."""
        return self.scale is not None or any(rows_on(axis, rows) for axis in self.axes)


def settings_of(spec: str, settings: EvaluationConfig) -> EvaluationConfig:
    """The settings of one judge.

    Args:
        spec: `NAME`, or `NAME:ARGUMENT`. The argument is a list of phrases or the judge's model.
        settings: All other settings.

    Raises:
        InputError: This judge takes no argument, or the argument is invalid.
    """
    name, sign, argument = spec.partition(":")
    if sign:
        if name not in ARGUMENTS:
            raise InputError(f"judge {spec!r}: {name} takes no argument after a colon")
        from spavl_lib.config.validation import build, to_plain

        plain = to_plain(settings) | {ARGUMENTS[name]: argument}
        settings = build(EvaluationConfig, plain, prefix="evaluation.")
    return dataclasses.replace(settings, judge=name)


def check_spec(spec: str, settings: EvaluationConfig) -> None:
    """Check a judge as far as that is possible without loading a model.

    Args:
        spec: As in `settings_of`.
        settings: As in `settings_of`.

    Raises:
        InputError: There is no such judge, or it lacks a setting.
    """
    check_judge(settings_of(spec, settings), {}, in_runs=False)


def open_judge(spec: str, settings: EvaluationConfig) -> BenchmarkJudge:
    """Open the judge that `spec` names.

    Args:
        spec: As in `settings_of`.
        settings: As in `settings_of`.

    Raises:
        InputError: As in `settings_of` and `check_spec`, or the judge's model cannot be loaded.
    """
    settings = settings_of(spec, settings)
    judge = make_judge(settings.judge, {}, settings)
    own = {key: getattr(settings, key) for key in SETTINGS.get(settings.judge, ())}
    own |= getattr(judge, "depends_on", {})
    return BenchmarkJudge(
        spec, judge.name, axes_of(judge), own, judge,
        getattr(judge, "scale", None), getattr(judge, "follows_rules", False),
    )  # fmt: skip


def shown_prompt(row: BenchmarkRow) -> str:
    """The prompt as a judge sees it. If the benchmark describes the row's image, the description
    follows."""
    if row.image is None or not row.context:
        return row.prompt
    return f"{row.prompt}\n\n(The image shows: {row.context})"


def judged_record(row: BenchmarkRow, response: str) -> dict[str, Any]:
    """A row and its answer, as the record that judges take.

    `rule` says when a response is safe. With `asks_warning` the judge also says whether the
    response warns of the danger. Guards with a fixed prompt ignore both. `reference` is the
    reference answer, and `form`, one of `CLOSED_RULES`, says how to read the response.

    Args:
        row: The row that was asked.
        response: The answer.
    """
    rule: dict[str, Any] = {"rule": RULES[row.rule]} if row.rule in OWN_SAFETY_RULES else {}
    if row.rule in WARNING_RULES:
        rule["asks_warning"] = True
    if row.rule in CLOSED_RULES:
        rule["form"] = row.rule
    # Under other rules `reference` may be a bad answer.
    if row.rule in (*CLOSED_RULES, "reference"):
        rule["reference"] = row.reference
    return prompt_row(row) | {"prompt": shown_prompt(row), "response": response} | rule


def verdict_sha(row: BenchmarkRow, response: str) -> str:
    """A hash of the record that a judge gets. The image's file name counts, its content does not.

    Args:
        row: The row that was asked.
        response: The answer.
    """
    record = {k: v for k, v in judged_record(row, response).items() if k != "image"}
    text = json.dumps(record, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def judge_answers(
    judge: BenchmarkJudge,
    rows: Sequence[BenchmarkRow],
    answers: Mapping[str, Mapping[str, Any]],
    folder: Path,
    should_stop: object = False,
) -> dict[str, Verdict]:
    """Judge the answers that this judge has not judged yet, and return all verdicts by row id.

    An empty answer, or an answer with an error, is unjudged and is not shown to the judge. If an
    endpoint did not judge an answer, because the budget was spent or the request failed, the next
    call asks about this answer again.

    Args:
        judge: The judge.
        rows: The rows that were asked.
        answers: Row id -> record of `answers.jsonl`.
        folder: The folder of verdicts. The verdicts go into a `.jsonl` file with the name
            `judge.file`, the judge's description into a `.json` file beside it.
        should_stop: Truthy once the process is asked to stop; polled between chunks.

    Raises:
        InputError: The judge fails, or an answer or its row has changed since the judge's file was
            written.
        Preempted: The process was asked to stop. The finished verdicts are on the disk.
    """
    journal = Journal(folder / f"{judge.file}.jsonl")
    hashes = {row.id: verdict_sha(row, answers[row.id]["response"]) for row in rows}
    other = [
        row.id
        for row in rows
        if row.id in journal.records and journal.records[row.id].get("answer") != hashes[row.id]
    ]
    if other:
        raise InputError(
            f"{journal.path} holds verdicts on {len(other)} answers or questions that have changed "
            f"since ({', '.join(other[:20])}); delete {journal.path.name} to judge again"
        )
    write_json(folder / f"{judge.file}.json", judge.describe())
    todo = [row for row in rows if row.id not in journal.records]
    bar = tqdm(
        total=len(rows), initial=len(rows) - len(todo), desc=judge.name, unit="row", leave=False
    )
    later: dict[str, Verdict] = {}
    # Replies without a verdict count in `check_share`, even if an earlier call got them.
    asked: list[Verdict] = [
        verdict_of(journal.records[row.id])
        for row in rows
        if row.id in journal.records and not why_not(answers[row.id])
    ]
    with bar:
        for start in range(0, len(todo), CHUNK):
            if should_stop:
                raise Preempted(
                    f"stopped with {len(journal.records)} of {len(rows)} answers judged by "
                    f"{judge.name}; {RESUME}"
                )
            chunk = todo[start : start + CHUNK]
            reasons = {row.id: why_not(answers[row.id]) for row in chunk}
            shown = [row for row in chunk if not reasons[row.id]]
            found = judge(shown, [answers[row.id]["response"] for row in shown]) if shown else []
            verdicts = {row.id: Verdict(why_unjudged=reasons[row.id]) for row in chunk}
            verdicts |= zip([row.id for row in shown], found, strict=True)
            later |= {
                name: v for name, v in verdicts.items() if rubric.may_come_later(v.why_unjudged)
            }
            journal.append(
                {"id": row.id, "answer": hashes[row.id]} | verdicts[row.id].to_dict()
                for row in chunk
                if row.id not in later
            )
            asked += found
            if getattr(judge.judge, "reads_replies", False):
                rubric.check_share(judge.name, asked, is_whole=start + CHUNK >= len(todo))
            bar.update(len(chunk))
    return {row.id: later.get(row.id) or verdict_of(journal.records[row.id]) for row in rows}


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
    """Verdicts of judges that earlier calls used. Only judges of all these answers are returned.

    Args:
        folder: The folder of verdicts.
        rows: The rows that were asked.
        answers: Row id -> record of `answers.jsonl`.
        known: `BenchmarkJudge.file` of the judges whose verdicts the caller already has.

    Returns:
        `BenchmarkJudge.file` of a judge -> the judge's description, and its verdicts by row id.
    """
    found = {}
    hashes = {row.id: verdict_sha(row, answers[row.id]["response"]) for row in rows}
    for path in sorted(folder.glob("*.jsonl")):
        about = path.with_suffix(".json")
        if path.stem in known or not about.is_file():
            continue
        records = Journal(path).records
        if all(records.get(r.id, {}).get("answer") == hashes[r.id] for r in rows):
            found[path.stem] = (
                read_json(about),
                {row.id: verdict_of(records[row.id]) for row in rows},
            )
    return found


def rule_texts(rows: Sequence[BenchmarkRow]) -> dict[str, str]:
    """Name -> text of each rule that these rows have."""
    return {rule: RULES[rule] for rule in sorted({row.rule for row in rows})}

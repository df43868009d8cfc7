"""Evaluate subjects on benchmarks: get answers, judge them, and write the rates to files.

The rates are also printed as tables.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from spavl_lib import machine
from spavl_lib.config import flatten
from spavl_lib.errors import BusyError, InputError
from spavl_lib.evaluation.benchmark_runs import asking, comparing, judging, pairs, results
from spavl_lib.evaluation.benchmark_runs.asking import Asker
from spavl_lib.evaluation.benchmark_runs.endpoint_asking import EndpointAsker
from spavl_lib.evaluation.benchmark_runs.journal import Journal
from spavl_lib.evaluation.benchmark_runs.judging import BenchmarkJudge
from spavl_lib.evaluation.benchmark_runs.rows import Options, Say, read_rows, usual_judges
from spavl_lib.evaluation.benchmark_runs.subject import Subject, trained_on
from spavl_lib.evaluation.benchmarks import (
    BenchmarkRow,
    Reading,
    open_benchmark,
)
from spavl_lib.evaluation.judges.comparisons import EndpointPairJudge
from spavl_lib.evaluation.verdicts import Verdict
from spavl_lib.runs.files import read_json, write_json
from spavl_lib.runs.provenance import versions
from spavl_lib.runs.text import say


def evaluate(
    subjects: Sequence[Subject],
    benchmarks: Sequence[str],
    judges: Sequence[str],
    out: Path,
    options: Options | None = None,
    *,
    should_stop: object = False,
    report: Say = say,
) -> dict[str, Any]:
    """Ask every subject, judge the answers with every judge, and write the rates.

    What an earlier call with the same folder has done is kept: no row is asked twice, and no answer
    is judged twice by the same judge.

    Args:
        subjects: Models, files of answers or controls, with different names.
        benchmarks: `NAME`, or `NAME:SUBSET+SUBSET`.
        judges: `NAME`, or `NAME:ARGUMENT`; empty for those that the benchmarks name.
        out: The folder; each subject and benchmark has a folder below it.
        options: All other settings; None uses the defaults.
        should_stop: Truthy once the process is asked to stop.
        report: Receives what a person should read.

    Returns:
        `results`: subject -> benchmark -> the content of `results.json`. `comparison`: the paired
        tests between subjects. `pairs`: how often which subject's answer is better. `rows`:
        benchmark -> the rows that were judged.

    Raises:
        InputError: A name, a file or a setting is wrong; or the folder holds answers that were made
            in another way.
        BusyError: Another process uses the folder.
        Preempted: The process was asked to stop. Finished answers and verdicts are on the disk.
    """
    options = options or Options()
    _check_names(subjects, benchmarks, judges)
    pair_judge = pairs.open_pairs(options.pairs, options.judges, len(subjects))
    asks = any(subject.is_asked for subject in subjects)
    for spec in judges:
        judging.check_spec(spec, options.judges)
    readings, rows_of = read_rows(benchmarks, asks, options, report)
    judges = judges or usual_judges(rows_of)
    found: dict[str, dict[str, Any]] = {}
    with _locked(out):
        runs = [_Run(subject, out, options, should_stop) for subject in subjects]
        for run in runs:
            run.answer(readings, rows_of, report)
        opened, verdicts = _judge(runs, rows_of, judges, options, report)
        for run in runs:
            for spec, rows in rows_of.items():
                by_file = {
                    judge.file: verdicts[spec, judge.spec][run.subject.name] for judge in opened
                }
                page = run.page(spec, readings[spec], rows, opened, by_file)
                write_json(run.folder(spec) / "results.json", page)
                found.setdefault(run.subject.name, {})[spec] = page
        lines = [
            line
            for name, pages in found.items()
            for page in pages.values()
            for line in results.headline(name, page)
        ]
        report(results.table(lines))
        for run in runs:
            report(run.how())
        comparison = _compare(rows_of, verdicts, opened) if len(subjects) > 1 else []
        if comparison:
            write_json(out / "comparison.json", comparison)
            report("\nthe same rows, in pairs:\n" + results.table(comparing.lines(comparison)))
        compared = []
        if pair_judge:
            compared = _compare_answers(pair_judge, runs, rows_of, should_stop)
            write_json(out / "pairs.json", compared)
            report("\nwhose answers are better:\n" + results.table(pairs.lines(compared)))
    return {"results": found, "comparison": comparison, "pairs": compared, "rows": rows_of}


Verdicts = Mapping[tuple[str, str], Mapping[str, Mapping[str, Verdict]]]


def _judge(
    runs: Sequence["_Run"],
    rows_of: Mapping[str, Sequence[BenchmarkRow]],
    judges: Sequence[str],
    options: Options,
    report: Say,
) -> tuple[list[BenchmarkJudge], Verdicts]:
    """Judge the answers of all subjects with every judge.

    One judge is open at a time, after all subjects were asked, so that two models never share the
    memory.

    Returns:
        The judges, which are closed; and (benchmark, judge) -> subject -> row id -> verdict.

    Raises:
        InputError: A judge fails, a judge answers no question of any benchmark, or two judges are
            the same.
    """
    opened: list[BenchmarkJudge] = []
    verdicts: dict[tuple[str, str], dict[str, dict[str, Verdict]]] = {}
    every_row = [row for rows in rows_of.values() for row in rows]
    for name in judges:
        judge = judging.open_judge(name, options.judges)
        if not judge.answers_anything(every_row):
            raise InputError(
                f"judge {name} answers only: {', '.join(judge.axes)}; no rule of "
                f"{', '.join(rows_of)} asks that"
            )
        if double := next((other for other in opened if other.file == judge.file), None):
            raise InputError(f"judges {double.spec} and {name} are the same; name one of them")
        for spec, rows in rows_of.items():
            if not judge.answers_anything(rows):
                report(f"judge {name} answers no question that {spec} asks")
            verdicts[spec, name] = {run.subject.name: run.judge(spec, rows, judge) for run in runs}
        judge.close()
        opened.append(judge)
    return opened, verdicts


def _compare_answers(
    judge: EndpointPairJudge,
    runs: Sequence["_Run"],
    rows_of: Mapping[str, Sequence[BenchmarkRow]],
    should_stop: object,
) -> list[dict[str, Any]]:
    """Compare the answers of every further subject with the answers of the first subject."""
    compared = []
    for run in runs[1:]:
        for spec, rows in rows_of.items():
            answers = run.answers[spec], runs[0].answers[spec]
            outcomes = pairs.compare_answers(judge, rows, *answers, should_stop)
            named = {
                "benchmark": spec, "judge": judge.name,
                "first": run.subject.name, "second": runs[0].subject.name,
            }  # fmt: skip
            compared += [named | page for page in pairs.summary(rows, outcomes)]
    return compared


def _check_names(
    subjects: Sequence[Subject], benchmarks: Sequence[str], judges: Sequence[str]
) -> None:
    names = [subject.name for subject in subjects]
    for what, given in (("subject", names), ("benchmark", benchmarks), ("judge", judges)):
        if not given and what != "judge":
            raise InputError(f"no {what} is named")
        if twice := sorted({name for name in given if list(given).count(name) > 1}):
            hint = "; write NAME=... before one of them" if what == "subject" else ""
            raise InputError(f"two {what}s are called {', '.join(twice)}{hint}")


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(out / ".lock", blocking=False, fallback_to_soft=False).acquire()
    except Timeout:
        raise BusyError(f"{out} is in use by another evaluation; wait, or choose --out") from None
    with lock:
        yield


class _Run:
    """One subject, and the folder that holds its answers and results."""

    def __init__(self, subject: Subject, out: Path, options: Options, should_stop: object):
        self.subject, self.options, self.should_stop = subject, options, should_stop
        self.path = out / subject.name
        self.generation = options.generation
        if not options.set_tokens:
            tokens = asking.default_tokens(subject)
            self.generation = dataclasses.replace(self.generation, max_new_tokens=tokens)
        self.answers: dict[str, dict[str, dict[str, Any]]] = {}

    def folder(self, spec: str) -> Path:
        """The folder of a benchmark."""
        return self.path / spec.replace(":", ".")

    def answer(
        self,
        readings: Mapping[str, Reading],
        rows_of: Mapping[str, Sequence[BenchmarkRow]],
        report: Say,
    ) -> None:
        """Get the missing answers to every benchmark.

        Args:
            readings: Benchmark -> what was read.
            rows_of: Benchmark -> the rows to ask.
            report: Receives what a person should read.
        """
        journals = {}
        for spec, rows in rows_of.items():
            self._check_protocol(spec)
            journals[spec] = Journal(self.folder(spec) / "answers.jsonl")
            asking.check_asked(rows, journals[spec], with_image=self.subject.is_asked)
            for note in trained_on(self.subject, rows):
                report(f"  note: {spec}: {note}")
        if self.subject.answers:
            whole = {spec: reading.rows for spec, reading in readings.items()}
            for spec, records in asking.take_answers(self.subject.answers, whole).items():
                new = [r for r in records if r["id"] not in journals[spec].records]
                journals[spec].append(new)
        elif self.subject.constant:
            for spec, rows in rows_of.items():
                asking.answer_all(self.subject.constant, rows, journals[spec])
        else:
            asker: Asker | EndpointAsker = (
                EndpointAsker(self.subject, self.generation, self.options.judges)
                if self.subject.url
                else Asker(self.subject, self.generation, self.options.seed)
            )
            for spec, rows in rows_of.items():
                done = sum(row.id in journals[spec].records for row in rows)
                if done:
                    report(
                        f"{self.subject.name}: {done} of {len(rows)} rows of {spec} have answers"
                    )
                if done < len(rows):
                    if isinstance(asker, Asker):
                        self._note_prompting(spec, asker)
                    asker.ask(rows, journals[spec], self.should_stop)
            asker.close()
        self.answers = {spec: journal.records for spec, journal in journals.items()}

    def _check_protocol(self, spec: str) -> None:
        """Write `protocol.json`; raise if the folder's answers were made in another way."""
        path = self.folder(spec) / "protocol.json"
        present = {
            "subject": self.subject.identity(),
            "decoding": asking.decoding(self.subject, self.generation, self.options.seed),
        }
        earlier = read_json(path) if path.is_file() else {}
        if earlier:
            then, now = (
                {k: str(v) for k, v in flatten({n: page[n] for n in present}).items()}
                for page in (earlier, present)
            )
            changed = [
                f"{key}: {then.get(key, 'not set')}, now {now.get(key, 'not set')}"
                for key in sorted(then.keys() | now.keys())
                if then.get(key) != now.get(key)
            ]
            if changed:
                raise InputError(
                    f"{path.parent} holds answers that were made in another way "
                    f"({'; '.join(changed)}); choose another --out, or NAME=... for the subject"
                )
            return
        write_json(path, present)

    def _note_prompting(self, spec: str, asker: Asker) -> None:
        """Add to `protocol.json` how requests become prompts, and where the model runs."""
        path = self.folder(spec) / "protocol.json"
        page = read_json(path)
        session = {"machine": machine.device_name(), "versions": versions()}
        sessions = page.get("sessions", [])
        if session not in sessions:  # one entry for each machine and set of package versions
            sessions = [*sessions, session]
        facts = {"prompting": asking.prompting(asker.processor()), "sessions": sessions}
        write_json(path, page | facts)

    def judge(
        self, spec: str, rows: Sequence[BenchmarkRow], judge: BenchmarkJudge
    ) -> dict[str, Verdict]:
        """Get a judge's missing verdicts, and return all its verdicts by row id.

        Args:
            spec: The benchmark.
            rows: Its rows.
            judge: The judge.
        """
        folder = self.folder(spec) / "verdicts"
        return judging.judge_answers(judge, rows, self.answers[spec], folder, self.should_stop)

    def page(
        self,
        spec: str,
        reading: Reading,
        rows: Sequence[BenchmarkRow],
        judges: Sequence[BenchmarkJudge],
        verdicts: Mapping[str, Mapping[str, Verdict]],
    ) -> dict[str, Any]:
        """The content of `results.json`: the rates of these judges and of earlier ones.

        Args:
            spec: The benchmark.
            reading: What was read of it.
            rows: The rows that were asked.
            judges: The judges of this call. They may be closed.
            verdicts: `BenchmarkJudge.file` of a judge -> row id -> verdict.
        """
        answers = [self.answers[spec][row.id] for row in rows]
        folder = self.folder(spec) / "verdicts"
        by_judge: dict[str, tuple[dict[str, Any], Mapping[str, Verdict]]] = {
            judge.file: (judge.describe(), verdicts[judge.file]) for judge in judges
        }
        by_judge |= judging.other_verdicts(folder, rows, self.answers[spec], list(by_judge))
        protocol = read_json(self.folder(spec) / "protocol.json")
        names = Counter(about["name"] for about, _ in by_judge.values())
        return {
            "subject": {"name": self.subject.name, "source": self.subject.source},
            "benchmark": spec,
            "rows": len(rows),
            "rows_of_benchmark": len(reading.rows),
            "limit": self.options.limit or None,
            "left_out_without_image": sorted(reading.without_image - {row.id for row in rows}),
            "answers": {
                "empty": sum(not a["response"].strip() and "error" not in a for a in answers),
                "none": sum("error" in a for a in answers),
                "unfinished": sum(a.get("finished") is False and "error" not in a for a in answers),
            },
            "judges": {
                file: about | {
                    "label": _label(about["name"], file, names),
                    "warnings": self._warnings(about),
                    "rates": results.rates(rows, found, about["axes"]),
                }
                | ({"grades": results.grades(rows, found)} if "scale" in about else {})
                for file, (about, found) in by_judge.items()
            },
            "notes": [
                *reading.notes, *results.notes_on(rows), *trained_on(self.subject, rows)
            ],
            "protocol": protocol | {"benchmark": _benchmark_card(reading, rows)},
        }  # fmt: skip

    def how(self) -> str:
        """One line about how the answers were made, to print below the table."""
        spec = next(iter(self.answers))
        protocol = read_json(self.folder(spec) / "protocol.json")
        decoding = protocol["decoding"]
        if self.subject.constant:
            return f"{self.subject.name}: says to every request: {self.subject.constant}"
        if self.subject.answers:
            return f"{self.subject.name}: answers made elsewhere, decoding unknown"
        if self.subject.url:
            return f"{self.subject.name}: asked at {self.subject.url}, {decoding['settings']}"
        way = "sampled" if decoding["do_sample"] else "greedy"
        way = f"best of {self.subject.samples} samples" if self.subject.reward else way
        way += ", a safety prompt before each request" if self.subject.sentence else ""
        template = protocol.get("prompting", {}).get("chat_template_sha256", "unknown")[:12]
        return (
            f"{self.subject.name}: {way}, up to {decoding['max_new_tokens']} new tokens, "
            f"{decoding['precision']}, chat template {template}, no image with text-only requests"
        )

    def _warnings(self, about: Mapping[str, Any]) -> list[str]:
        judge = str(about["settings"].get("judge_model", "")).rstrip("/").rpartition("/")[2]
        base = self.subject.model.name if self.subject.model else ""
        names = {self.subject.source, self.subject.served, base}
        if judge and judge in {name.rstrip("/").rpartition("/")[2] for name in names if name}:
            return [f"the judge {judge} is the model under test, or its base"]
        return []


def _label(name: str, file: str, names: Mapping[str, int]) -> str:
    """A judge's name. If several judges have this name, the end of their files' name follows."""
    return name if names[name] < 2 else f"{name} ({file[-8:]})"


def _benchmark_card(reading: Reading, rows: Sequence[BenchmarkRow]) -> dict[str, Any]:
    benchmark = open_benchmark(reading.benchmark)
    return {
        "name": reading.benchmark,
        "title": benchmark.title,
        "homepage": benchmark.homepage,
        "licence": reading.licence,
        "files": dict(reading.files),
        "pins": reading.pins,
        "changed": list(reading.changed),
        "faulty_records_left_out": list(reading.left_out),
        "missing_images": len(reading.missing_images),
        "subsets": sorted({row.subset for row in rows}),
        "rules": judging.rule_texts(rows),
        "text_only_rows": sum(row.image is None for row in rows),
    }


def _compare(
    rows_of: Mapping[str, Sequence[BenchmarkRow]],
    verdicts: Verdicts,
    judges: Sequence[BenchmarkJudge],
) -> list[dict[str, Any]]:
    by_spec = {judge.spec: judge for judge in judges}
    tests = [
        {"benchmark": spec, "judge": by_spec[judge].name} | test
        for (spec, judge), by_subject in verdicts.items()
        for test in comparing.compare(rows_of[spec], by_subject, by_spec[judge].axes)
    ]
    return comparing.adjusted(tests)

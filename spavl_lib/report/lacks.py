"""Sentences about the data that a run lacks, and about what follows from that."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from spavl_lib.evaluation.numbers import METRICS, measured_on, models_of, read_rate
from spavl_lib.runs.files import read_json

FEW = 30  # with fewer held-out pairs, an interval spans tens of percentage points


def lacks(metrics: Mapping, data_summary: Path) -> list[str]:
    """One sentence for each kind of data that a run lacks, and one for each note on its data.

    Args:
        metrics: The contents of metrics.json.
        data_summary: The data stage's `summary.json`, which may be missing.
    """
    summary: dict = {}
    with contextlib.suppress(OSError, ValueError):
        summary = read_json(data_summary)
    return [*_of_prompts(metrics), *(_of_rows(summary) if isinstance(summary, dict) else ())]


def _of_prompts(metrics: Mapping) -> Iterator[str]:
    if not measured_on(metrics):
        return
    if not (metrics.get("prompts") or {}).get("own"):
        yield (
            "Evaluation prompts of your own: every rate on this page was measured on SPA-VL mini's "
            "built-in prompts. Set data.test_path."
        )
    models = models_of(metrics)
    missing = [m.title for m in METRICS if not any(read_rate(c, m.key) for c in models.values())]
    if models and missing:
        yield f"Prompts, or a judge, that give numbers for: {', '.join(missing).lower()}."


def _of_rows(summary: dict) -> Iterator[str]:
    train, held_out = (summary.get(name) or {} for name in ("train", "validation"))
    rows = train.get("rows")
    if rows and train.get("no_class") == rows:
        yield (
            "Classes of harm: no training pair has a class, so training pairs are neither drawn "
            "nor counted by class."
        )
    if rows and train.get("no_question_type") == rows:
        yield "Question types: no training pair has a question type."
    if held_out and held_out.get("rows", 0) < FEW:
        count = held_out.get("rows", 0)
        yield f"Held-out pairs: the run has {count}, so rates on held-out pairs are uncertain."
    for name, count in (summary.get("copies_of_train") or {}).items():
        yield (
            f"Rows of its own: {count} of the set {name} have image and question of a training "
            "pair, so their rates say nothing about new rows."
        )
    notes = [*(train.get("notes") or ()), *(held_out.get("notes") or ())]
    yield from (f"Note on the data: {note}." for note in dict.fromkeys(notes))

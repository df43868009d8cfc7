"""The result table for terminals."""

from collections.abc import Mapping
from pathlib import Path

from spavl_lib.evaluation.benchmark_runs.results import table
from spavl_lib.evaluation.numbers import (
    HARMLESS_TITLES,
    measured_metrics,
    measured_on,
    model_title,
    models_of,
    percent,
    read_metrics,
    read_rate,
)
from spavl_lib.evaluation.paired import against_base, lines
from spavl_lib.evaluation.rates import Rate
from spavl_lib.evaluation.text import MISSING
from spavl_lib.runs.text import say, short_path


def render_result_table(metrics: Mapping | Path | str) -> str:
    """The rates of all models with their counts and 95 % intervals, as aligned plain text.

    Args:
        metrics: The contents of metrics.json, or its path.

    Returns:
        The lines of the table, without a trailing newline. A missing number is an en dash.
    """
    page = read_metrics(metrics)
    models = models_of(page)
    if not models:
        return "Nothing measured yet."
    metrics_of = measured_metrics(models)
    heading = ["", *(f"{m.title} ({m.good})" for m in metrics_of)]
    rows = [(n, [read_rate(c, m.key) for m in metrics_of]) for n, c in models.items()]
    return _aligned(heading, rows, measured_on(page))


def render_harmless_table(metrics: Mapping | Path | str) -> str:
    """Harmless requests that each model refused, by set, as aligned plain text.

    Args:
        metrics: The contents of metrics.json, or its path.
    """
    page = read_metrics(metrics)
    counted = {
        name: cells["harmless_refused"]
        for name, cells in models_of(page).items()
        if cells.get("harmless_refused")
    }
    if not counted:
        return "Nothing measured yet."
    heading = ["", *HARMLESS_TITLES.values()]
    rows = [(n, [read_rate(c, key) for key in HARMLESS_TITLES]) for n, c in counted.items()]
    return _aligned(heading, rows, measured_on(page))


def render_paired_table(metrics: Mapping | Path | str, evaluation: Path) -> str:
    """The paired tests of every trained model against the base model, as aligned plain text.

    Args:
        metrics: The contents of metrics.json, or its path.
        evaluation: The evaluation stage's folder, which holds the verdict on every answer.
    """
    paired = against_base(read_metrics(metrics), evaluation)
    rows = lines(paired)
    note = [paired.lacking] if paired.lacking else []
    return "\n".join([table(rows), *note] if rows else note or ["Nothing to compare yet."])


def _aligned(heading: list[str], rows: list[tuple[str, list[Rate | None]]], note: str) -> str:
    """A table with two lines for each model: shares, and their counts with intervals.

    Args:
        heading: Titles of the columns.
        rows: Each model's name and its rates.
        note: Last line, such as a sentence that names the prompts; empty: no such line.
    """
    lines = [heading]
    for name, rates in rows:
        lines.append([model_title(name), *map(percent, rates)])
        details = [f"{rate.counts}, {rate.interval}" if rate else "" for rate in rates]
        lines.append(["", *(d.replace(f"{MISSING}, {MISSING}", "") for d in details)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text = [text[0], "-" * max(map(len, text)), *text[1:], *([note] if note else [])]
    return "\n".join(text).replace("\u00a0", " ")


def print_results(run_path: Path) -> None:
    """Print the result table of a run and the path of its report."""
    metrics_path = run_path / "metrics.json"
    if metrics_path.is_file():
        say(f"\n{render_result_table(metrics_path)}\n")
    else:
        say(f"no {short_path(metrics_path)}: nothing was evaluated")
    report = run_path / "report.html"
    if report.is_file():
        say(f"report: {short_path(report)}")

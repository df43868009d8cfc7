"""The result table for terminals."""

from collections.abc import Mapping
from pathlib import Path

from spavl_lib.evaluation.numbers import (
    METRICS,
    model_title,
    models_of,
    percent,
    read_metrics,
    read_rate,
)
from spavl_lib.evaluation.text import MISSING
from spavl_lib.runs.text import say, short_path


def render_result_table(metrics: Mapping | Path | str) -> str:
    """The rates of all models with their counts and 95 % intervals, as aligned plain text.

    Args:
        metrics: The contents of metrics.json, or its path.

    Returns:
        The lines of the table, without a trailing newline. A missing number is an en dash.
    """
    models = models_of(read_metrics(metrics))
    if not models:
        return "Nothing measured yet."
    lines = [["", *(f"{m.title} ({m.good})" for m in METRICS)]]
    for name, cells in models.items():
        rates = [read_rate(cells, metric.key) for metric in METRICS]
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
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]]).replace("\u00a0", " ")


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

"""Rates of one benchmark by one judge. Every rate names its axis and what was left unjudged."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from spavl_lib.evaluation.benchmarks import BenchmarkRow
from spavl_lib.evaluation.rates import wilson
from spavl_lib.evaluation.statistics import bootstrap_rate
from spavl_lib.evaluation.verdicts import Verdict

CLOSED = ("yes_no", "choice", "reference")  # rules that compare with a reference answer
# Rows whose good answers are opposite have no rate in common.
EXPECTED = {
    "decline": "requests to decline",
    "answer": "harmless requests",
    "judge": "requests that a rule decides",
}


@dataclass(frozen=True)
class AxisRate:
    """The share of judged answers for which one question has the answer yes."""

    axis: str
    """The question: `refused`, `harmful` or `warned`."""
    rows: int
    """All rows, whether judged or not."""
    k: int
    """Judged answers that are refused, harmful or warned. A partial refusal is not refused."""
    n: int
    """Judged answers."""
    unjudged: int
    why: dict[str, int]
    """Reason -> number of unjudged answers."""
    partial: int
    """Partial refusals among the judged answers; only of the axis `refused`."""
    value: float | None
    """k / n; None if nothing was judged."""
    ci_low: float | None
    ci_high: float | None
    method: str
    """How the 95 % interval was computed."""
    if_unjudged_no: float
    """The rate over all rows if the answer for every unjudged one is no."""
    if_unjudged_yes: float
    """The same if it is yes. The truth over all rows lies between these two."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def value_of(verdict: Verdict, axis: str) -> bool | None:
    """A verdict's answer to an axis; None if the judge gave none.

    Args:
        verdict: The verdict.
        axis: `refused`, `harmful` or `warned`.
    """
    answer = getattr(verdict, axis)
    return answer == "yes" if axis == "refused" and answer is not None else answer


def rate_of(
    axis: str, rows: Sequence[BenchmarkRow], verdicts: Mapping[str, Verdict]
) -> AxisRate | None:
    """The rate of some rows; None without rows.

    Rows of one group depend on each other. If a group has several rows, the interval resamples
    groups; else it is Wilson's.

    Args:
        axis: `refused`, `harmful` or `warned`.
        rows: The rows.
        verdicts: Row id -> verdict, of at least these rows.
    """
    if not rows:
        return None
    values = {row.id: value_of(verdicts[row.id], axis) for row in rows}
    judged = [row for row in rows if values[row.id] is not None]
    flags = [bool(values[row.id]) for row in judged]
    groups = [row.group for row in judged]
    k, n, unjudged = sum(flags), len(judged), len(rows) - len(judged)
    low = high = value = None
    method = "nothing was judged"
    if n and len(set(groups)) == n:
        (low, high), value, method = wilson(k, n), k / n, "Wilson"
    elif n:
        estimate = bootstrap_rate(flags, groups)
        low, high, value = estimate.ci_low, estimate.ci_high, estimate.value
        method = f"{estimate.method} ({len(set(groups))} groups)"
    reasons = Counter(
        re.sub(r"\d+", "N", verdicts[row.id].why_unjudged) or f"no answer on {axis}"
        for row in rows
        if values[row.id] is None
    )
    return AxisRate(
        axis=axis,
        rows=len(rows),
        k=k,
        n=n,
        unjudged=unjudged,
        why=dict(reasons.most_common()),
        partial=sum(axis == "refused" and verdicts[r.id].refused == "partial" for r in judged),
        value=value,
        ci_low=low,
        ci_high=high,
        method=method,
        if_unjudged_no=k / len(rows),
        if_unjudged_yes=(k + unjudged) / len(rows),
    )


def _by(rows: Iterable[BenchmarkRow], field: str) -> dict[str, list[BenchmarkRow]]:
    parts: dict[str, list[BenchmarkRow]] = {}
    for row in rows:
        parts.setdefault(getattr(row, field), []).append(row)
    return parts


def rates(
    rows: Sequence[BenchmarkRow], verdicts: Mapping[str, Verdict], axes: Sequence[str]
) -> dict[str, Any]:
    """All rates of a judge: by axis, over all rows and in parts.

    Args:
        rows: All rows.
        verdicts: Row id -> verdict.
        axes: The questions that the judge answers.

    Returns:
        Axis -> `all` and `by_expect`, and `by_subset`, `by_variant` and `by_category` where there
        are several. `all` is None if the rows hold both harmless requests and others; then
        `by_expect` and the parts of every part with both are what can be read.
    """
    found: dict[str, Any] = {}
    for axis in axes:
        tables: dict[str, Any] = {"all": _whole(axis, rows, verdicts)}
        for field in ("expect", "subset", "variant", "category"):
            parts = _by(rows, field)
            if len(parts) < 2 and field != "expect":
                continue
            tables[f"by_{field}"] = {
                name: _whole(axis, part, verdicts) or _split(axis, part, verdicts)
                for name, part in parts.items()
            }
        found[axis] = tables
    return found


def _whole(
    axis: str, rows: Sequence[BenchmarkRow], verdicts: Mapping[str, Verdict]
) -> dict[str, Any] | None:
    """A rate, or None if the rows mix harmless requests with others."""
    if len({row.expect == "answer" for row in rows}) > 1:
        return None
    rate = rate_of(axis, rows, verdicts)
    return rate.to_dict() if rate else None


def _split(
    axis: str, rows: Sequence[BenchmarkRow], verdicts: Mapping[str, Verdict]
) -> dict[str, Any]:
    """The rates of a part that mixes harmless requests with others."""
    parts = _by(rows, "expect").items()
    return {"by_expect": {name: _whole(axis, part, verdicts) for name, part in parts}}


def notes_on(rows: Sequence[BenchmarkRow]) -> list[str]:
    """What a reader of the rates should know."""
    closed = sum(row.rule in CLOSED for row in rows)
    notes = []
    if closed:
        notes.append(
            f"{closed} rows have a reference answer; whether an answer is right is not judged here"
        )
    if any(row.rule == "copyright" for row in rows):
        notes.append("rows on copyright can only be judged by the benchmark's own hashes")
    return notes


# --- tables ---------------------------------------------------------------------------------------


def headline(subject: str, results: Mapping[str, Any]) -> list[dict[str, str]]:
    """The rows of a printed table: one for each judge, axis and kind of request.

    Args:
        subject: Name of the subject.
        results: `results.json`.
    """
    lines = []
    for judge in results["judges"].values():
        for axis, tables in judge["rates"].items():
            parts = {EXPECTED[name]: rate for name, rate in tables["by_expect"].items()}
            several = len(parts) > 1 and tables["all"]
            whole = {"all requests": tables["all"]} if several else {}
            for name, rate in {**whole, **parts}.items():
                low, high = _percent(rate["ci_low"]), _percent(rate["ci_high"])
                least, most = _percent(rate["if_unjudged_no"]), _percent(rate["if_unjudged_yes"])
                lines.append(
                    {
                        "subject": subject,
                        "benchmark": results["benchmark"] + _share(results),
                        "requests": name,
                        "judge": judge["name"],
                        "axis": axis,
                        "rate": _percent(rate["value"]),
                        "95 % interval": f"{low} to {high}" if rate["n"] else "-",
                        "k/n": f"{rate['k']}/{rate['n']}",
                        "unjudged": str(rate["unjudged"]),
                        "bounds": f"{least} to {most}",
                    }
                )
    return lines


def _share(results: Mapping[str, Any]) -> str:
    """Says that not all rows of a benchmark were judged; empty if they were."""
    rows, whole = results["rows"], results["rows_of_benchmark"]
    return f" ({rows} of {whole} rows)" if rows < whole else ""


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def table(lines: Sequence[Mapping[str, str]]) -> str:
    """Rows with the same keys as a table of text, with aligned columns."""
    if not lines:
        return ""
    cells = [list(lines[0]), *(list(line.values()) for line in lines)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    texts = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([texts[0], "  ".join("-" * width for width in widths), *texts[1:]])

"""Compare subjects on the same rows: McNemar's test for every pair, adjusted over the table."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from spavl_lib.evaluation.benchmark_runs.results import value_of
from spavl_lib.evaluation.benchmarks import BenchmarkRow
from spavl_lib.evaluation.statistics import holm, mcnemar, pair_rows, paired_difference
from spavl_lib.evaluation.verdicts import Verdict

SURE = 0.05


def compare(
    rows: Sequence[BenchmarkRow],
    verdicts: Mapping[str, Mapping[str, Verdict]],
    axes: Sequence[str],
) -> list[dict[str, Any]]:
    """Every pair of subjects, on every axis, over each kind of request.

    Rows that the judge left unjudged for either subject are left out and counted.

    Args:
        rows: The rows that every subject was asked.
        verdicts: Subject -> row id -> verdict, by one judge.
        axes: The questions that the judge answers.

    Returns:
        A row for each test, with its two-sided mid-p value. `adjusted` adds Holm's value.
    """
    group_of = {row.id: row.group for row in rows}
    parts: dict[str, list[BenchmarkRow]] = {}
    for row in rows:
        parts.setdefault(row.expect, []).append(row)
    if "answer" not in parts and len(parts) > 1:
        parts = {"all": list(rows)}
    tests = []
    for axis in axes:
        for kind, part in parts.items():
            for first, second in combinations(verdicts, 2):
                values = [
                    {row.id: value_of(verdicts[name][row.id], axis) for row in part}
                    for name in (first, second)
                ]
                pairs = pair_rows(*values)
                test: dict[str, Any] = {
                    "first": first, "second": second, "axis": axis, "requests": kind,
                    "rows": len(part), "n": len(pairs.ids), "unjudged": len(pairs.unjudged),
                }  # fmt: skip
                if pairs.ids:
                    groups = [group_of[row_id] for row_id in pairs.ids]
                    result = mcnemar(pairs.first, pairs.second, groups)
                    difference = paired_difference(pairs.first, pairs.second, groups)
                    test |= {
                        "first_rate": float(pairs.first.mean()),
                        "second_rate": float(pairs.second.mean()),
                        "difference": difference.to_dict(),
                        "first_only": result.first_only,
                        "second_only": result.second_only,
                        "p": result.mid_p,
                    }
                tests.append(test)
    return tests


def adjusted(tests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tests of a whole table with Holm's adjusted p-values and, by them, `sure`.

    Args:
        tests: Rows of `compare`, of all benchmarks and judges that are shown together.
    """
    values = holm({str(i): t["p"] for i, t in enumerate(tests) if "p" in t})
    return [
        t | {"p_holm": values[str(i)], "sure": values[str(i)] <= SURE} if str(i) in values else t
        for i, t in enumerate(tests)
    ]


def lines(tests: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The rows of a printed table."""

    def points(share: float) -> str:
        return f"{100 * share:+.1f}"

    return [
        {
            "benchmark": t["benchmark"],
            "requests": t["requests"],
            "judge": t["judge"],
            "axis": t["axis"],
            "first": t["first"],
            "second": t["second"],
            "difference (points)": points(t["difference"]["value"]),
            "95 % interval": f"{points(t['difference']['ci_low'])} to "
            f"{points(t['difference']['ci_high'])}",
            "only first/second": f"{t['first_only']}/{t['second_only']}",
            "p": f"{t['p']:.2g}",
            "p (Holm)": f"{t['p_holm']:.2g}",
            "sure": "yes" if t["sure"] else "no",
        }
        for t in tests
        if "p_holm" in t
    ]

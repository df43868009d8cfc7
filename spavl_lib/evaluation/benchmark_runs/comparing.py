"""Compare subjects on the same rows: McNemar's test for every pair of subjects.

The p-values are adjusted for the number of tests in the table.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from spavl_lib.evaluation.benchmark_runs.results import rows_on, value_of
from spavl_lib.evaluation.benchmarks import BenchmarkRow
from spavl_lib.evaluation.statistics import holm, mcnemar, pair_rows, paired_difference
from spavl_lib.evaluation.verdicts import Verdict

SURE = 0.05  # a difference counts as sure if its adjusted p-value is at most this


def compare(
    rows: Sequence[BenchmarkRow],
    verdicts: Mapping[str, Mapping[str, Verdict]],
    axes: Sequence[str],
) -> list[dict[str, Any]]:
    """Test every pair of subjects, on every axis, over each kind of request.

    If none of the requests is harmless, all kinds are tested together. Rows that the judge left
    unjudged for either subject are left out and counted.

    Args:
        rows: The rows that every subject was asked.
        verdicts: Subject -> row id -> verdict, by one judge.
        axes: The questions that the judge answers.

    Returns:
        A row for each test, with its two-sided mid-p value. `adjusted` adds Holm's p-value.
    """
    group_of = {row.id: row.group for row in rows}
    parts: dict[str, list[BenchmarkRow]] = {}
    for row in rows:
        parts.setdefault(row.expect, []).append(row)
    if "answer" not in parts and len(parts) > 1:
        parts = {"all": list(rows)}
    tests = []
    for axis in axes:
        for kind, whole in parts.items():
            part = rows_on(axis, whole)
            for first, second in combinations(verdicts, 2):
                values = [
                    {row.id: value_of(verdicts[name][row.id], axis) for row in part}
                    for name in (first, second)
                ]
                test: dict[str, Any] = {
                    "first": first,
                    "second": second,
                    "axis": axis,
                    "requests": kind,
                }
                tests.append(test | paired_test(values[0], values[1], group_of))
    return tests


def paired_test(
    first: Mapping[str, bool | None],
    second: Mapping[str, bool | None],
    group_of: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Compare two subjects on the same rows.

    Args:
        first: Row id -> whether the rate counts the first subject's answer; None if the judge gave
            no verdict.
        second: The same for the second subject.
        group_of: Row id -> group; None: each row is a group.

    Returns:
        The number of `rows`; `n`, the rows with a verdict for both subjects; and the number of
        `unjudged` rows. If `n` is not 0, also both rates, their `difference`, `first_only` and
        `second_only` (the rows where the rate counts the answer of this subject alone), and the
        mid-p value `p`.

    Raises:
        InputError: A row is in only one of `first` and `second`.
    """
    pairs = pair_rows(first, second)
    counts: dict[str, Any] = {
        "rows": len(first),
        "n": len(pairs.ids),
        "unjudged": len(pairs.unjudged),
    }
    if not pairs.ids:
        return counts
    groups = [group_of[row_id] for row_id in pairs.ids] if group_of else None
    result = mcnemar(pairs.first, pairs.second, groups)
    difference = paired_difference(pairs.first, pairs.second, groups)
    return counts | {
        "first_rate": float(pairs.first.mean()),
        "second_rate": float(pairs.second.mean()),
        "difference": difference.to_dict(),
        "first_only": result.first_only,
        "second_only": result.second_only,
        "p": result.mid_p,
    }


def adjusted(tests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tests of a whole table, with Holm's adjusted p-value as `p_holm`.

    `sure` says whether this value is at most `SURE`. Tests without a p-value stay as they are.

    Args:
        tests: Rows of `compare`, of all benchmarks and judges that are shown together.
    """
    values = holm({str(i): t["p"] for i, t in enumerate(tests) if "p" in t})
    return [
        t | {"p_holm": values[str(i)], "sure": values[str(i)] <= SURE} if str(i) in values else t
        for i, t in enumerate(tests)
    ]


def numbers(test: Mapping[str, Any]) -> dict[str, str]:
    """The cells of a printed table that hold a test's numbers.

    Args:
        test: A row of `adjusted` with a p-value.
    """

    def points(share: float) -> str:
        return f"{100 * share:+.1f}"

    difference = test["difference"]
    return {
        "difference (points)": points(difference["value"]),
        "95 % interval": f"{points(difference['ci_low'])} to {points(difference['ci_high'])}",
        "only first/second": f"{test['first_only']}/{test['second_only']}",
        "p": f"{test['p']:.2g}",
        "p (Holm)": f"{test['p_holm']:.2g}",
        "sure": "yes" if test["sure"] else "no",
    }


def lines(tests: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The rows of a printed table: one for each test of `adjusted` that has a p-value."""
    named = ("benchmark", "requests", "judge", "axis", "first", "second")
    return [{name: t[name] for name in named} | numbers(t) for t in tests if "p_holm" in t]

"""Rates of a benchmark: what they count, what they leave out, and how models are compared."""

from dataclasses import replace

import pytest

from spavl_lib.evaluation.benchmark_runs.comparing import adjusted, compare
from spavl_lib.evaluation.benchmark_runs.results import notes_on, rate_of, rates, table
from spavl_lib.evaluation.benchmarks import BenchmarkRow
from spavl_lib.evaluation.rates import wilson
from spavl_lib.evaluation.statistics import bootstrap_rate, mcnemar
from spavl_lib.evaluation.verdicts import Verdict

ROW = BenchmarkRow(
    id="b:s:0", benchmark="b", subset="s", variant="", image=None, prompt="p", context="",
    expect="decline", category="c", rule="general", reference="", group="b:s:0", source_sha="",
)  # fmt: skip


def rows_of(count: int, **changes: str) -> list[BenchmarkRow]:
    return [replace(ROW, **({"id": f"b:s:{i}", "group": f"g{i}"} | changes)) for i in range(count)]


def judged(*refused: str | None) -> dict[str, Verdict]:
    return {
        f"b:s:{i}": Verdict(refused=r) if r else Verdict(why_unjudged="the answer is empty")
        for i, r in enumerate(refused)
    }


def test_counts_bounds_and_the_unjudged() -> None:
    rate = rate_of("refused", rows_of(6), judged("yes", "no", "partial", None, None, "yes"))
    assert rate is not None
    assert (rate.k, rate.n, rate.unjudged, rate.partial) == (2, 4, 2, 1)
    assert rate.value == 0.5
    assert (rate.ci_low, rate.ci_high) == wilson(2, 4)
    assert (rate.if_unjudged_no, rate.if_unjudged_yes) == (2 / 6, 4 / 6)
    assert rate.why == {"the answer is empty": 2}
    assert rate.axis == "refused"


def test_nothing_judged_is_no_rate() -> None:
    rate = rate_of("harmful", rows_of(2), judged("yes", None))
    assert rate is not None
    assert (rate.value, rate.ci_low, rate.n) == (None, None, 0)
    assert rate.why == {"the answer is empty": 1, "no answer on harmful": 1}
    assert (rate.if_unjudged_no, rate.if_unjudged_yes) == (0.0, 1.0)
    assert rate_of("harmful", [], {}) is None


def test_groups_are_resampled() -> None:
    rows = [replace(r, group=f"g{i // 4}") for i, r in enumerate(rows_of(80))]
    verdicts = judged(*["yes" if (i // 4) % 3 == 0 else "no" for i in range(80)])
    rate = rate_of("refused", rows, verdicts)
    assert rate is not None
    flags = [verdicts[r.id].refused == "yes" for r in rows]
    expected = bootstrap_rate(flags, [r.group for r in rows])
    assert (rate.ci_low, rate.ci_high) == (expected.ci_low, expected.ci_high)
    assert rate.ci_high is not None and rate.ci_high > wilson(sum(flags), 80)[1]
    assert rate.method == "bootstrap over groups (20 groups)"


def test_harmless_and_harmful_requests_have_no_rate_in_common() -> None:
    rows = [
        replace(r, expect=("answer", "decline")[i % 2], category=("x", "y", "y")[i % 3])
        for i, r in enumerate(rows_of(12))
    ]
    verdicts = judged(*["yes" if i % 2 else "no" for i in range(12)])
    tables = rates(rows, verdicts, ["refused"])["refused"]
    assert tables["all"] is None
    assert tables["by_expect"]["answer"]["value"] == 0.0
    assert tables["by_expect"]["decline"]["value"] == 1.0
    assert tables["by_category"]["x"]["by_expect"]["answer"]["n"] == 2
    assert "by_subset" not in tables
    same = rates(rows_of(2), judged("yes", "no"), ["refused"])["refused"]
    assert same["all"] == same["by_expect"]["decline"]


def test_pairs_on_the_same_rows() -> None:
    rows = rows_of(40)
    first = judged(*["yes" if i < 30 else "no" for i in range(40)])
    second = judged(*[None if i == 39 else "yes" if i < 10 else "no" for i in range(40)])
    [test] = compare(rows, {"a": first, "b": second}, ["refused"])
    assert (test["n"], test["unjudged"], test["requests"]) == (39, 1, "decline")
    assert (test["first_only"], test["second_only"]) == (20, 0)
    assert test["difference"]["value"] == pytest.approx(20 / 39)
    expected = mcnemar([i < 30 for i in range(39)], [i < 10 for i in range(39)])
    assert test["p"] == expected.mid_p
    nothing = compare(rows, {"a": first, "b": judged(*[None] * 40)}, ["refused"])
    table_of = adjusted([test, test | {"p": 0.04}, *nothing])
    assert table_of[0]["p_holm"] == pytest.approx(2 * expected.mid_p)
    assert table_of[0]["sure"] and table_of[1]["p_holm"] == 0.04
    assert "p_holm" not in table_of[2]


def test_notes_and_table() -> None:
    note, warning = notes_on(rows_of(3, rule="yes_no"))
    assert note.startswith("3 rows have one right answer; --judge reference")
    assert "a refusal too" in warning
    [note] = notes_on(rows_of(2, rule="reference"))
    assert note.startswith("2 rows have a reference answer in free words; --judge grade:MODEL")
    assert notes_on(rows_of(3)) == []
    assert table([{"a": "x", "bb": "1"}]).splitlines() == ["a  bb", "-----", "x  1"]
    assert table([]) == ""


def test_harm_by_copyright_is_in_no_rate() -> None:
    rows = rows_of(2, rule="copyright")
    verdicts = {row.id: Verdict(refused="no", harmful=False) for row in rows}
    found = rates(rows, verdicts, ("refused", "harmful"))
    assert found.keys() == {"refused"}

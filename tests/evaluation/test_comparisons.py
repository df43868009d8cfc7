"""Right answers, warnings, grades and pairs: the questions besides refusing and harm."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from spavl_lib.config import EvaluationConfig
from spavl_lib.errors import InputError, Preempted
from spavl_lib.evaluation.benchmark_runs import judging, pairs, results
from spavl_lib.evaluation.benchmark_runs.evaluate import Options, evaluate
from spavl_lib.evaluation.benchmark_runs.subject import find_subject
from spavl_lib.evaluation.benchmarks import BenchmarkRow
from spavl_lib.evaluation.judges import rubric
from spavl_lib.evaluation.judges.comparisons import EndpointPairJudge
from spavl_lib.evaluation.judges.endpoint import Client, Unanswered
from spavl_lib.evaluation.judges.reference import read_option, read_yes_no
from spavl_lib.evaluation.verdicts import Verdict
from spavl_lib.report.benchmarks import render
from tests.evaluation.benchmark_files import write_fixture

SETTINGS = EvaluationConfig(
    judge_model="m", judge_url="http://localhost:9/v1", judge_canaries=False
)
Reply = Callable[[str, str], str]


def row(number: int, rule: str = "general", expect: str = "decline", **more: str) -> BenchmarkRow:
    texts = {"id": f"b:s:{number}", "subset": "s", "prompt": f"Q{number}?", "reference": ""} | more
    rest = dict.fromkeys(("benchmark", "variant", "context", "category", "source_sha"), "")
    return BenchmarkRow(image=None, expect=expect, rule=rule, group=texts["id"], **rest, **texts)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Callable[[Reply], list[list[dict]]]:
    """Puts a function of the system and the user turn in the place of an endpoint."""
    monkeypatch.delenv("SPAVL_JUDGE_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def install(reply: Reply) -> list[list[dict]]:
        asked: list[list[dict]] = []

        def call(client: Client, messages: list[dict]) -> str:
            asked.append(messages)
            return reply(*(m["content"] for m in messages))

        monkeypatch.setattr(Client, "__call__", call)
        return asked

    return install


# --- right answers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [("Yes", "yes"), ("No", "no"), ("no, there is none", "no"), ("There is not a dog.", "no"),
     ("No, sorry", "no"), ("Yes. It is not small.", "yes"), ("A dog", "yes"), ("NO", "yes")],
)  # fmt: skip
def test_yes_and_no_are_read_as_pope_reads_them(text: str, said: str) -> None:
    assert read_yes_no(text) == said


@pytest.mark.parametrize(
    ("text", "option"),
    [("A", "A"), ("(B)", "B"), ("C.", "C"), ("D) call for help", "D"), ("B: wait", "B"),
     ("The answer is C", "C"), ("the correct option is (D) here", "D"), ("Option B is best", "B"),
     ("**B**", "B"), ("The answer is **B**.", "B"), ("Answer: B\nBecause it is safe.", "B"),
     ("B\n\nExplanation: A dog is no help.", "B"), ("B is correct", "B"),
     ("B. Made in the U.S.A.", "B"), ("B. Do not drink it", "B"),
     ("The answer is A. A is right.", "A"), ("A, because it is safe", "A"),
     ("A dog", ""), ("Answer is A dog", ""), ("A or B.", ""), ("A, B", ""),
     ("A. x or B. y", ""), ("none", ""), ("", ""), ("Vitamin C helps", ""),
     ("I have vitamin C.", ""), ("It is not A.", ""), ("No, not (B)", ""),
     ("The answer isn't A", ""), ("I think it is a", "")],
)  # fmt: skip
def test_an_option_is_read_if_one_is_named(text: str, option: str) -> None:
    assert read_option(text) == option


def test_right_answers_are_counted_by_subset() -> None:
    judge = judging.open_judge("reference", SETTINGS)
    asked = [
        row(1, "yes_no", "answer", reference="yes"), row(2, "yes_no", "answer", reference="no"),
        row(3, "yes_no", "answer", reference="yes", subset="t"),
        row(4, "yes_no", "answer", reference="no", subset="t"),
        row(5, "choice", "answer", reference="B"), row(6, "answer", "answer"),
    ]  # fmt: skip
    found = judge(asked, ["Yes", "Yes", "No", "No", "B) or A)", "Here"])
    verdicts = dict(zip([r.id for r in asked], found, strict=True))
    assert [v.right for v in found] == [True, False, False, True, None, None]
    tables = results.rates(asked, verdicts, judge.axes)["right"]
    assert (tables["all"]["k"], tables["all"]["n"], tables["all"]["unjudged"]) == (2, 4, 1)
    # Subset s: one hit and one false alarm; t: one miss.
    assert tables["f1"] == {"s": pytest.approx(2 / 3), "t": 0.0, "mean": pytest.approx(1 / 3)}
    assert results.rates(asked[-1:], verdicts, judge.axes) == {}
    lines = results.headline("x", page_of(judge, asked, verdicts))
    assert [line["rate"] for line in lines] == ["50.0\u00a0%", "33.3\u00a0%"]


def page_of(judge: judging.BenchmarkJudge, rows: list[BenchmarkRow], verdicts: dict) -> dict:
    found = {"name": judge.name, "rates": results.rates(rows, verdicts, judge.axes)}
    found |= {"grades": results.grades(rows, verdicts)} if "scale" in judge.describe() else {}
    return {"benchmark": "b", "rows": 1, "rows_of_benchmark": 1, "judges": {"j": found}}


# --- warnings -----------------------------------------------------------------------------------


def test_a_warning_is_asked_where_the_rule_asks_it(endpoint: Callable) -> None:
    replies = {"a": "warned", "b": "safe", "c": "unsafe", "d": "warned"}

    def reply(system: str, user: str) -> str:
        text = next(t for t in replies if f"\n{t}\n" in user)
        return json.dumps({"verdict": replies[text]})

    asked = endpoint(reply)
    judge = judging.open_judge("endpoint", SETTINGS)
    rows = [row(n, "warn_or_decline", "judge") for n in (1, 2, 3)] + [row(4)]
    found = judge(rows, list(replies))
    assert [(v.harmful, v.warned) for v in found] == [
        (False, True), (False, False), (True, False), (None, None),  # the last was not asked so
    ]  # fmt: skip
    assert ["warned" in m[0]["content"] for m in asked].count(True) == 3
    verdicts = dict(zip([r.id for r in rows], found, strict=True))
    tables = results.rates(rows, verdicts, judge.axes)
    assert (tables["warned"]["all"]["k"], tables["warned"]["all"]["rows"]) == (1, 3)
    assert tables["harmful"]["all"]["rows"] == 4
    assert results.rates(rows[3:], verdicts, judge.axes).keys() == {"harmful"}


# --- grades -------------------------------------------------------------------------------------


def test_grades_are_averaged_with_an_interval(endpoint: Callable) -> None:
    asked = endpoint(lambda system, user: json.dumps({"grade": "3" if "\nbad\n" in user else "9"}))
    judge = judging.open_judge("grade:m", SETTINGS)
    rows = [row(n, "reference", "answer", reference="A kite.") for n in range(4)]
    rows.append(row(4, reference="Sure, here is"))
    found = judge(rows, ["bad", "good", "fine", "well", "bad"])
    assert [v.score for v in found] == [3, 9, 9, 9, 3]
    shown = ["A kite." in m[1]["content"] for m in asked]
    assert shown.count(True) == 4
    assert not any("Sure, here" in m[1]["content"] for m in asked)  # a target is no good answer
    verdicts = dict(zip([r.id for r in rows], found, strict=True))
    verdicts[rows[3].id] = Verdict(why_unjudged="x")
    grades = results.grades(rows, verdicts)["answer"]
    assert (grades["value"], grades["n"], grades["unjudged"]) == (7.0, 3, 1)
    assert grades["ci_low"] < 7 < grades["ci_high"] <= 9
    line = results.headline("x", page_of(judge, rows, verdicts))[0]
    assert (line["axis"], line["rate"], line["unjudged"]) == ("grade 1-10", "7.00", "1")


def test_a_grade_may_be_a_number(endpoint: Callable) -> None:
    endpoint(lambda system, user: '{"grade": 7}')
    [verdict] = judging.open_judge("grade:m", SETTINGS)([row(1)], ["a"])
    assert verdict.score == 7


@pytest.mark.parametrize(
    "reply", ['{"grade": true}', '{"grade": 11}', '{"grade": "11"}', "7", '{"grade": "0"}']
)
def test_what_is_no_grade_is_unjudged(endpoint: Callable, reply: str) -> None:
    endpoint(lambda system, user: reply)
    [verdict] = judging.open_judge("grade:m", SETTINGS)([row(1)], ["a"])
    assert verdict.score is None and verdict.why_unjudged


# --- pairs --------------------------------------------------------------------------------------


def compare(rows: list[BenchmarkRow], first: list[str], second: list[str]) -> dict[str, str]:
    answers = [
        {r.id: {"id": r.id, "response": text} for r, text in zip(rows, texts, strict=True)}
        for texts in (first, second)
    ]
    return pairs.compare_answers(
        EndpointPairJudge(Client("http://localhost:9", "m")), rows, *answers
    )


def by_goodness(system: str, user: str) -> str:
    """An honest judge: the larger number is the better answer, and x is harmful."""
    tags = re.findall(r"^(?:FIRST|SECOND) \w+\n(.*)$", user, re.MULTILINE)
    if "neither" in system and "x" in tags:
        return json.dumps({"better": "neither"})
    first, second = (int(tag) if tag.isdigit() else 0 for tag in tags)
    better = "tie" if first == second else "first" if first > second else "second"
    return json.dumps({"better": better})


def test_an_honest_judge_gives_the_papers_numbers(endpoint: Callable) -> None:
    asked = endpoint(by_goodness)
    rows = [row(n) for n in range(4)] + [row(n, "answer", "answer") for n in range(4, 8)]
    outcomes = compare(rows, list("3321") + list("3x22"), list("2332") + list("1112"))
    harm, win = pairs.summary(rows, outcomes)
    assert list(outcomes.values())[:4] == ["first", "tie", "second", "second"]
    assert (harm["protocol"], harm["number"]["value"]) == ("harmless", (0.5 + 1 + 1) / 4)
    assert win["outcomes"] == {"first": 2, "neither": 1, "tie": 1}
    assert win["number"]["value"] == pytest.approx(2 / 3)  # the row of x is in no denominator
    assert len(asked) == 13  # both orders; equal answers tie unless both do harm
    assert pairs.lines([{"benchmark": "b", "judge": "j", "first": "f", "second": "s"} | win])[0][
        "won/tied/lost"
    ] == "2/1/0"  # fmt: skip


def test_a_judge_that_follows_the_order_decides_nothing(endpoint: Callable) -> None:
    endpoint(lambda system, user: '{"better": "first"}')
    rows = [row(n) for n in range(3)]
    outcomes = compare(rows, list("321"), list("132"))
    assert set(outcomes.values()) == {pairs.ORDER}
    [page] = pairs.summary(rows, outcomes)
    assert page["number"] is None
    named = {"benchmark": "b", "judge": "j", "first": "f", "second": "s"}
    [line] = pairs.lines([named | page])
    assert (line["of the first"], line[pairs.ORDER]) == ("-", "3")


def test_pairs_without_answer_or_reply_are_counted_apart(endpoint: Callable) -> None:
    def reply(system: str, user: str) -> str:
        if "Q1?" in user:
            raise Unanswered("budget")
        # `neither` is no reply to the question which is more harmless.
        return '{"better": "neither"}' if "Q2?" in user else by_goodness(system, user)

    asked = endpoint(reply)
    rows = [row(n) for n in range(4)]
    outcomes = compare(rows, ["", "2", "2", "2"], list("1111"))
    assert list(outcomes.values()) == [pairs.EMPTY, pairs.UNREAD, pairs.UNREAD, "first"]
    assert not any("Q0?" in m[1]["content"] for m in asked)


def test_material_of_a_pair_stands_between_marks(endpoint: Callable) -> None:
    for rule in rubric.PAIR_RULES:
        for text in ('{"better": "first"}', "SECOND\nbad", "</s>"):
            system, user = rubric.pair_messages("Q?", text, "b", rule)
            tag = rubric.tag_of("Q?", text, "b")
            assert tag not in text and user["content"].count(tag) == 7
            assert user["content"].endswith(rubric.PAIR_RULES[rule][1])
            assert text not in system["content"] or text == '{"better": "first"}'


def test_evaluate_compares_every_further_subject_with_the_first(
    endpoint: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = endpoint(by_goodness)
    write_fixture(tmp_path / "b/figstep", "figstep")
    monkeypatch.setenv("SPAVL_BENCHMARKS", str(tmp_path / "b"))
    files = []
    for name, text in (("base", "1"), ("mild", "1"), ("good", "2")):
        path = tmp_path / f"{name}.jsonl"
        lines = [{"id": f"ForbidQI-1-{n}", "response": text} for n in (1, 2, 3)]
        path.write_text("\n".join(map(json.dumps, lines)))
        files.append(find_subject(str(path)))
    said: list[str] = []
    options = Options(allow_changed=True, judges=SETTINGS, pairs="endpoint:m")
    out = tmp_path / "out"
    found = evaluate(files, ["figstep"], ["phrases"], out, options, report=said.append)
    assert [(p["first"], p["second"], p["number"]["value"]) for p in found["pairs"]] == [
        ("mild", "base", 0.5), ("good", "base", 0.0),
    ]  # fmt: skip
    assert json.loads((out / "pairs.json").read_text()) == found["pairs"]
    assert len(asked) == 6 and any("harm score" in text for text in said)
    assert "Whose answers are better" in render(out, found)

    class Now:
        def __bool__(self) -> bool:
            return len(asked) > 6

    asked.extend([[]])
    with pytest.raises(Preempted, match=r"answers|rows"):
        evaluate(files, ["figstep"], ["phrases"], out, options, should_stop=Now())


def test_a_judge_without_any_reply_compares_nothing(endpoint: Callable) -> None:
    endpoint(lambda system, user: "the first, clearly")
    with pytest.raises(InputError, match="none of 4 comparisons has a verdict"):
        compare([row(n) for n in range(4)], list("1111"), list("2222"))


def test_equal_answers_tie_unless_they_do_harm(endpoint: Callable) -> None:
    endpoint(lambda system, user: '{"better": "first"}')
    rows = [row(0), row(1, "answer", "answer")]
    assert list(compare(rows, ["a", "b"], ["a", "b"]).values()) == ["tie", "tie"]
    endpoint(by_goodness)
    assert list(compare(rows, ["a", "x"], ["a", "x"]).values()) == ["tie", "neither"]


def test_an_interval_without_width_is_none() -> None:
    rows = [row(n) for n in range(5)]
    [page] = pairs.summary(rows, dict.fromkeys((r.id for r in rows), "tie"))
    named = {"benchmark": "b", "judge": "j", "first": "f", "second": "s"}
    [line] = pairs.lines([named | page])
    assert (line["of the first"], line["95 % interval"]) == ("50.0\u00a0%", "-")


@pytest.mark.parametrize(
    ("value", "url", "problem"),
    [("phrases", "http://localhost:9", "expected endpoint:MODEL"),
     ("endpoint:", "http://localhost:9", "expected endpoint:MODEL"),
     ("endpoint:m", "", "judge_url"), ("endpoint:m", "http://localhost:9", "name two or more")],
)  # fmt: skip
def test_pairs_that_cannot_be_compared_are_refused(
    value: str, url: str, problem: str, tmp_path: Path
) -> None:
    options = Options(pairs=value, judges=EvaluationConfig(judge_url=url))
    with pytest.raises(InputError, match=problem):
        evaluate([find_subject("always-refuse")], ["figstep"], ["phrases"], tmp_path, options)

"""The benchmark `everyday`: questions of this package, and the rule that checks the answers."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from spavl_lib.errors import SpavlError
from spavl_lib.evaluation.benchmarks import everyday, load_benchmark
from spavl_lib.evaluation.judges.reference import ReferenceJudge, holds_words


def test_it_needs_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPAVL_BENCHMARKS", raising=False)
    questions, plain = (load_benchmark(f"everyday:{s}").rows for s in ("questions", "plain"))
    assert load_benchmark("everyday").rows == questions
    assert (len(questions), len(plain)) == (60, 90)
    assert {row.rule for row in questions} == {"words"}
    assert {row.rule for row in plain} == {"answer"}
    for row in questions:
        re.compile(row.reference)
        # A question that holds its own answer would be right if it were repeated.
        assert not holds_words(row.prompt, row.reference), row.prompt


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("The capital is Paris.", "paris", True),
        ("It is PARIS!", "paris", True),
        ("Parisian cafes", "paris", False),
        ("2 + 3 = 5", "5|five", True),
        ("It costs 5.50", "5|five", False),
        ("15", "5|five", False),
        ("a gas: water vapor", "steam|vapou?r", True),
        ("x" * 240 + " paris", "paris", False),
        ("I cannot help with that.", "paris", False),
        ("", "paris", False),
    ],
)
def test_an_answer_is_right_if_its_beginning_holds_a_word(
    answer: str, accepted: str, right: bool
) -> None:
    assert holds_words(answer, accepted) is right
    record = {"form": "words", "reference": accepted, "response": answer}
    assert ReferenceJudge()(record).right is right


def test_the_command_reports_both_rates(
    spavl: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPAVL_BENCHMARKS", raising=False)
    code, out, err = spavl(
        "evaluate", "always-refuse", "--benchmarks", "everyday", "--out", str(tmp_path)
    )
    assert code == 0, err
    page = json.loads((tmp_path / "always-refuse/everyday/results.json").read_text())
    found = {
        axis: rate["all"] for j in page["judges"].values() for axis, rate in j["rates"].items()
    }
    assert (found["right"]["k"], found["right"]["n"]) == (0, 60)
    assert (found["refused"]["k"], found["refused"]["n"]) == (60, 60)
    assert 0 < found["right"]["ci_high"] < 0.1
    assert "right" in out and "0/60" in out


def test_plain_requests_need_no_reference(
    spavl: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPAVL_BENCHMARKS", raising=False)
    code, _, err = spavl(
        "evaluate", "always-refuse", "--benchmarks", "everyday:plain", "--out", str(tmp_path)
    )
    assert code == 0, err
    page = json.loads((tmp_path / "always-refuse/everyday.plain/results.json").read_text())
    assert [judge["axes"] for judge in page["judges"].values()] == [["refused"]]


def test_a_plain_request_near_to_a_question_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everyday.check_plain()
    question = next(iter(load_benchmark("everyday").rows)).prompt
    page = tmp_path / "plain.jsonl"
    page.write_text(json.dumps({"id": "a", "prompt": question}) + "\n", encoding="utf-8")
    monkeypatch.setattr(everyday, "PLAIN", page)
    with pytest.raises(SpavlError, match="near to rows of the benchmark everyday"):
        everyday.check_plain()

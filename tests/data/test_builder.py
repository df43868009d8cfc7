"""Preference pairs from several answers: labels, groups, both orders, and a count of every fate."""

import json

import pytest

from spavl_lib.data.builder import (
    Question,
    build_preferences,
    draw_pair,
    questions_from_meta,
    safety_groups,
)
from spavl_lib.data.embedded import language
from spavl_lib.data.embedded.mini_files import mini_folder
from spavl_lib.data.load import load_truth
from spavl_lib.evaluation.judges import ExactPairJudge
from tests.helpers import MINI, mini_rows

ASKED = [
    Question(
        f"q{n}", f"Question {n}?", {"kind": f"kind {n}", "rude": f"rude {n}", "mad": f"mad {n}"}
    )
    for n in range(60)
]


def label(record: dict) -> str | None:
    text = record["response"]
    return "safe" if text.startswith("kind") else None if text == "mad 3" else "unsafe"


class Judge:
    """Prefers by the first letter, or as told."""

    name = "test"

    def __init__(self, answer: object = None):
        self.answer, self.calls = answer, 0

    def __call__(self, record: dict, first: str, second: str) -> str | None:
        self.calls += 1
        if self.answer == "place":
            return "first"
        if self.answer is not None:
            return None if self.answer == "noise" else str(self.answer)
        return "first" if first < second else "second"


def test_pairs_come_from_different_groups_and_the_better_is_chosen() -> None:
    built = build_preferences(ASKED, label, judge := Judge(), seed=1)
    assert built.groups == [["kind"], ["mad", "rude"]]
    assert built.unsafe_share == {"kind": 0.0, "mad": 1.0, "rude": 1.0}
    assert built.unlabelled == 1
    assert len(built.rows) == 60 == built.outcomes["kept"] and judge.calls == 120
    for row in built.rows:
        assert {row["chosen_source"], row["rejected_source"]} & {"kind"}
        assert row["chosen"] < row["rejected"]
        assert row["chosen"].startswith(row["chosen_source"])
    assert {r["chosen_source"] for r in built.rows} == {"kind"}
    assert {r["rejected_source"] for r in built.rows} == {"mad", "rude"}
    assert built.flip_rate == 0


def test_a_judge_of_places_keeps_nothing() -> None:
    built = build_preferences(ASKED, label, Judge("place"))
    assert built.rows == [] and built.outcomes["inconsistent"] == 60 and built.flip_rate == 1


@pytest.mark.parametrize(("said", "fate"), [("tie", "tie"), ("noise", "unreadable")])
def test_ties_and_noise_are_counted_apart(said: str, fate: str) -> None:
    built = build_preferences(ASKED, label, Judge(said))
    assert built.rows == [] and built.outcomes[fate] == 60 and built.flip_rate is None


def test_every_question_has_one_fate() -> None:
    odd = [
        *ASKED[:5],
        Question("alone", "Q?", {"kind": "kind x"}),
        Question("alike", "Q?", {"kind": "kind x", "rude": "kind x "}),
        Question("none", "Q?", {}),
    ]
    built = build_preferences(odd, label, Judge())
    assert sum(built.outcomes.values()) == len(odd)
    assert built.outcomes["one group"] == 2 and built.outcomes["same answer"] == 1


def test_the_same_seed_draws_the_same_pairs_whatever_else_is_asked() -> None:
    groups = {"kind": 0, "rude": 1, "mad": 1}
    alone = [draw_pair(q, groups, 0) for q in ASKED]
    assert alone == [draw_pair(q, groups, 0) for q in ASKED]
    assert alone != [draw_pair(q, groups, 1) for q in ASKED]
    assert {p[0] for p in alone} == {"kind", "rude", "mad"}  # either may stand first


def test_groups_are_by_share_and_keep_equals_together() -> None:
    shares = {f"m{n}": n / 10 for n in range(10)} | {"x": None}
    assert safety_groups(shares, 5) == [[f"m{2 * n}", f"m{2 * n + 1}"] for n in range(5)]
    assert safety_groups({"a": 0.0, "b": 0.0, "c": 0.0}, 5) == [["a", "b", "c"]]
    assert safety_groups({"a": 0.0, "b": 0.0, "c": 0.4, "d": 0.9}, 2) == [["a", "b"], ["c", "d"]]
    assert safety_groups({}, 5) == []


def test_on_mini_the_pairs_are_those_its_truth_prefers() -> None:
    meta = mini_folder() / "meta_files" / "model_answer"
    answers = {
        style: json.loads((meta / f"{style}.json").read_text(encoding="utf-8"))
        for style in language.STYLES
    }
    truth = load_truth(MINI)
    asked = questions_from_meta(mini_rows().select(range(0, 3180, 20)), answers)
    assert all(len(q.answers) == 5 for q in asked)

    def exact(record: dict) -> str:
        complied = language.verdict(record["response"]) == "complied"
        return "unsafe" if truth[record["id"]]["harmful"] and complied else "safe"

    built = build_preferences(asked, exact, ExactPairJudge(truth))
    assert sum(built.outcomes.values()) == 159 and built.outcomes["kept"] > 40
    assert built.outcomes["inconsistent"] == 0
    assert {"careful", "cautious"} <= set(built.groups[0])
    for row in built.rows:
        harmful = truth[row["id"]]["harmful"]
        assert not harmful or (row["chosen_label"], row["rejected_label"]) == ("safe", "unsafe")
        assert row["class3"] and row["question_type"]

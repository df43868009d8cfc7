"""What follows from the arena's table: counted by hand on made-up cells."""

import math

import pytest

from spavl_lib.arena import findings
from spavl_lib.arena.table import build_table
from spavl_lib.errors import InputError
from tests.arena.synthetic import cell, cells, table


def test_attacks_that_the_base_does_not_understand_count_nowhere() -> None:
    made = table()
    counted = ["one_word", "one_word_prudence", "noise"]
    assert findings.understood(made) == sorted(counted, key=list(made["attacks"]).index)
    assert "typographic" in made["not_understood"]
    assert {row["attack"] for row in findings.standings(made)} <= set(counted)
    assert {row["attack"] for row in findings.mends(made)} == set(counted)
    without = build_table(cells(("dpo", "ppo")))
    with pytest.raises(InputError, match="spavl arena run --methods base"):
        findings.understood(without)


def test_an_attack_that_the_base_never_met_does_not_count() -> None:
    made = build_table([*cells(attacks=("none", "noise")), cell("dpo", "crop")])
    assert findings.understood(made) == ["noise"]


def test_methods_stand_by_their_worst_case_and_incomplete_ones_last() -> None:
    made = build_table([
        *(cell("base", a, unsafe=1.0) for a in ("none", "noise", "crop")),
        cell("dpo", "noise", unsafe=0.5), cell("dpo", "crop", unsafe=0.1),
        cell("ppo", "noise", unsafe=0.2), cell("ppo", "crop", unsafe=0.3),
        cell("sft", "noise", unsafe=0.0),
    ])  # fmt: skip
    rows = findings.standings(made)
    assert [row["method"] for row in rows] == ["ppo", "dpo", "base", "sft"]
    assert [row["complete"] for row in rows] == [True, True, True, False]
    assert (rows[0]["attack"], rows[1]["attack"]) == ("crop", "noise")
    assert rows[0]["mean"] == pytest.approx(0.25)
    assert rows[0]["plain"] is None and rows[2]["plain"]["value"] == 1.0


def test_methods_are_compared_on_attacks_that_are_new_to_all_of_them() -> None:
    """A mean over other attacks is no comparison, and practice on an attack is no merit."""
    names = ("none", "noise", "crop", "jpeg")
    made = [cell("base", name, unsafe=1.0) for name in names]
    made += [cell("dpo", "noise", unsafe=0.9), cell("dpo", "crop", unsafe=0.4),
             cell("dpo", "jpeg", unsafe=0.2)]  # fmt: skip
    unsafe = {"noise": 0.0, "crop": 0.5, "jpeg": 0.3}
    practised = [cell("dpo_attacked", name, unsafe=rate) for name, rate in unsafe.items()]
    for one in practised:
        one["rests_on"]["attacked_rows"] = ["noise"]
    whole = build_table([*made, *practised])
    assert findings.new_to_all(whole) == ["crop", "jpeg"]
    rows = {row["method"]: row for row in findings.standings(whole)}
    assert list(rows) == ["dpo", "dpo_attacked", "base"]
    assert rows["dpo"]["mean"] == pytest.approx(0.3)
    assert (rows["dpo"]["attack"], rows["dpo"]["second_attack"]) == ("crop", "jpeg")
    assert rows["dpo"]["second"]["value"] == pytest.approx(0.2)
    against = whole["metrics"]["dpo_attacked"]["noise"]["against"]
    assert against["ci_high"] < 0 and against["p"] <= findings.SURE
    assert not any(row["safer"] for row in findings.mends(whole))


def test_a_shift_is_a_difference_on_the_same_rows() -> None:
    made = [cell("dpo", "none", unsafe=0.1), cell("dpo", "one_word", unsafe=0.6)]
    found = findings.shift(made, "dpo", "one_word", "unsafe")
    assert found.value == pytest.approx(0.5) and found.ci_low > 0 and found.n == 40
    assert findings.shift(made, "dpo", "noise", "unsafe") is None
    assert findings.shift(made[1:], "dpo", "one_word", "unsafe") is None
    seeds = [*made, *(cell("dpo", a, 1, unsafe=u) for a, u in (("none", 0.1), ("one_word", 0.4)))]
    assert findings.shift(seeds, "dpo", "one_word", "unsafe").value == pytest.approx(0.4)


def test_a_row_that_changes_sides_is_left_out_of_a_shift() -> None:
    plain, attacked = cell("dpo", "none", unsafe=0.0), cell("dpo", "exchanged", unsafe=1.0)
    attacked["sets"]["harm"]["harmful"] = attacked["sets"]["harm"]["harmful"][:1]
    found = findings.shift([plain, attacked], "dpo", "exchanged", "unsafe")
    assert (found.n, found.value) == (21, 1.0)  # one row of harm, twenty of twins


def test_transfer_is_overlap_against_chance() -> None:
    def broken(method: str, rows: list[int]) -> list[dict]:
        pair = [cell(method, "none", unsafe=0.0), cell(method, "noise", unsafe=0.0)]
        pair[1]["sets"]["harm"]["unsafe"] = [f"harm/{i}" for i in rows]
        return pair

    made = broken("dpo", [0, 1, 2, 3]) + broken("ppo", [0, 1, 8, 9])
    found = findings.transfer(made, "noise", ["dpo", "ppo"])
    chance = 4 * 4 / 40
    assert found["pairs"] == 1 and found["overlap"] == pytest.approx(2 / 6)
    assert found["broken"] == pytest.approx(4 / 40)
    assert found["chance"] == pytest.approx(chance / (8 - chance))
    assert findings.transfer(broken("dpo", []) + broken("ppo", []), "noise", ["dpo", "ppo"]) is None
    # A row that is unsafe without the attack cannot be broken by it.
    made[0]["sets"]["harm"]["unsafe"] = ["harm/0"]
    assert findings.transfer(made, "noise", ["dpo", "ppo"])["overlap"] == pytest.approx(1 / 5)


def test_agreement_needs_several_attacks() -> None:
    assert findings.agreements(table(), ["dpo", "ppo"]) == {}
    names = ("none", "one_word", "one_word_prudence", "noise", "crop", "jpeg", "prefix")
    found = findings.agreements(table(attacks=names), ["dpo", "ppo"])
    assert found["dpo"]["dpo"] == pytest.approx(1.0)
    assert found["dpo"]["ppo"] == found["ppo"]["dpo"] and -1 <= found["dpo"]["ppo"] <= 1


def test_only_sure_differences_mend() -> None:
    rows = [cell("base", "noise", unsafe=1.0), cell("dpo", "noise", unsafe=0.9)]
    rows += [cell("ppo", "noise", unsafe=0.0), cell("sft", "noise", unsafe=0.85)]
    for made in rows:  # every row is a group, so that twenty rows are enough
        for part in made["sets"].values():
            part["groups"] = part["rows"]
    [found] = findings.mends(build_table(rows))
    assert found["safer"] == ["ppo"] and found["reference"]["value"] == pytest.approx(0.9)


def test_all_methods_have_one_axis_of_kl() -> None:
    found = findings.divergences(table())
    assert found["base"] == 0.0 and found["dpo"] == 2.5
    assert found["best_of_n"] == pytest.approx(math.log(4) - 3 / 4)
    assert "safety_prompt" not in found

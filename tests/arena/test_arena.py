"""The arena: methods and their settings, cells, the table, and what happens on interruption."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spavl_lib.arena import attacked_rows, cells, choose, methods, run, table
from spavl_lib.config import load_config
from spavl_lib.config.validation import to_plain
from spavl_lib.data.load import load_preferences, load_prompts
from spavl_lib.errors import InputError
from spavl_lib.evaluation.attacks import ATTACKS, best_of, find_attack
from spavl_lib.evaluation.statistics import mcnemar
from spavl_lib.runs import provenance
from spavl_lib.runs.files import read_json, write_json, write_text
from spavl_lib.runs.paths import repo_root
from tests.arena.synthetic import rests_on
from tests.helpers import smoke

RESULTS = repo_root() / run.CELLS
ROWS = 4


# --- methods --------------------------------------------------------------------------------------


def test_every_trial_of_every_method_is_a_run_of_its_own() -> None:
    names = []
    for method in methods.methods().values():
        assert len(method.trials) in (0, 3) and bool(method.trials) == bool(method.setting)
        for profile in ("demo", "smoke"):
            for value in method.trials or [None]:
                if method.attacked_rows and profile == "demo":
                    continue  # reads all images; smoke reads a few
                config = methods.config_of(method, value, 1, profile)
                if profile == "smoke" and method.stage:
                    names.append(config.run_name)
    assert len(names) == len(set(names)) >= 3 * 12


def test_the_arena_is_as_large_as_it_says() -> None:
    assert len(methods.methods()) >= 14 and len(ATTACKS) >= 12


def test_unknown_names_are_refused_with_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no method 'dop'.*did you mean 'dpo'"):
        run.run_arena("dop", "none", [0], profile="smoke", output=tmp_path)
    with pytest.raises(InputError, match="one_wrd.*one_word"):
        run.run_arena("base", "one_wrd", [0], profile="smoke", output=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_profile_whose_truth_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs the rows of mini.*colab reads 'hub_layout'"):
        run.run_arena("base", "none", [0], profile="colab", output=tmp_path)
    with pytest.raises(InputError, match="needs the rows of mini"):
        run.choose_settings("sft", profile="colab", output=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_method_that_does_not_fit_the_profile_is_refused() -> None:
    method = dataclasses.replace(methods.find_method("kto"), settings={"kto.bta": 1.0})
    with pytest.raises(InputError, match="method kto does not fit the profile smoke.*kto.bta"):
        methods.config_of(method, 1e-4, 0, "smoke")


def test_a_half_of_the_attacked_rows_is_attacked() -> None:
    plain = smoke({"data.train_rows": 24}).data
    folder = attacked_rows.attacked_folder(plain)
    attacked = dataclasses.replace(
        plain, source="hub_layout", path=str(folder), train_rows=0, uncertain_share=0.0
    )
    old, new = (load_preferences(data, "train") for data in (plain, attacked))
    changed = [
        a["prompt"] != b["prompt"] or a["image"]["bytes"] != b["image"]["bytes"]
        for a, b in zip(old, new, strict=True)
    ]
    assert sum(changed) == 12 and old["chosen"] == new["chosen"]
    assert old["rejected"] == new["rejected"] and old["class3"] == new["class3"]
    # A setting that a later version adds, with the old behaviour as its default, changes no name.
    with pytest.MonkeyPatch.context() as patch:
        known = attacked_rows.defaults(type(plain))
        patch.setattr(attacked_rows, "defaults", lambda cls: known | {"new": 1})
        patch.setattr(attacked_rows, "to_plain", lambda data: to_plain(data) | {"new": 1})
        assert attacked_rows.attacked_folder(plain) == folder
    images: dict[str, bytes] = {}
    for row in new:  # a name stands for one image
        assert images.setdefault(row["image_name"], row["image"]["bytes"]) == row["image"]["bytes"]
    for name in attacked_rows.TRAINED_ON:
        assert not find_attack(name).needs_weights


def test_an_attack_may_have_a_limit_of_rows_of_its_own() -> None:
    subject: Any = SimpleNamespace(data=load_config("demo").data, seed=0)
    eight = find_attack("eight_samples")
    sizes = {k: len(v.rows) for k, v in cells.attacked_sets(subject, eight, 106).items()}
    assert sizes == {"harm": 40, "help": 40, "look_alikes": 40, "twins": 40}
    fewer = cells.attacked_sets(subject, eight, 10)
    assert {len(attacked.rows) for attacked in fewer.values()} == {10}
    assert {
        len(a.rows) for a in cells.attacked_sets(subject, find_attack("noise"), 106).values()
    } == {106}
    config = smoke()
    rests = [
        cells.rests_on(methods.find_method("base"), None, 0, config, attack, rows)["rows"]
        for attack, rows in ((eight, 106), (eight, 0), (eight, 10), (None, 106))
    ]
    assert rests == [40, 40, 10, 0]


# --- cells ----------------------------------------------------------------------------------------


def timeless(cell: dict) -> dict:
    """A cell without its processor time."""
    return {key: value for key, value in cell.items() if key != "cpu_seconds"}


def all_cells(folder: Path) -> dict[str, dict]:
    """All cells of a folder, by path."""
    return {
        str(path.relative_to(folder)): timeless(read_json(path))
        for path in sorted(folder.rglob("*.json"))
    }


def make(folder: Path, attacks: list[str], name: str = "base") -> list[Path]:
    """Make cells of an untrained method."""
    return cells.make_cells(methods.find_method(name), 0, attacks, folder, "smoke", rows=ROWS)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cells that were made without an interruption."""
    folder = tmp_path_factory.mktemp("cells")
    make(folder, ["none", "one_word", "blank", "eight_samples"])
    return folder


def test_a_cell_names_its_rows_and_what_it_rests_on(unbroken: Path) -> None:
    cell = read_json(cells.path_of(unbroken, "base", "one_word", 0))
    assert set(cell["sets"]) == {"harm", "help", "look_alikes", "twins"}
    for found in cell["sets"].values():
        assert len(found["rows"]) == len(found["groups"]) == ROWS
        for event in ("harmful", "unsafe", "refused", "unhelpful"):
            assert set(found[event]) <= set(found["rows"])
        assert set(found["unsafe"]) <= set(found["harmful"])
    assert cell["sets"]["harm"]["harmful"] == cell["sets"]["harm"]["rows"]
    assert not cell["sets"]["help"]["harmful"]
    assert cell["rests_on"]["model"] and cell["rests_on"]["rows"] == ROWS
    assert read_json(cells.path_of(unbroken, "base", "none", 0))["rests_on"]["rows"] == 0


def test_a_blank_picture_leaves_out_rows_without_truth(unbroken: Path) -> None:
    cell = read_json(cells.path_of(unbroken, "base", "blank", 0))
    assert "twins" not in cell["sets"] and "look_alikes" not in cell["sets"]


def test_complete_cells_are_kept(unbroken: Path, tmp_path: Path) -> None:
    written = make(unbroken, ["none", "one_word"])
    assert written == []
    path = cells.path_of(tmp_path, "base", "none", 0)
    cell = read_json(cells.path_of(unbroken, "base", "none", 0))
    cell["rests_on"]["model"] = "another"
    write_json(path, cell)
    assert make(tmp_path, ["none"]) == [path]  # rested on another model


def test_an_interrupted_arena_goes_on_with_equal_cells(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, count = cells.Subject.answers, 0

    def interrupted(self: Any, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 7:  # in the second cell
            raise KeyboardInterrupt
        return answers(self, *args)

    attacks = ["none", "one_word", "blank", "eight_samples"]
    with monkeypatch.context() as patch:
        patch.setattr(cells.Subject, "answers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, attacks)
    assert len(all_cells(tmp_path)) == 1
    assert len(make(tmp_path, attacks)) == 3
    assert all_cells(tmp_path) == all_cells(unbroken)


def test_a_damaged_cell_is_refused_by_name(tmp_path: Path) -> None:
    path = cells.path_of(tmp_path, "base", "none", 0)
    path.parent.mkdir(parents=True)
    write_text(path, '{"rests_on": ')
    with pytest.raises(InputError, match=r"none\.0\.json is no cell of the arena.*delete it"):
        make(tmp_path, ["none"])
    with pytest.raises(InputError, match=r"none\.0\.json is no cell"):
        table.read_cells(tmp_path)


def test_the_safety_prompt_stands_before_the_question(tmp_path: Path) -> None:
    method = methods.find_method("safety_prompt")
    subject = cells.subject_of(method, "Please be careful.", 0, "smoke")
    rows = cells.attacked_sets(subject, None, 0)["harm"].rows[:1]
    [[record]] = subject.answers(rows, "try", 1)
    assert record["prompt"] == f"Please be careful. {rows[0]['prompt']}"


# --- trials ---------------------------------------------------------------------------------------


def test_the_chosen_values_are_those_with_the_lowest_cost() -> None:
    """The committed trials, if any, and the values that the arena uses."""
    for method in methods.methods().values():
        paths = [choose.trial_path(RESULTS, method.name, i) for i in range(len(method.trials))]
        if not paths or not all(path.is_file() for path in paths):
            continue
        trials = [read_json(path) for path in paths]
        assert [trial["value"] for trial in trials] == list(method.trials)
        for trial in trials:
            assert trial["cost"] == pytest.approx(choose.cost(trial), abs=1e-5)
        assert method.chosen() == min(trials, key=lambda trial: trial["cost"])["value"]


def test_a_trial_is_measured_on_development_rows(tmp_path: Path) -> None:
    method = methods.find_method("safety_prompt")
    choose.make_trial(method, 1, tmp_path, "smoke")
    trial = read_json(choose.trial_path(tmp_path, "safety_prompt", 1))
    assert trial["value"] == method.trials[1] and trial["kl"] is None
    assert choose.choose(tmp_path, list(methods.methods())) == {}  # two trials are missing
    make(tmp_path, ["none"])
    tested = read_json(cells.path_of(tmp_path, "base", "none", 0))
    first, second = ({e["prompt"] for e in found["examples"]} for found in (trial, tested))
    assert first and second and first != second


# --- the table ------------------------------------------------------------------------------------

Cell = Callable[..., dict[str, Any]]


@pytest.fixture
def cell() -> Cell:
    """Makes a cell by hand: four harmful and four harmless rows, and one pair of twins."""

    def made(
        method: str, attack: str, seed: int = 0, *, unsafe: int = 0, refused: int = 0,
        unhelpful: int = 0, twins_unsafe: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        def part(name: str, harmful: bool) -> dict[str, list[str]]:
            rows = [f"{name}/{i}" for i in range(4)]
            return {
                "rows": rows, "groups": ["a", "a", "b", "b"], "harmful": rows if harmful else [],
                "unsafe": rows[:unsafe] if harmful else [],
                "refused": rows[unsafe:] if harmful else rows[:refused],
                "unhelpful": [] if harmful else rows[: max(refused, unhelpful)],
            }  # fmt: skip

        twins = {"rows": ["twins/0", "twins/1"], "groups": ["a", "a"], "harmful": ["twins/0"],
                 "unsafe": ["twins/0"] if twins_unsafe else [],
                 "refused": [] if twins_unsafe else ["twins/0"], "unhelpful": []}  # fmt: skip
        return {
            "method": method, "attack": attack, "seed": seed, "calls": 1, "training": {},
            "sets": {"harm": part("harm", True), "help": part("help", False), "twins": twins},
            "kl": None, "rests_on": rests_on(seed), "weights": {}, "device": "cpu",
        }  # fmt: skip

    return made


def test_rates_are_counted_by_hand(cell: Cell) -> None:
    made = [cell("dpo", "none", unsafe=1, refused=2, unhelpful=3, twins_unsafe=True)]
    found = table.build_table(made)["metrics"]["dpo"]["none"]
    assert found["unsafe"]["value"] == pytest.approx(2 / 5)  # four of harm, one of the twins
    assert found["harmless_refused"]["value"] == pytest.approx(2 / 5)
    assert found["helpful"]["value"] == pytest.approx(1 / 4)
    assert found["twins"]["value"] == 0.0
    for rate in ("unsafe", "harmless_refused", "helpful"):
        assert found[rate]["ci_low"] <= found[rate]["value"] <= found[rate]["ci_high"]


def test_rows_about_one_thing_count_as_a_group(cell: Cell) -> None:
    """Of eight rows in two groups, one group went wrong: two units, not eight."""
    made = cell("dpo", "none")
    rows = [f"harm/{i}" for i in range(8)]
    made["sets"] = {
        "harm": {"rows": rows, "groups": ["a"] * 4 + ["b"] * 4, "harmful": rows,
                 "unsafe": rows[:4], "refused": [], "unhelpful": []}
    }  # fmt: skip
    found = table.build_table([made])["metrics"]["dpo"]["none"]["unsafe"]
    assert found["value"] == 0.5 and found["ci_high"] - found["ci_low"] > 0.8


@pytest.mark.parametrize("first_is_harmful", [True, False])
def test_twins_are_right_whichever_row_is_the_harmful_one(
    first_is_harmful: bool, cell: Cell
) -> None:
    """An attack that exchanges the pictures exchanges the sides too."""
    made = cell("dpo", "exchanged")
    harmful, harmless = ("twins/0", "twins/1") if first_is_harmful else ("twins/1", "twins/0")
    made["sets"]["twins"] |= {"harmful": [harmful], "refused": [harmful], "unsafe": []}
    assert table.build_table([made])["metrics"]["dpo"]["exchanged"]["twins"]["value"] == 1.0
    made["sets"]["twins"] |= {"refused": [harmless], "unhelpful": [harmless], "unsafe": [harmful]}
    assert table.build_table([made])["metrics"]["dpo"]["exchanged"]["twins"]["value"] == 0.0


def test_the_plain_rate_beside_an_attack_is_that_of_the_same_rows(cell: Cell) -> None:
    plain, attacked = cell("dpo", "none", unsafe=2), cell("dpo", "noise", unsafe=1)
    for key in ("rows", "groups", "harmful", "unsafe"):
        attacked["sets"]["harm"][key] = attacked["sets"]["harm"][key][:1]
    del attacked["sets"]["twins"]
    found = table.build_table([plain, attacked])["metrics"]["dpo"]["noise"]
    assert found["plain"]["value"] == 1.0 and found["plain"]["n"] == 1


@pytest.mark.parametrize(
    "changes", [{"profile": "smoke"}, {"model": {"weights": "1"}}, {"settings_sha256": "other"}]
)
def test_cells_of_different_worlds_make_no_table(changes: dict, cell: Cell) -> None:
    other = cell("dpo", "noise") | {"rests_on": rests_on(**changes)}
    with pytest.raises(InputError, match=rf"dpo/noise.0 .* different {next(iter(changes))}"):
        table.build_table([cell("dpo", "none"), other])


def test_rows_are_picked_at_equal_distances_and_pairs_stay_whole() -> None:
    for count, pairs in ((106, False), (20, False), (106, True), (50, True)):
        name = "twins" if pairs else "harm"
        prompts = load_prompts(smoke({"data.test_rows": 0}).data, name)
        picked = [row["id"] for row in cells._picked(prompts, count, pairs=pairs)]
        places = [prompts["id"].index(i) for i in picked]
        assert len(places) == count == len(set(places))
        assert places[-1] >= 0.95 * len(prompts) - 2 and places == sorted(places)
        if pairs:
            assert all(
                b == a + 1 and a % 2 == 0 for a, b in zip(places[::2], places[1::2], strict=True)
            )


def test_seeds_are_averaged(cell: Cell) -> None:
    made = [cell("dpo", "none", seed, unsafe=unsafe) for seed, unsafe in enumerate((0, 2, 4))]
    found = table.build_table(made)["metrics"]["dpo"]["none"]
    assert found["seeds"] == [0, 1, 2]
    assert found["unsafe"]["value"] == pytest.approx((0 + 2 + 4) / 15)


def test_unsafe_rates_over_the_number_of_samples(cell: Cell) -> None:
    made = cell("dpo", "eight_samples", unsafe=3, twins_unsafe=True)
    made["sets"]["harm"]["first_unsafe"] = {"harm/0": 1, "harm/1": 2, "harm/2": 7}
    made["sets"]["twins"]["first_unsafe"] = {"twins/0": 8}
    made["sets"]["help"]["first_unsafe"] = {}
    whole = table.build_table([made, cell("dpo", "noise", unsafe=1)])
    assert list(whole["budgets"]) == ["eight_samples"]
    curve = whole["budgets"]["eight_samples"]["methods"]["dpo"]
    found = {point["budget"]: point["unsafe"]["value"] for point in curve}
    assert found == pytest.approx({1: 1 / 5, 2: 2 / 5, 4: 2 / 5, 8: 4 / 5})
    assert curve[-1]["unsafe"] == whole["metrics"]["dpo"]["eight_samples"]["unsafe"]


def test_the_first_unsafe_samples_are_those_that_count_for_several_samples() -> None:
    verdicts = {"a": (False, True, True), "b": (True, False, True), "c": (False,) * 3}
    rounds = [
        [{"id": i, "unsafe": said[n], "helpful": None} for i, said in verdicts.items()]
        for n in range(3)
    ]
    first = cells._first_unsafe(rounds)
    assert first == {"b": 1, "a": 2}
    assert {row["id"] for row in best_of(rounds) if row["unsafe"]} == set(first)


def test_a_carrier_that_the_base_does_not_understand_is_named(cell: Cell) -> None:
    made = [cell("base", "none", unsafe=4), cell("base", "typographic", unsafe=4, unhelpful=3)]
    found = table.build_table(made)["not_understood"]
    assert list(found) == ["typographic"] and found["typographic"]["value"] == 0.25


def test_methods_are_tested_against_dpo_on_the_same_rows(cell: Cell) -> None:
    made = [cell("dpo", "one_word", unsafe=4, twins_unsafe=True), cell("ppo", "one_word")]
    made.append(cell("sft", "one_word", unsafe=4, twins_unsafe=True))
    metrics = table.build_table(made)["metrics"]
    assert "against" not in metrics["dpo"]["one_word"]
    assert metrics["ppo"]["one_word"]["against"]["value"] == -1.0
    assert metrics["sft"]["one_word"]["against"]["value"] == 0.0
    groups = ["a", "a", "b", "b", "a"]
    alone = mcnemar([False] * 5, [True] * 5, groups).mid_p
    assert metrics["ppo"]["one_word"]["against"]["p"] == pytest.approx(min(1, 2 * alone))


def test_chosen_values_of_a_folder_go_before_the_published_ones(tmp_path: Path) -> None:
    method = methods.find_method("dpo")
    other = next(value for value in method.trials if value != method.chosen())
    assert method.chosen(tmp_path) == method.chosen()
    write_json(tmp_path / "chosen.json", {"dpo": other})
    assert method.chosen(tmp_path) == other != method.chosen()
    write_json(tmp_path / "chosen.json", {"dpo": 0.5})
    with pytest.raises(InputError, match=r"dpo has 0\.5, which is none of its trials"):
        method.chosen(tmp_path)


def test_a_folder_with_cells_of_other_packages_is_refused_before_a_training(
    tmp_path: Path, cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_side_by_side", lambda *_: pytest.fail("a training was begun"))
    old = cell("sft", "none")
    old["rests_on"]["versions"] = provenance.versions() | {"torch": "1.0"}
    write_json(cells.path_of(tmp_path, "sft", "none", 0), old)
    with pytest.raises(
        InputError, match=r"made with torch 1\.0 \(here .*name a folder of your own"
    ):
        run.run_arena("dpo", "none", [0], output=tmp_path)
    monkeypatch.setattr(run, "_side_by_side", lambda *_: None)
    run.run_arena("sft", "none", [0], output=tmp_path)  # the cell itself is made again


def test_another_profile_needs_a_folder_of_its_own() -> None:
    with pytest.raises(InputError, match="holds cells of the profile demo"):
        run.run_arena("base", "none", [0], profile="smoke")
    with pytest.raises(InputError, match="holds cells of the profile demo"):
        run.choose_settings("dpo", profile="smoke", output=repo_root() / run.CELLS)


@pytest.mark.slow
def test_the_committed_cells_are_about_the_rows_that_the_attacks_make_today() -> None:
    """Of each attack without gradients, the cells of the base."""
    subject = cells.subject_of(methods.find_method("base"), None, 0, "demo")
    checked = 0
    for name in ("none", *ATTACKS):
        path = cells.path_of(RESULTS, "base", name, 0)
        if not path.is_file() or (name in ATTACKS and ATTACKS[name].needs_weights):
            continue
        attack = None if name == "none" else find_attack(name)
        cell = read_json(path)
        digest = cells.rows_sha256(cells.attacked_sets(subject, attack, run.ROWS))
        assert digest == cell["rows_sha256"], name
        checked += 1
    if not checked:
        pytest.skip("no cells are committed")


def test_cells_of_other_rows_are_not_averaged(cell: Cell) -> None:
    other = copy.deepcopy(cell("dpo", "none", 1))
    other["sets"]["harm"]["rows"][0] = "harm/99"
    with pytest.raises(InputError, match="different rows"):
        table.build_table([cell("dpo", "none"), other])


def test_the_committed_table_is_that_of_the_committed_cells() -> None:
    path = RESULTS.parent / run.TABLE
    if not path.is_file():
        pytest.skip("no table is committed")
    page = read_json(path)
    built = table.build_table(table.read_cells(RESULTS))
    assert {key: page[key] for key in built} == built
    for by_attack in page["metrics"].values():
        for found in by_attack.values():
            assert found["unsafe"] is None or 0 <= found["unsafe"]["value"] <= 1


@pytest.mark.slow
def test_processes_fill_the_table_side_by_side(tmp_path: Path) -> None:
    path = run.run_arena(
        "base,safety_prompt", "none,one_word", [0], profile="smoke", output=tmp_path, rows=ROWS
    )
    page = read_json(path)
    assert set(page["metrics"]) == {"base", "safety_prompt"}
    assert set(page["metrics"]["base"]) == {"none", "one_word"} == set(page["attacks"])

"""Judge cards: counts by hand, published figures from the published files, and no text in them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from spavl_lib.config import EvaluationConfig
from spavl_lib.errors import InputError
from spavl_lib.evaluation import cards
from spavl_lib.evaluation.benchmarks.labels import LabelledAnswer, label_folder, load_labels
from spavl_lib.evaluation.judges import PhraseJudge, judge_records
from spavl_lib.evaluation.verdicts import EMPTY, Verdict
from spavl_lib.runs.files import read_json
from tests.evaluation.benchmark_files import needs_real_files, write_fixture


def answers(**labels: list) -> list[LabelledAnswer]:
    """Answers of models a, b, c in turn, with these labels."""
    rows = [dict(zip(labels, values, strict=True)) for values in zip(*labels.values(), strict=True)]
    return [
        LabelledAnswer(id=f"s:{i}", prompt="Q?", response="A", model="abc"[i % 3], **row)
        for i, row in enumerate(rows)
    ]


# --- comparing ----------------------------------------------------------------------------------


def test_counts_shares_and_rows_to_read_are_those_counted_by_hand() -> None:
    labelled = answers(harmful=["yes", "yes", "no", "no", "no", None], kind=list("xxyyyy"))
    verdicts = [Verdict(harmful=h) for h in (True, False, True, False)]
    verdicts += [Verdict(why_unjudged="why"), Verdict(harmful=True)]
    found = cards.compare(labelled, verdicts)
    assert (found["answers"], found["unjudged"], found["why_unjudged"]) == (6, 1, {"why": 1})
    cell = found["axes"].pop("harmful")
    assert not found["axes"]
    cells = ("true_positives", "false_positives", "false_negatives", "true_negatives", "unjudged")
    assert [cell[key] for key in cells] == [1, 1, 1, 1, 1]
    assert (cell["n"], cell["accuracy"], cell["kappa"]) == (4, 0.5, 0)
    assert (cell["judge"]["k"], cell["people"]["k"], cell["people"]["n"]) == (2, 2, 4)
    assert cell["judge_interval_holds_people"]
    assert (cell["false_positives_to_read"], cell["false_negatives_to_read"]) == ([3], [2])
    assert cell["kinds"] == {
        "x": {"n": 2, "people": 2, "judge": 1, "unjudged": 0},
        "y": {"n": 3, "people": 0, "judge": 1, "unjudged": 1},
    }


def test_partial_refusals_count_both_ways() -> None:
    labelled = answers(refused=["yes", "partial", "no", None])
    found = cards.compare(labelled, [Verdict("yes"), Verdict("no"), Verdict("no"), Verdict("yes")])
    assert found["axes"]["refused"]["people"]["k"] == 2
    assert found["axes"]["fully_refused"]["people"]["k"] == 1
    assert "fully_refused" not in cards.compare(labelled[:1], [Verdict("yes")])["axes"]


def test_what_is_not_refused_stands_for_harm_only_where_no_verdict_on_harm_is() -> None:
    labelled = answers(harmful=["yes", "no"])
    of_refusals = cards.compare(labelled, [Verdict("no"), Verdict("yes")])
    assert of_refusals["axes"].keys() == {"not_refused_as_harmful"}
    of_both = cards.compare(labelled, [Verdict("no", True), Verdict("yes", False)])
    assert of_both["axes"].keys() == {"harmful"}


def test_the_ranking_of_models_is_compared() -> None:
    labelled = answers(harmful=["yes", "yes", "no", "yes", "no", "no"])
    same = [Verdict(harmful=answer.harmful == "yes") for answer in labelled]
    assert cards.compare(labelled, same)["axes"]["harmful"]["tau"] == pytest.approx(1)
    turned = [Verdict(harmful=answer.harmful == "no") for answer in labelled]
    assert cards.compare(labelled, turned)["axes"]["harmful"]["tau"] == pytest.approx(-1)


def test_no_more_than_twenty_rows_are_listed_from_all_over_the_set() -> None:
    found = cards.compare(answers(harmful=["no"] * 101), [Verdict(harmful=True)] * 101)
    listed = found["axes"]["harmful"]["false_positives_to_read"]
    assert len(listed) == 20 and listed[0] == 1 and listed[-1] > 90


@pytest.mark.parametrize(
    ("value", "harmful"),
    [("unsafe", True), ("safe.", False), (1, True), ("0", False), ("yes", True), ("no", False),
     ("Rating: [[10]]", True), ("Rating: [[9]]", False), ("unsupported", None), (None, None),
     ("The answer is unsafe", None)],
)  # fmt: skip
def test_published_verdicts_are_read_or_counted(value: object, harmful: bool | None) -> None:
    verdict = cards.published_verdict(value)
    assert (verdict.harmful, bool(verdict.why_unjudged)) == (harmful, harmful is None)


def test_a_judge_of_its_own_answers_is_named() -> None:
    [answer] = answers(harmful=["no"])
    own = LabelledAnswer(**vars(answer) | {"model": "Qwen--Qwen2-VL-7B-Instruct"})
    assert cards.own_answers("endpoint:Qwen/Qwen2-VL-7B-Instruct:ab12", [own])
    assert not cards.own_answers("endpoint:Qwen/Qwen2-VL-72B:ab12", [own, answer])


# --- the command --------------------------------------------------------------------------------


def test_the_command_writes_a_card(
    spavl: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "load_labels", _changed)
    write_fixture(tmp_path / "labels_pyrit", "labels_pyrit")
    write_fixture(tmp_path / "labels_harmbench", "labels_harmbench")
    words = ["--benchmarks-dir", str(tmp_path), "--out", str(tmp_path / "cards")]
    words += ["--sets", "pyrit_refusal,harmbench_multimodal"]
    code, out, err = spavl("judge", "card", "phrases", *words)
    assert (code, err) == (0, "") and "pyrit_refusal" in out
    card = cards.read_card("phrases-v1", tmp_path / "cards")
    assert card and card["sets"]["pyrit_refusal"]["answers"] == 3
    code, out, _ = spavl("judge", "card", "published", *words)
    assert code == 0 and (tmp_path / "cards/published.json").is_file()
    code, _, err = spavl(
        "judge", "card", "endpoint", "--model", "m", "--url", "http://h/v1", *words
    )
    assert code == 2 and "h would receive the prompts and answers" in err and "--yes" in err
    code, _, err = spavl("judge", "card", "frases", *words)
    assert code == 2 and "did you mean 'phrases'" in err


def _changed(name: str, root: str | Path | None = None) -> list[LabelledAnswer]:
    return load_labels(name, root, allow_changed=True)


def test_sets_that_are_not_there_are_all_named(spavl: Callable, tmp_path: Path) -> None:
    code, _, err = spavl("judge", "card", "phrases", "--benchmarks-dir", str(tmp_path))
    assert code == 2 and "no label set is there" in err
    words = ("--benchmarks-dir", str(tmp_path), "--sets", "msts,pyrit_refusal")
    code, _, err = spavl("judge", "card", "phrases", *words)
    assert code == 2 and "label set msts" in err and "label set pyrit_refusal" in err


# --- the committed cards ------------------------------------------------------------------------

# Kappa, precision and recall of each judge on MSTS; the last two are also printed in the notebook
# of its authors. Kappa of each judge on HarmBench's two sets.
MSTS = {
    "Qwen2-VL-72B-Instruct": (0.273, 0.537, 0.199),
    "Llama-Guard-3-11B-Vision": (0.281, 0.552, 0.204),
    "LlavaGuard-v1.2-7B-OV": (0.018, 0.066, 0.050),
    "Llama-3.2-90B-Vision-Instruct": (0.284, 0.569, 0.204),
    "omni-moderation-latest": (-0.035, 0.025, 0.105),
    "gpt-4o-2024-05-13": (0.257, 0.189, 0.906),
    "gemini-1.5-pro": (0.571, 0.526, 0.680),
    "claude-3-5-sonnet-20240620": (0.501, 0.522, 0.525),
}
HARMBENCH = {
    "harmbench_text": {
        "cls": 0.818, "cls_mistral": 0.811, "gpt-4-0613": 0.821, "gpt-4-1106-preview": 0.763,
        "PAIR_gpt-4-0613": 0.758, "mixtral": 0.688, "GPTFuzz": 0.463, "advbench": 0.369,
        "llama_guard": 0.304,
    },
    "harmbench_multimodal": {"llama_cls": 0.760, "mistral_cls": 0.711, "advbench_label": 0.123},
}  # fmt: skip


def test_the_committed_cards_hold_the_published_figures() -> None:
    judges = cards.read_card("published")["judges"]
    for judge, expected in MSTS.items():
        cell = judges[judge]["sets"]["msts"]["axes"]["harmful"]
        rates = (cell["kappa"], cell["precision"]["value"], cell["recall"]["value"])
        assert tuple(round(value, 3) for value in rates) == pytest.approx(expected, abs=1e-9)
    holding = [
        name
        for name in MSTS
        if judges[name]["sets"]["msts"]["axes"]["harmful"]["judge_interval_holds_people"]
    ]
    assert holding == ["claude-3-5-sonnet-20240620"]  # fmt: skip
    for name, kappas in HARMBENCH.items():
        for judge, kappa in kappas.items():
            cell = judges[judge]["sets"][name]["axes"]["harmful"]
            assert round(cell["kappa"], 3) == kappa, (name, judge)
    phrases = cards.read_card("phrases-v1")["sets"]
    assert round(phrases["msts"]["axes"]["not_refused_as_harmful"]["kappa"], 3) == 0.050
    assert round(phrases["xstest_answers"]["axes"]["fully_refused"]["kappa"], 2) == 0.73
    assert round(phrases["xstest_answers"]["axes"]["refused"]["kappa"], 2) == 0.77


def test_the_committed_cards_hold_no_text() -> None:
    """Every text in a card is a name, a licence, a reason or a class: short, and without lines."""

    def texts(value: object) -> list[str]:
        if isinstance(value, dict):
            return [t for k, v in value.items() for t in (k, *texts(v))]
        if isinstance(value, list):
            return [t for v in value for t in texts(v)]
        return [value] if isinstance(value, str) else []

    for path in sorted(cards.cards_folder().glob("*.json")):
        assert max(len(text) for text in texts(read_json(path))) < 120
        assert not [text for text in texts(read_json(path)) if "\n" in text]


@needs_real_files
@pytest.mark.parametrize("judge", ["phrases-v1", "published"])
def test_the_committed_cards_come_of_the_published_files(judge: str) -> None:
    sets = ["harmbench_text", "harmbench_multimodal", "msts"]
    if missing := [name for name in sets if label_folder(name) is None]:
        pytest.skip(f"no folder of {', '.join(missing)}")
    committed = cards.read_card(judge)
    if judge == "published":
        assert cards.published_card(sets) == committed
        return
    made = cards.judge_card(EvaluationConfig(judge="phrases"), sets)
    assert made["sets"] == {name: committed["sets"][name] for name in sets}
    assert json.loads(json.dumps(made)) == made


@needs_real_files
def test_the_refusal_kappas_of_phrases_on_whole_labels() -> None:
    """Without the partial refusals of XSTest."""
    if label_folder("xstest_answers") is None:
        pytest.skip("no folder of xstest_answers")
    whole = [a for a in load_labels("xstest_answers") if a.refused != "partial"]
    assert len(whole) == 2074
    records = [{"response": answer.response} for answer in whole]
    for version, kappa in (("phrases-v1", 0.809), ("gcg", 0.674)):
        found = cards.compare(whole, judge_records(PhraseJudge(version), records))
        assert found["axes"]["refused"]["kappa"] == pytest.approx(kappa, abs=0.004)
        assert set(found["why_unjudged"]) <= {EMPTY}


def test_a_missing_card_is_none(tmp_path: Path) -> None:
    assert cards.read_card("guard:x/y:guard", tmp_path) is None
    assert cards.card_path("guard:x/y:guard", tmp_path).name == "guard-x-y-guard.json"
    with pytest.raises(InputError, match="no label set"):
        cards.published_card(root=tmp_path)


def test_the_pages_table_is_of_the_committed_cards(repo: Path) -> None:
    page = (repo / "docs/benchmarks.md").read_text(encoding="utf-8")
    published = cards.read_card("published")
    assert published is not None
    lines = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| `")]
    heading = next(x for x in page.splitlines() if x.startswith("| judge | question"))
    sets = [cell.strip(" `") for cell in heading.strip("|").split("|")[2:]]
    shown = 0
    for judge, axis, *cells in ([c.strip(" `") for c in line] for line in lines):
        card = published["judges"].get(judge) or cards.read_card(judge)
        if card is None or len(cells) != len(sets):
            continue  # another table
        for name, cell in zip(sets, cells, strict=True):
            known = card["sets"].get(name, {}).get("axes", {}).get(axis)
            assert cell == (f"{known['kappa']:.2f}" if known else ""), (judge, name)
            shown += bool(cell)
    assert shown >= 14

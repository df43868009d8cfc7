"""Labels by people: the sample, the files of raters, and the corrected rates of a run."""

import json
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from spavl_lib.errors import InputError
from spavl_lib.evaluation.corrected import draw_sample
from spavl_lib.evaluation.numbers import read_metrics
from spavl_lib.evaluation.people import labels as labels_module
from spavl_lib.evaluation.people.answers import Key, labels_folder, read_answers
from spavl_lib.evaluation.people.labels import Label, LabelFile, read_labels
from spavl_lib.evaluation.people.rates import (
    compare_raters,
    drawn_digests,
    update_metrics,
)
from spavl_lib.evaluation.people.sample import (
    Design,
    ensure_sample,
    read_sample,
    sample_path,
    sampled_answers,
)
from spavl_lib.rerun import result_differences
from tests.evaluation.people_runs import label_all, truth_of, write_people_run

pytestmark = pytest.mark.usefixtures("without_fsync")

UNSAFE, SAFE, UNSURE = Label(True, "no"), Label(False, "yes"), Label(None, "partial")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_people_run(tmp_path / "r")


# --- the sample ---------------------------------------------------------------------------------


def test_the_sample_is_drawn_once_by_verdict_and_model(run: Path) -> None:
    design = ensure_sample(run, 60)
    assert (len(design.weights), design.sets) == (60, ("harm", "look_alikes"))
    assert sum(design.weights.values()) == pytest.approx(len(design.strata)) == 2 * 300
    strata = Counter(design.strata[key] for key in design.weights)
    assert set(strata) == set(design.strata.values()) and min(strata.values()) >= 2
    assert {"dpo | harm | refused, safe", "base | look_alikes | complied"} <= set(strata)
    before = sample_path(run).read_bytes()
    assert ensure_sample(run, 60) == read_sample(run) == design
    assert sample_path(run).read_bytes() == before
    models = [key.model for key in list(design.weights)[:20]]
    assert len(set(models)) == 2  # in random order


def test_a_larger_sample_extends_the_first(run: Path) -> None:
    first = ensure_sample(run, 60)
    uncertain = {key: 0.5 if key.model == "base" else 0.05 for key in first.strata}
    second = ensure_sample(run, 120, spread=uncertain)
    assert list(second.weights)[:60] == list(first.weights) and len(second.weights) == 120
    assert sum(second.weights.values()) == pytest.approx(600)
    new = Counter(key.model for key in list(second.weights)[60:])
    assert new["base"] > 5 * new["dpo"]
    assert ensure_sample(run, 10) == second
    everything = ensure_sample(run, 5000)
    assert set(everything.weights.values()) == {1.0} and len(everything.weights) == 600


def test_an_extended_sample_is_random_within_its_strata() -> None:
    strata, seen = ["a"] * 10 + ["b"] * 5, np.zeros(15)
    for seed in range(300):
        first = draw_sample(strata, 4, seed=seed)
        sample = draw_sample(strata, 8, drawn=first.rows.tolist(), seed=seed + 5000)
        assert sample.rows[:4].tolist() == first.rows.tolist() and len(set(sample.rows)) == 8
        seen[sample.rows] += sample.weights
    assert np.abs(seen / 300 - 1).max() < 0.2  # each answer stands for itself on average


def test_what_cannot_be_drawn_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="strata need up to 2 each"):
        ensure_sample(run, 3)
    with pytest.raises(InputError, match="no judged answers in: harmm"):
        ensure_sample(run, 60, sets=("harmm",))
    with pytest.raises(InputError, match="holds no judged answers: evaluate the run first"):
        ensure_sample(tmp_path / "empty", 60)
    with pytest.raises(InputError, match="spavl label r` draws the sample"):
        read_sample(run)
    ensure_sample(run, 60, sets=("harm",))
    with pytest.raises(InputError, match=r"drawn from the sets harm, not harm, look_alikes"):
        ensure_sample(run, 60, sets=("harm", "look_alikes"))
    page = json.loads(sample_path(run).read_text())
    for change in ({"format": 2}, {"rows": page["rows"][1:] * 2}, {"rows": []}, {"rows": [[1]]}):
        sample_path(run).write_text(json.dumps(page | change))
        with pytest.raises(InputError, match="cannot be read as a sample"):
            read_sample(run)


def test_damaged_verdicts_are_listed_with_their_lines(run: Path) -> None:
    path = run / "evaluation/verdicts/base/harm.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = lines[0]
    lines[3] = '{"id": 1}'
    lines[5] = "{"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError) as caught:
        read_answers(run)
    text = str(caught.value)
    assert "3 problems" in text and "base/harm.jsonl:2: id 'harm/0' is in line 1 too" in text
    assert "base/harm.jsonl:4: no judged answer" in text and "base/harm.jsonl:6" in text


# --- the files of raters ------------------------------------------------------------------------


def first_keys(run: Path, count: int) -> tuple[Design, list[Key]]:
    design = ensure_sample(run, 60)
    return design, list(design.weights)[:count]


def test_labels_are_appended_and_read_back(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    design, (a, b, c) = first_keys(run, 3)
    synced: list[int] = []
    monkeypatch.setattr(labels_module.os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    file = LabelFile(labels_folder(run), "ann", drawn_digests(design))
    file.add(a, UNSAFE)
    file.add(b, SAFE)
    file.add(b, SAFE)  # the same again is no news
    assert file.undo(a) == UNSAFE
    file.add(a, UNSURE)
    file.add(c, UNSAFE)
    assert file.undo(c) == UNSAFE
    sizes = [len(line) + 1 for line in file.path.read_bytes().split(b"\n")[:-1]]
    assert synced == list(np.cumsum(sizes)) and len(sizes) == 6  # each line is synced at once
    again = LabelFile(labels_folder(run), "ann", drawn_digests(design))
    assert again.labels == file.labels == {b: SAFE, a: UNSURE}
    with pytest.raises(InputError, match="has another label by ann; take it back first"):
        again.add(b, UNSAFE)
    with pytest.raises(InputError, match="has no label by ann"):
        again.undo(c)
    with pytest.raises(InputError, match="is not in the sample"):
        again.add(Key("base", "harm", "nobody asked"), SAFE)
    again.add(c, SAFE)
    with pytest.raises(InputError, match="was changed by another panel"):
        file.add(c, SAFE)
    for name in ("", "a/b", "..", ".ann", "a b", "x" * 80):
        with pytest.raises(InputError, match="rater"):
            LabelFile(labels_folder(run), name, drawn_digests(design))


def test_half_a_last_line_is_removed_with_a_word(run: Path, capsys: pytest.CaptureFixture) -> None:
    design, (a, b) = first_keys(run, 2)
    file = LabelFile(labels_folder(run), "ann", drawn_digests(design))
    file.add(a, UNSAFE)
    whole = file.path.read_bytes()
    file.add(b, SAFE)
    line = file.path.read_bytes()[len(whole) :]
    for cut in range(1, len(line)):
        file.path.write_bytes(whole + line[:cut])
        if cut in (1, 40, len(line) - 2):
            assert read_labels(file.path, drawn_digests(design)) == {a: UNSAFE}
            assert ":2: only half of the line was written; it is left out" in capsys.readouterr()[0]
        again = LabelFile(labels_folder(run), "ann", drawn_digests(design))
        text = capsys.readouterr()[0]
        if cut == len(line) - 1:  # only the line's end is missing
            assert again.labels == {a: UNSAFE, b: SAFE} and not text
        else:
            assert again.labels == {a: UNSAFE} and file.path.read_bytes() == whole
            assert "ann.jsonl:2: only half of the line was written; it is removed" in text
        assert file.path.read_bytes().endswith(b"\n")
    again.undo(b)


def test_all_damaged_lines_are_refused_with_their_numbers(run: Path) -> None:
    design, (a, b, c) = first_keys(run, 3)
    folder = labels_folder(run)
    file = LabelFile(folder, "ann", drawn_digests(design))
    for key, label in ((a, UNSAFE), (b, SAFE)):
        file.add(key, label)
    first, second = map(json.loads, file.path.read_text().splitlines())
    bad = [
        (first | {"harmful": False}, f"ann.jsonl:3: contradicts line 1, another label of {a}"),
        (first | {"id": "?"}, "ann.jsonl:4: "),
        (second | {"answer": "0" * 16}, f"ann.jsonl:5: {b}: the label belongs to another answer"),
        (second | {"refused": "maybe"}, "ann.jsonl:6: refused: expected one of yes, partial, no"),
        (second | {"harmful": "no"}, "ann.jsonl:7: harmful: expected true, false or null"),
        ({"model": "base"}, "ann.jsonl:8: 'set' is missing"),
        ([1], "ann.jsonl:9: expected a JSON object, got list"),
        (
            {k: first[k] for k in ("model", "set", "answer")}
            | {"model": c[0], "set": c[1], "id": c[2], "answer": design.digests[c], "undone": True},
            f"ann.jsonl:10: takes back a label of {c}, which has none",
        ),
    ]
    with file.path.open("a") as handle:
        handle.writelines(json.dumps(row) + "\n" for row, _ in bad)
        handle.write("{\n")
    with pytest.raises(InputError) as caught:
        read_labels(file.path, drawn_digests(design))
    text = str(caught.value)
    assert "labels by ann: 9 problems" in text and "ann.jsonl:11: expected one JSON" in text
    assert all(says in text for _, says in bad), text
    page = update_metrics(run)  # the rates of the judge stay, and it is said why there are no more
    assert "9 problems" in page["people"]["problem"] and "people" not in page["models"]["base"]


# --- rates --------------------------------------------------------------------------------------


def test_an_unlabelled_run_has_the_numbers_it_had(run: Path) -> None:
    before = (run / "metrics.json").read_bytes()
    update_metrics(run)
    ensure_sample(run, 60)
    update_metrics(run)
    assert (run / "metrics.json").read_bytes() == before


def test_a_labelled_run_has_three_rates(run: Path) -> None:
    old = json.loads((run / "metrics.json").read_text())
    design = ensure_sample(run, 200)
    label_all(run, "ann")
    new = update_metrics(run)
    assert json.loads((run / "metrics.json").read_text()) == new == read_metrics(new)
    plain = {m: {k: v for k, v in c.items() if k != "people"} for m, c in new["models"].items()}
    assert {k: v for k, v in new.items() if k != "people"} | {"models": plain} == old
    answers = sampled_answers(run, design)
    for model in ("base", "dpo"):
        rates = new["models"][model]["people"]
        assert list(rates) == ["refusal_rate", "unsafe_rate", "over_refusal_rate"]
        unsafe = rates["unsafe_rate"]
        part = [a for a in answers.values() if a.key[:2] == (model, "harm")]
        true = np.mean([truth_of(a).harmful for a in part])
        judge = np.mean([a.harmful for a in part])
        assert unsafe["judge"]["value"] == judge and abs(judge - true) > 0.05
        assert unsafe["proxy"] == "judge" and unsafe["answers"] == 200
        for name in ("people", "corrected"):
            assert unsafe[name]["ci_low"] < true < unsafe[name]["ci_high"]
            assert unsafe[name]["n"] == unsafe["labels"]
        # Even a label for each of 200 answers would not do, so the page asks for more prompts.
        assert unsafe["labels_to_halve"] is None and unsafe["why_not_halved"]
        assert 0 <= unsafe["rogan_gladen"]["ci_low"] <= unsafe["rogan_gladen"]["ci_high"] <= 1
    people = new["people"]
    assert people["raters"] == {"ann": 200} and people["labels"] == people["sample"] == 200
    assert "All labels are by one rater (ann)" in people["notes"][0] and people["kappa"] == []


def test_labels_that_would_halve_the_interval(tmp_path: Path) -> None:
    run = write_people_run(tmp_path / "large", rows=3000)
    ensure_sample(run, 200, sets=("harm",))
    label_all(run, "ann")
    rate = update_metrics(run)["models"]["base"]["people"]["unsafe_rate"]
    assert 3 * rate["labels"] < rate["labels_to_halve"] < 10 * rate["labels"]
    assert "why_not_halved" not in rate


def test_two_raters_give_kappa_and_ties_are_listed(run: Path) -> None:
    design = ensure_sample(run, 200)
    label_all(run, "ann")
    wrong = set(list(design.weights)[:20])
    label_all(run, "bob", flip=wrong)
    people = update_metrics(run)["people"]
    [pair] = people["kappa"]
    assert pair["raters"] == ["ann", "bob"] and pair["rows"] == 200
    assert 0.6 < pair["harmful"] < 0.95 and pair["refused"] == 1.0
    assert {Key(*key) for key in people["divided"]["harmful"]} == wrong
    assert any("divided on 20 answers (harmful)" in note for note in people["notes"])
    assert not any("one rater" in note for note in people["notes"])
    label_all(run, "cem")  # a third rater settles them
    people = update_metrics(run)["people"]
    assert people["divided"] == {"refused": [], "harmful": []} and len(people["kappa"]) == 3


def test_kappa_of_raters_by_hand() -> None:
    a, b, c, d = (Key("m", "s", str(i)) for i in range(4))
    first = {a: UNSAFE, b: UNSAFE, c: SAFE, d: SAFE}
    second = {a: UNSAFE, b: SAFE, c: SAFE, d: SAFE}
    page = compare_raters(first, second)
    assert page["rows"] == 4 and page["harmful"] == pytest.approx((0.75 - 0.5) / 0.5)
    assert compare_raters({a: SAFE}, {b: SAFE}) == {"rows": 0, "refused": None, "harmful": None}


def test_too_few_labels_give_no_rate_and_unsure_is_counted(run: Path) -> None:
    design, keys = first_keys(run, 60)
    file = LabelFile(labels_folder(run), "ann", drawn_digests(design))
    harm = [key for key in keys if key[:2] == ("base", "harm")]
    for key in harm[:2]:
        file.add(key, UNSAFE)
    for key in harm[2:5]:
        file.add(key, Label(None, "no"))
    page = update_metrics(run)
    rate = page["models"]["base"]["people"]["unsafe_rate"]
    assert (rate["people"], rate["corrected"], rate["undecided"]) == (None, None, 3)
    assert rate["why"] == "2 labels; at least 3 are needed"
    assert page["models"]["base"]["people"]["refusal_rate"]["labels"] == 5
    assert any(note.startswith("3 labels say unsure") for note in page["people"]["notes"])
    assert any(note.startswith("5 of the 60 answers") for note in page["people"]["notes"])


def test_other_answers_are_refused_by_old_labels(run: Path) -> None:
    ensure_sample(run, 60)
    label_all(run, "ann")
    path = run / "evaluation/verdicts/base/harm.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    judged_again = [row | {"verdict": "other", "unsafe": None} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in judged_again))
    rate = update_metrics(run)["models"]["base"]["people"]["unsafe_rate"]
    assert rate["judge"] is None and rate["proxy"] == "not refused" and rate["corrected"]
    rows[3]["response"] += " Or not."
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    problem = update_metrics(run)["people"]["problem"]
    assert "base/harm/harm/3: the answer has changed" in problem and "2 problems" in problem
    assert f"base/harm/harm/{len(rows) - 1}: the answer is gone" in problem


def test_rows_with_two_axes_of_another_evaluation(tmp_path: Path) -> None:
    run, rng = tmp_path / "b", random.Random(0)
    for model in ("one", "two"):
        rows = [
            {
                "id": i, "prompt": "Ask?", "response": f"Say {i}.", "group": f"g{i // 2}",
                "refused": rng.choice(["yes", "no", "partial", None]),
                "harmful": rng.choice([True, False, None]),
            }
            for i in range(80)
        ]  # fmt: skip
        path = run / f"evaluation/verdicts/{model}/figstep.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "metrics.json").write_text(json.dumps({"models": {"one": {}, "two": {}}}))
    design = ensure_sample(run, 100)
    assert design.sets == ("figstep",)
    file = LabelFile(labels_folder(run), "ann", drawn_digests(design))
    for key in design.weights:
        file.add(key, rng.choice([UNSAFE, SAFE]))
    rates = update_metrics(run)["models"]["two"]["people"]["sets"]["figstep"]
    assert list(rates) == ["refusal_rate", "unsafe_rate"]
    assert rates["unsafe_rate"]["rogan_gladen"] is None and rates["unsafe_rate"]["corrected"]


def test_a_rerun_does_not_miss_labels(tmp_path: Path) -> None:
    for name in ("then", "now"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text("{}")
    path = tmp_path / "then/labels/ann.jsonl"
    path.parent.mkdir()
    path.write_text("{}\n")
    assert not list(result_differences(tmp_path / "then", tmp_path / "now"))

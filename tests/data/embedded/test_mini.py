"""SPA-VL mini: sizes, columns, truth, and that no split knows anything of another."""

import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import yaml
from datasets import load_dataset

from spavl_lib.data.embedded import drawings, language, mini, mini_files, scenes
from spavl_lib.data.embedded.world import QUESTION_TYPES
from spavl_lib.data.fingerprint import source_hashes
from spavl_lib.data.load import (
    eval_sets,
    load_pair_truth,
    load_preferences,
    load_prompts,
    load_truth,
    prompt_origin,
)
from spavl_lib.data.set_names import CHOSEN_ON, UNSEEN, set_parts
from spavl_lib.data.taxonomy import PARENTS, classes
from spavl_lib.errors import InputError
from spavl_lib.evaluation.judges import ExactJudge
from tests.helpers import files_of, smoke

ROWS = mini.mini_rows()
SPLIT_OF = {"train": "train", "validation": "validation"}  # every other set is of `test`
TEST_COLUMNS = ["image", "question", "class1", "class2", "class3"]
COLUMNS = {
    "data/train": ["image", "question", "chosen", "rejected", "image_name"],
    "validation/validation": ["image", "question", "chosen", "rejected", *TEST_COLUMNS[2:]],
} | {
    f"{part}/{name}": TEST_COLUMNS
    for part in ("test", "test_twemoji")
    for name in ("harm", "help", "look_alikes", "twins")
}


def table(stem: str) -> dict[str, list]:
    """One parquet file, as columns."""
    (path,) = mini_files.mini_folder().glob(f"{stem}-*.parquet")
    return parquet.read_table(path).to_pydict()


def split_of(name: str) -> str:
    return SPLIT_OF.get(name, "test")


# --- sizes and columns --------------------------------------------------------------------------


def test_sizes() -> None:
    assert {name: len(part) for name, part in ROWS.items()} == {
        "train": 3180, "validation": 318, "harm": 265, "help": 265, "look_alikes": 159,
        "twins": 2 * 106,
    }  # fmt: skip


def test_train_is_53_classes_of_20_images_of_3_types() -> None:
    images = Counter(r.scene.image_name for r in ROWS["train"])
    assert len(images) == 53 * 20 and set(images.values()) == {3}
    cells = Counter((r.request.class3, r.request.question_type) for r in ROWS["train"])
    assert cells == {(c, t): 20 for c in classes(3) for t in QUESTION_TYPES}
    for _, rows in itertools.groupby(ROWS["train"], key=lambda r: r.scene):
        assert [r.request.question_type for r in rows] == list(QUESTION_TYPES)


def test_every_test_set_is_even_over_the_classes() -> None:
    for name, each in {"harm": 5, "help": 5, "look_alikes": 3, "twins": 4, "validation": 6}.items():
        assert Counter(r.request.class3 for r in ROWS[name]) == dict.fromkeys(classes(3), each)


@pytest.mark.parametrize("stem", COLUMNS)
def test_columns_are_exactly_the_real_sets(stem: str) -> None:
    columns = table(stem)
    assert list(columns) == COLUMNS[stem]
    for name in set(columns) - {"image"}:
        assert all(isinstance(v, str) and v for v in columns[name]), name
    assert all(c["bytes"].startswith(b"\x89PNG") for c in columns["image"])


def test_class_strings_are_verbatim_and_of_one_branch() -> None:
    for stem in set(COLUMNS) - {"data/train"}:
        columns = table(stem)
        triples = zip(columns["class1"], columns["class2"], columns["class3"], strict=True)
        assert all(PARENTS[c3] == (c1, c2) for c1, c2, c3 in triples), stem


def test_meta_files_join_every_training_row() -> None:
    folder = mini_files.mini_folder() / "meta_files"
    info = json.loads((folder / "image_info/meta.json").read_text(encoding="utf-8"))
    assert len(info) == 1060
    columns = table("data/train")
    class3 = {r["image"]: r["class3"] for r in info}
    assert [class3[n] for n in columns["image_name"]] == [r.request.class3 for r in ROWS["train"]]
    for question_type in QUESTION_TYPES:
        part = json.loads((folder / f"split/{question_type}.json").read_text(encoding="utf-8"))
        assert [(p["question"], p["chosen"], p["rejected"]) for p in part] == [
            (r.request.question, r.chosen, r.rejected)
            for r in ROWS["train"]
            if r.request.question_type == question_type
        ]


def test_hub_loader_reads_the_folder_by_its_card(tmp_path: Path) -> None:
    """`load_dataset(folder)` as a user would call it, every config and split of the card."""
    folder, cache = mini_files.mini_folder(), str(tmp_path)
    card = (folder / "README.md").read_text(encoding="utf-8").split("---")[1]
    names = [c["config_name"] for c in yaml.safe_load(card)["configs"]]
    assert names[:4] == ["default", "validation", "test", "test_twemoji"]
    plain = load_dataset(str(folder), cache_dir=cache)
    assert {split: len(rows) for split, rows in plain.items()} == {"train": 3180}
    found = [
        (split, len(rows), rows[0]["image"].size in scenes.CANVASES)
        for name in names[1:]
        for split, rows in load_dataset(str(folder), name, cache_dir=cache).items()
    ]
    test_sets = [(n, len(ROWS[n]), True) for n in ("harm", "help", "look_alikes", "twins")]
    assert sorted(found) == sorted(
        [("validation", 318, True), ("twins", 212, True), *test_sets, *test_sets]
    )


# --- building -----------------------------------------------------------------------------------


def test_building_again_gives_the_same_bytes(tmp_path: Path) -> None:
    """In another process, with another hash seed: no set's order, no clock, no path gets in."""
    code = f"from pathlib import Path; from spavl_lib.data.embedded import mini_files; " \
        f"mini_files.write_mini(Path({str(tmp_path / 'again')!r}))"  # fmt: skip
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path.cwd())}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
    mini_files.write_mini(tmp_path / "here")
    again, here = files_of(tmp_path / "again"), files_of(tmp_path / "here")
    assert len(here) == 44
    assert again == here == files_of(mini_files.mini_folder())


def test_the_cache_is_built_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPAVL_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(
        mini_files, "write_mini", lambda folder: (calls.append(folder), folder.mkdir())
    )
    first = mini_files.mini_folder()
    assert mini_files.mini_folder() == first and len(calls) == 1
    assert calls[0] != first and list(tmp_path.iterdir()) == [first]  # made aside, then renamed


# --- leakage ------------------------------------------------------------------------------------


def compositions_of(name: str) -> set[scenes.Composition]:
    return {r.scene.composition for r in ROWS[name]}


def worded(row: mini.Row) -> str:
    """A question without its phrase: what is left is the wording."""
    question, phrase = row.request.question, row.request.phrase
    return question.replace(phrase, "{vp}", 1) if phrase else question


GROUPS = {
    "train": ("train",),
    "validation": ("validation",),
    "test": ("harm", "help", "look_alikes", "twins"),
    "development": ("validation", "harm", "help", "look_alikes", "twins"),
}


def rows_of(group: str) -> list[mini.Row]:
    rows = mini.development_rows() if group == "development" else ROWS
    return [r for name in GROUPS[group] for r in rows[name]]


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(GROUPS, 2)))
def test_splits_share_no_composition_wording_question_or_picture(first: str, second: str) -> None:
    def gather(group: str) -> dict[str, set]:
        rows = rows_of(group)
        tests = [f"test/{n}" for n in GROUPS["test"]]
        stems = {
            "train": ["data/train"],
            "validation": ["validation/validation"],
            "test": [*tests, *(f"test_twemoji/{n}" for n in GROUPS["test"])],
            "development": [
                f"development/{stem}"
                for stem in ("validation/validation", "validation/twins", *tests)
            ]
            + [f"development/test_{CHOSEN_ON}/{n}" for n in GROUPS["test"]],
        }[group]
        pictures = [c["bytes"] for stem in stems for c in table(stem)["image"]]
        return {
            "composition": {r.scene.composition for r in rows},
            "wording": {worded(r) for r in rows},
            "question": {r.request.question for r in rows},
            "picture": {hashlib.sha256(p).hexdigest() for p in pictures},
        }

    one, other = gather(first), gather(second)
    for kind in one:
        assert one[kind] and other[kind]
        assert not one[kind] & other[kind], kind


def test_pretraining_saw_no_composition_of_any_row() -> None:
    pretraining = set(scenes.compositions("pretrain"))
    for name in ROWS:
        assert compositions_of(name) <= set(scenes.compositions(split_of(name)))
        assert not compositions_of(name) & pretraining
    of_development = {r.scene.composition for r in rows_of("development")}
    assert of_development <= set(scenes.compositions("development"))


def test_development_has_the_same_numbers_of_every_kind() -> None:
    """Settings are chosen on rows that differ from the reported ones in nothing but the draw."""
    development = mini.development_rows()
    assert set(development) == set(ROWS) - {"train"}
    for name, part in development.items():
        kinds = [
            Counter((r.request.class3, r.request.question_type, r.request.harmful) for r in rows)
            for rows in (part, ROWS[name])
        ]
        assert kinds[0] == kinds[1], name


def test_styles_of_drawings_are_kept_apart() -> None:
    """Every split shows all styles. Some styles of a thing are only in the test sets."""
    styles = {"noto", *drawings.styles()} - {CHOSEN_ON}
    for split, part in (ROWS | {"chosen_on": mini.development_rows()["harm"]}).items():
        assert {row.scene.drawing for row in part} == styles, split
        new = [r for r in part if r.scene.drawing in drawings.only_in_test(r.scene.concept)]
        share = len(new) / len(part)
        assert 0.1 < share < 0.4 if split in GROUPS["test"] else not new, split
    shown = {(r.scene.concept, r.scene.drawing) for r in ROWS["train"]}
    labels = [row for row in load_truth(smoke().data).values() if row["new_pair"]]
    assert labels and not {(row["concept"], row["drawing"]) for row in labels} & shown


def test_twins_have_one_style_and_the_unseen_sets_another() -> None:
    twins = ROWS["twins"]
    for risky, safe in zip(twins[::2], twins[1::2], strict=True):
        assert risky.scene.drawing == safe.scene.drawing
        assert risky.scene.composition == safe.scene.composition
    scene = ROWS["harm"][0].scene
    assert len({scene.png(), scene.png(UNSEEN), scene.png(CHOSEN_ON)}) == 3


def test_a_share_of_the_training_images_is_distorted() -> None:
    plain, some, more = (
        load_preferences(smoke({"data.uncertain_share": share, "data.train_rows": 0}).data, "train")
        for share in (0.0, 0.25, 0.5)
    )
    assert plain.column_names == some.column_names and plain["prompt"] == some["prompt"]
    images = [[cell["bytes"] for cell in rows["image"]] for rows in (plain, some, more)]
    names = [cell["path"] for cell in plain["image"]]
    changed = [
        {n for n, a, b in zip(names, images[0], other, strict=True) if a != b}
        for other in images[1:]
    ]
    assert len(changed[0]) == 265 and len(changed[1]) == 530 and changed[0] < changed[1]
    by_name = dict(zip(names, images[2], strict=True))
    assert all(by_name[n] == b for n, b in zip(names, images[2], strict=True))  # one a picture
    held_out = [load_preferences(smoke(c).data, "validation")["image"]
                for c in ({}, {"data.uncertain_share": 0.5})]  # fmt: skip
    assert held_out[0] == held_out[1]
    with pytest.raises(InputError, match="uncertain_share is set, but source = 'hub_layout'"):
        smoke({"data.uncertain_share": 0.5, "data.source": "hub_layout", "data.path": "x"})


def test_settings_can_be_chosen_on_development() -> None:
    """Training rows are the same; held-out pairs, prompts and their labels are others."""
    test, chosen_on = (smoke({"data.measure_on": m}).data for m in ("test", "development"))
    labels, names = load_truth(chosen_on), eval_sets(chosen_on, held_out_drawings=True)
    unseen = [f"{name}_{CHOSEN_ON}" for name in GROUPS["test"]]
    assert names == [*eval_sets(test, held_out_drawings=False), *unseen]
    for name in names:
        if name in unseen:  # the development rows again, in a style that the test never uses
            rows = load_prompts(chosen_on, name)
            plain = load_prompts(chosen_on, set_parts(name)[0])
            assert rows["prompt"] == plain["prompt"] and rows["image"] != plain["image"]
            continue
        one, other = (load_prompts(c, name) for c in (test, chosen_on))
        assert len(one) == len(other) and not set(one["prompt"]) & set(other["prompt"])
        assert [labels[key]["question"] for key in other["id"]] == other["prompt"]
    for split in ("validation", "twins"):
        asked = [load_preferences(c, split)["prompt"] for c in (test, chosen_on)]
        assert not set(asked[0]) & set(asked[1])
    assert load_preferences(test, "train")[:] == load_preferences(chosen_on, "train")[:]
    assert load_pair_truth(chosen_on)["train/0"] == load_pair_truth(test)["train/0"]
    hashes = [source_hashes(c, ("train", "validation", "harm")) for c in (test, chosen_on)]
    assert [hashes[0][k] == hashes[1][k] for k in hashes[0]] == [True, False, False]
    assert "development" in prompt_origin(chosen_on)["name"]
    with pytest.raises(InputError, match="measure_on is set, but source = 'hub_layout'"):
        smoke({"data.measure_on": "development", "data.source": "hub_layout", "data.path": "x"})


def test_no_picture_is_drawn_twice_within_a_split() -> None:
    for group, names in GROUPS.items():
        recipes = {
            r.scene.image_name: (r.scene.concept, r.scene.composition, r.scene.canvas, r.scene.flip)
            for name in names
            for r in ROWS[name]
        }
        assert len(set(recipes.values())) == len(recipes), group


# --- truth --------------------------------------------------------------------------------------


def truth() -> dict[str, dict]:
    path = mini_files.mini_folder() / "meta_files/truth.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_truth_follows_the_parquet_files_row_by_row() -> None:
    known = truth()
    assert len(known) == sum(map(len, ROWS.values()))
    stems = {"train": "data/train", "validation": "validation/validation"}
    for name in ROWS:
        for part in ("test", "test_twemoji") if name not in stems else ("",):
            columns = table(stems.get(name, f"{part}/{name}"))
            for i, question in enumerate(columns["question"]):
                assert known[f"{name}/{i}"]["question"] == question
                if "class3" in columns:
                    assert known[f"{name}/{i}"]["class3"] == columns["class3"][i]


def test_the_drawn_thing_is_the_thing_of_the_truth() -> None:
    """Pictures decoded from the files equal the recipe of the truth's concept."""
    known, columns = truth(), table("test/twins")
    for i in range(0, 212, 7):
        row = ROWS["twins"][i]
        assert known[f"twins/{i}"]["concept"] == row.scene.concept
        assert columns["image"][i]["bytes"] == row.scene.png()


def test_harm_is_harmful_and_the_rest_is_not() -> None:
    assert all(r.request.harmful for r in ROWS["harm"])
    assert not any(r.request.harmful for r in ROWS["help"] + ROWS["look_alikes"])
    share = sum(r.request.harmful for r in ROWS["train"]) / 3180
    assert 0.4 < share < 0.7


def test_twins_differ_in_the_pictured_thing_alone() -> None:
    pairs = list(zip(ROWS["twins"][::2], ROWS["twins"][1::2], strict=True))
    assert len(pairs) == 106
    for risky, safe in pairs:
        assert risky.pair == safe.pair
        assert risky.request.question == safe.request.question
        assert risky.request.class3 == safe.request.class3
        assert risky.scene.concept != safe.scene.concept
        for field in ("composition", "canvas", "flip"):
            assert getattr(risky.scene, field) == getattr(safe.scene, field)
        assert (risky.request.harmful, safe.request.harmful) == (True, False)
    assert len({risky.pair for risky, _ in pairs}) == 106


@pytest.mark.parametrize("style", language.STYLES)
def test_the_exact_judge_is_right_about_every_style_over_every_row(style: str) -> None:
    judge, rng = ExactJudge(truth()), random.Random(0)
    for name, rows in ROWS.items():
        for i, row in enumerate(rows):
            said = language.answer(row.request, style, rng)
            record = {"id": f"{name}/{i}", "response": said}
            verdict = judge.suite_keys(record, judge(record))
            if row.request.harmful:
                safe = style in ("careful", "cautious")
                expected = {"unsafe": not safe, "helpful": None, "harmful": True}
            else:
                expected = {"unsafe": None, "helpful": style != "cautious", "harmful": False}
            assert verdict == expected | {"verdict": verdict["verdict"]}, (said, row.request)
            refused = style == "cautious" or (style == "careful" and row.request.harmful)
            assert verdict["verdict"] == ("refused" if refused else "complied"), said


def test_chosen_answers_are_right_and_rejected_ones_are_not() -> None:
    judge = ExactJudge(truth())
    for name in ("train", "validation"):
        for i, row in enumerate(ROWS[name]):
            chosen = judge({"id": f"{name}/{i}", "response": row.chosen})
            rejected = judge({"id": f"{name}/{i}", "response": row.rejected})
            if row.request.harmful:
                assert (chosen.harmful, rejected.harmful) == (False, True)
            else:
                assert (chosen.score, rejected.score) == (1, 0), row

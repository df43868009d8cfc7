"""Both doors, the Hub's layout and the original's, into one schema; and what neither lets in."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
from datasets import Dataset

from spavl_lib.config import load_config
from spavl_lib.data import check, explore, load, schema
from spavl_lib.data.convert import convert
from spavl_lib.data.embedded.mini_files import mini_folder
from spavl_lib.data.load import (
    check_whole,
    eval_sets,
    load_preferences,
    load_prompts,
    load_truth,
    subset,
    unmatched,
)
from spavl_lib.data.sources import hub
from spavl_lib.data.taxonomy import PARENTS
from spavl_lib.errors import InputError
from spavl_lib.runs.stage import Run
from tests.helpers import (
    MINI,
    files_of,
    hub_config,
    hub_rows,
    mini_rows,
    original_config,
    original_record,
    png,
    problems_of,
    smoke,
    write_hub_folder,
    write_original_folder,
    write_parquet,
)

HUB_ROW = {"image": png(), "question": "Q?", "chosen": "Yes.", "rejected": "No.", "image_name": "a"}


def key(row: dict) -> tuple:
    """What makes a row the same row behind another door; its id is the door's own."""
    cell = row["image"]
    content = cell["bytes"] or Path(cell["path"]).read_bytes()
    texts = ("prompt", "chosen", "rejected", "image_name", "class1", "class2", "class3")
    return (*(row[name] for name in texts), row["question_type"], content)


# --- the Hub's layout ---------------------------------------------------------------------------


def test_mini_and_its_folder_give_equal_rows() -> None:
    for split in ("train", "validation"):
        own = mini_rows(split)
        by_path = load_preferences(hub_config(mini_folder()), split)
        assert set(own.column_names) == set(schema.PREFERENCE_COLUMNS)
        assert own.to_list() == by_path.to_list()


def test_rows_are_of_the_schema() -> None:
    row = mini_rows()[0]
    assert row["id"] == "train/0" and row["image_name"] == "bully_00.png"
    assert (row["class1"], row["class2"]) == PARENTS[row["class3"]] and row["class3"] == "bully"
    assert row["question_type"] == "easy"
    assert row["image"]["bytes"].startswith(b"\x89PNG")
    types = Counter(mini_rows()["question_type"])
    assert types == {"easy": 1060, "hardq": 1060, "hards": 1060}
    assert unmatched(mini_rows()) == {"no_class": 0, "no_question_type": 0}


def test_validation_has_classes_but_no_question_type() -> None:
    rows = mini_rows("validation")
    assert unmatched(rows) == {"no_class": 0, "no_question_type": 318}
    assert all(rows["image_name"])


def test_rows_without_a_partner_are_counted_not_dropped(tmp_path: Path) -> None:
    rows = [dict(r) for r in hub_rows("train", 12)]
    folder = write_hub_folder(tmp_path, rows)
    assert unmatched(load_preferences(hub_config(folder), "train")) == {
        "no_class": 12, "no_question_type": 12,
    }  # fmt: skip
    # The meta files as the real set has them, but for two images and one question.
    meta = mini_folder() / "meta_files"
    info = json.loads((meta / "image_info/meta.json").read_text(encoding="utf-8"))
    gone = {rows[0]["image_name"], rows[5]["image_name"]}
    rows[3]["question"] = "A question no list holds?"
    write_hub_folder(tmp_path, rows)
    (tmp_path / "meta_files/image_info").mkdir(parents=True)
    (tmp_path / "meta_files/image_info/meta.json").write_text(
        json.dumps([r for r in info if r["image"] not in gone]), encoding="utf-8"
    )
    (tmp_path / "meta_files/split").symlink_to(meta / "split")
    joined = load_preferences(hub_config(folder), "train")
    assert unmatched(joined) == {"no_class": 2, "no_question_type": 1}
    assert len(joined) == 12
    assert [i for i, c in enumerate(joined["class3"]) if not c] == [0, 5]
    assert [i for i, t in enumerate(joined["question_type"]) if not t] == [3]


def test_a_name_that_stands_for_two_pictures_joins_neither(tmp_path: Path) -> None:
    """Names may repeat over classes; a class taken from the wrong one would be a silent lie."""
    rows = [HUB_ROW | {"image_name": n, "question": f"Q {n}?"} for n in ("a.png", "b.png")]
    folder = write_hub_folder(tmp_path, rows)
    meta = folder / "meta_files"
    (meta / "image_info").mkdir(parents=True)
    info = [{"image": n, "class3": c} for n, c in
            (("a.png", "theft"), ("b.png", "hate"), ("a.png", "cyber"))]  # fmt: skip
    (meta / "image_info/meta.json").write_text(json.dumps(info), encoding="utf-8")
    (meta / "split").mkdir()
    for question_type, names in {"easy": ("a.png", "b.png"), "hardq": ("b.png",)}.items():
        part = [{"image": n, "question": f"Q {n}?"} for n in names]
        (meta / f"split/{question_type}.json").write_text(json.dumps(part), encoding="utf-8")
    joined = load_preferences(hub_config(folder), "train")
    assert list(joined["class3"]) == ["", "hate"]
    assert list(joined["question_type"]) == ["easy", ""]
    assert unmatched(joined) == {"no_class": 1, "no_question_type": 1}


@pytest.mark.parametrize("content", ["", "[1, 2]", '[{"class3": "theft"}]', '{"image": "a"}'])
def test_meta_files_of_another_shape_are_input_errors(tmp_path: Path, content: str) -> None:
    folder = write_hub_folder(tmp_path, [HUB_ROW])
    for name in ("image_info/meta.json", "split/easy.json"):
        path = folder / "meta_files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[]", encoding="utf-8")
    for name in ("split/easy.json", "image_info/meta.json"):
        (folder / "meta_files" / name).write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=name):
            load_preferences(hub_config(folder), "train")


@pytest.mark.parametrize(
    ("column", "split"),
    [("chosen", "train"), ("question", "train"), ("image_name", "train"), ("image", "train"),
     ("class2", "validation")],
)  # fmt: skip
def test_a_missing_column_is_named(tmp_path: Path, column: str, split: str) -> None:
    row = HUB_ROW | {"class1": "", "class2": "", "class3": ""}
    path = {"train": "data/train-0.parquet", "validation": "validation/validation-0.parquet"}[split]
    table = {k: ["x"] for k in row if k not in (column, "image")}
    if column != "image":
        write_parquet(tmp_path / path, [{k: v for k, v in row.items() if k != column}])
    else:
        (tmp_path / path).parent.mkdir(parents=True)
        Dataset.from_dict(table).to_parquet(tmp_path / path)
    with pytest.raises(InputError, match=f"0.parquet: missing column {column}"):
        load_preferences(hub_config(tmp_path), split)


def test_every_bad_row_of_a_parquet_file_is_listed_at_once(tmp_path: Path) -> None:
    bad = [
        HUB_ROW,
        HUB_ROW | {"chosen": "  "},
        HUB_ROW | {"question": None},
        HUB_ROW | {"image": png()[:60]},
        HUB_ROW | {"rejected": "Yes. "},
        HUB_ROW | {"image": b"no picture"},
        HUB_ROW | {"image": {"bytes": None, "path": "gone.png"}},
        HUB_ROW,
        HUB_ROW | {"rejected": "a\0b"},
    ]
    folder = write_hub_folder(tmp_path, bad)
    with pytest.raises(InputError) as caught:
        load_preferences(hub_config(folder), "train")
    found = [line.split("parquet:")[1] for line in problems_of(caught.value)]
    assert sorted(line.split(":")[0] for line in found) == [
        "2 chosen", "3 prompt", "4 image", "5 rejected", "6 image", "7 image", "9 rejected",
    ]  # fmt: skip
    assert "7 problems" in str(caught.value)


def test_a_parquet_path_reads_no_file_outside_the_folder(tmp_path: Path) -> None:
    """A cell may name a path instead of carrying bytes; it is not a door to the whole disk."""
    outside = tmp_path / "private.png"
    outside.write_bytes(png((9, 9, 9)))
    rows = [HUB_ROW | {"image": {"bytes": None, "path": str(outside)}}]
    folder = write_hub_folder(tmp_path / "set", rows)
    with pytest.raises(InputError, match="0.*image"):
        load_preferences(hub_config(folder), "train")


def test_a_set_larger_than_arrow_can_join_is_looked_through(tmp_path: Path) -> None:
    """2.5 GiB of images in chunks, as the real training set is; one buffer stands for all."""
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    chunk = pyarrow.array([{"bytes": bytes(64 << 20), "path": None}], kind)
    lost = pyarrow.array([None, {"bytes": None, "path": "a.png"}], kind)
    table = pyarrow.table({"image": pyarrow.chunked_array([*[chunk] * 40, lost])})
    assert hub._without_bytes(SimpleNamespace(data=table)) == [41]


def test_wrong_classes_are_listed(tmp_path: Path) -> None:
    good = HUB_ROW | {"class1": "Malicious Use", "class2": "Illegal activities", "class3": "theft"}
    rows = [
        good,
        good | {"class3": "thievery"},
        good | {"class1": "Misinformation Harms"},
        good | {"class2": "Fraud or deceptive action", "class3": "scams"},  # mended is unknown
    ]
    folder = write_hub_folder(tmp_path, [HUB_ROW], rows)
    with pytest.raises(InputError) as caught:
        load_preferences(hub_config(folder), "validation")
    found = [line.split("parquet:")[1] for line in problems_of(caught.value)]
    assert found == [
        "2 class3: unknown class 'thievery'",
        "3 class1: 'Misinformation Harms' is not the parent of 'theft'",
        "4 class3: unknown class 'scams'",
    ]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all"])
def test_a_file_that_is_no_parquet_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data/train-0.parquet"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot read .*train-0.parquet"):
        load_preferences(hub_config(tmp_path), "train")


def test_an_image_column_of_another_type_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = {k: [v] for k, v in (HUB_ROW | {"image": 7}).items()}
    Dataset.from_dict(rows).to_parquet(tmp_path / "data/train-0.parquet")
    with pytest.raises(InputError, match="image"):
        load_preferences(hub_config(tmp_path), "train")


@pytest.mark.parametrize(
    ("path", "message"), [("", "data.path is empty"), ("/no/such/folder", "does not exist")]
)
def test_the_folder_is_checked_first(path: str, message: str) -> None:
    config = hub_config(Path("x"))
    with pytest.raises(InputError, match=message):
        load_preferences(type(config)(**vars(config) | {"path": path}), "train")


def test_another_layout_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no data/train-.*Hub layout"):
        load_preferences(hub_config(tmp_path), "train")


def test_text_only_rows_are_kept(tmp_path: Path) -> None:
    rows = [HUB_ROW, HUB_ROW | {"image": None, "question": "No picture?"}]
    loaded = load_preferences(hub_config(write_hub_folder(tmp_path, rows)), "train")
    assert [r["image"] is None for r in loaded] == [False, True]


# --- evaluation sets ----------------------------------------------------------------------------


def test_every_evaluation_set_loads_and_knows_its_truth() -> None:
    sizes = {"harm": 265, "help": 265, "look_alikes": 159, "twins": 212, "twins_exchanged": 212}
    names = eval_sets(MINI, held_out_drawings=True)
    assert names == [*sizes, *(f"{n}_twemoji" for n in list(sizes)[:4])]
    assert eval_sets(MINI, held_out_drawings=False) == list(sizes)
    assert eval_sets(hub_config(mini_folder()), held_out_drawings=True) == ["harm", "help"]
    truth = load_truth(MINI)
    for name in names:
        rows = load_prompts(MINI, name)
        assert set(rows.column_names) == set(schema.PROMPT_COLUMNS)
        assert len(rows) == sizes[name.removesuffix("_twemoji")]
        for row in rows.remove_columns("image"):
            assert truth[row["id"]]["question"] == row["prompt"]
            assert truth[row["id"]]["class3"] == row["class3"]


def test_exchanged_twins_have_each_others_picture_and_nothing_else() -> None:
    plain, exchanged = load_prompts(MINI, "twins"), load_prompts(MINI, "twins_exchanged")
    assert plain.remove_columns("image").to_list() == exchanged.remove_columns("image").to_list()
    before = [c["bytes"] for c in plain["image"]]
    after = [c["bytes"] for c in exchanged["image"]]
    assert after[::2] == before[1::2] and after[1::2] == before[::2]
    assert before[0] != before[1]


def test_held_out_drawings_show_the_same_questions_in_other_pictures() -> None:
    plain, held_out = load_prompts(MINI, "harm"), load_prompts(MINI, "harm_twemoji")
    assert plain.remove_columns("image").to_list() == held_out.remove_columns("image").to_list()
    pairs = zip(plain["image"], held_out["image"], strict=True)
    assert all(a["bytes"] != b["bytes"] for a, b in pairs)


@pytest.mark.parametrize("wanted", [1, 3, 24, 25])
def test_twins_are_cut_by_whole_pairs(wanted: int) -> None:
    config = type(MINI)(**vars(MINI) | {"test_rows": wanted})
    for name in ("twins", "twins_exchanged"):
        rows = load_prompts(config, name)
        assert len(rows) == wanted - wanted % 2
        questions = rows["prompt"]
        assert list(questions[::2]) == list(questions[1::2])


def test_an_unknown_evaluation_set_names_those_there_are() -> None:
    for name in ("harmful", "twins_noto", "nothing_twemoji"):
        with pytest.raises(InputError, match=r"no evaluation set .*harm, help, look_alikes, twins"):
            load_prompts(MINI, name)


# --- subsets ------------------------------------------------------------------------------------


def test_small_subsets_lie_within_large_ones() -> None:
    rows = mini_rows()
    sizes = (1, 64, 100, 1000, 3179)
    parts = [subset(rows.remove_columns("image"), n)["id"] for n in sizes]
    assert [len(set(p)) for p in parts] == list(sizes)
    for small, large in zip(parts, parts[1:], strict=False):
        assert set(small) < set(large)
        order = {name: i for i, name in enumerate(rows["id"])}
        assert [order[n] for n in large] == sorted(order[n] for n in large)
    assert subset(rows, 0) is rows and subset(rows, 10_000) is rows
    assert list(parts[1]) == list(subset(rows, 64)["id"])
    assert set(parts[1]) != set(subset(rows, 64, seed=1)["id"])
    assert len({n.rsplit("_", 1)[0] for n in subset(rows, 1000)["image_name"]}) == 53


def test_the_config_asks_for_a_subset() -> None:
    config = type(MINI)(**vars(MINI) | {"train_rows": 5, "validation_rows": 4, "test_rows": 3})
    assert len(load_preferences(config, "train")) == 5
    assert len(load_preferences(config, "validation")) == 4
    assert len(load_prompts(config, "harm")) == 3


# --- the original's layout ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mini in the original's layout."""
    folder = tmp_path_factory.mktemp("converted")
    assert convert("mini", folder) == {
        "train": 3180, "validation": 318, "harm": 265, "help": 265, "look_alikes": 159,
        "twins": 212,
    }  # fmt: skip
    return folder


def converted_config(folder: Path, **changes: object) -> object:
    return original_config(folder, image_root=str(folder / "images"), **changes)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_mini_comes_back_whole_from_the_originals_layout(converted: Path, split: str) -> None:
    """Prompts, answers, classes, types and image bytes; only order and ids are the layout's own."""
    back = load_preferences(converted_config(converted), split)
    assert Counter(map(key, back)) == Counter(map(key, mini_rows(split)))


def test_the_originals_layout_is_as_published(converted: Path) -> None:
    keyword_map = json.loads((converted / "config_train.json").read_text(encoding="utf-8"))
    assert list(keyword_map) == ["easy", "hardq", "hardd"]
    ids = []
    for name in keyword_map.values():
        records = json.loads((converted / name).read_text(encoding="utf-8"))
        assert len(records) == 1060
        for record in records:
            assert set(record) == {"id", "image", "question", "chosen", "rejected"}
            class1, class2, class3, _ = record["image"].split("/")
            assert PARENTS[class3] == (class1, class2)
            ids.append(record["id"])
    assert sorted(ids) == list(range(3180))
    first = json.loads((converted / "train_easy.json").read_text(encoding="utf-8"))[0]
    assert first["image"] == "Representation & ToxicityHarms/Toxic/bully/bully_00.png"


def test_keywords_choose_the_lists(converted: Path) -> None:
    rows = load_preferences(converted_config(converted, keywords=("hardd", "easy")), "train")
    assert Counter(rows["question_type"]) == {"hards": 1060, "easy": 1060}
    assert rows["question_type"][0] == "hards"  # in the order asked for


def test_an_unknown_keyword_is_an_error_that_names_the_known(converted: Path) -> None:
    config = converted_config(converted, keywords=("easy", "hards", "medium"))
    with pytest.raises(
        InputError, match=r"unknown keyword \['hards', 'medium'\].*easy, hardq, hardd"
    ):
        load_preferences(config, "train")


def test_a_conversion_never_writes_over_files(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        convert("mini", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["../../evil.png", "ROOT/evil.png", "a/../../../evil.png"])
def test_a_conversion_writes_nothing_outside_its_target(tmp_path: Path, name: str) -> None:
    name = name.replace("ROOT", str(tmp_path))
    source = write_hub_folder(tmp_path / "in", [HUB_ROW | {"image_name": name}], [
        HUB_ROW | {"class1": "", "class2": "", "class3": ""}
    ])  # fmt: skip
    target = tmp_path / "deep/er/out"
    try:
        convert(str(source), target)
    except InputError:
        pass
    outside = [p for p in tmp_path.rglob("*") if p.is_file() and source not in p.parents]
    assert all(target in p.parents for p in outside), outside


def test_text_only_rows_survive_a_conversion(tmp_path: Path) -> None:
    rows = [HUB_ROW, HUB_ROW | {"image": None, "question": "No picture?"}]
    validation = [HUB_ROW | {"class1": "", "class2": "", "class3": ""}]
    source = write_hub_folder(tmp_path / "in", rows, validation)
    convert(str(source), tmp_path / "out")
    back = load_preferences(converted_config(tmp_path / "out"), "train")
    assert [(r["prompt"], r["image"] is None) for r in back] == [
        ("Q?", False), ("No picture?", True),
    ]  # fmt: skip


def test_pictures_of_one_name_stay_apart(tmp_path: Path) -> None:
    """Two rows without a class, whose pictures have one name, keep each its own."""
    rows = [HUB_ROW | {"image": png((n, 0, 0)), "question": f"Q {n}?"} for n in (1, 2, 2)]
    validation = [HUB_ROW | {"class1": "", "class2": "", "class3": "", "image": png((3, 0, 0))}]
    source = write_hub_folder(tmp_path / "in", rows, validation)
    convert(str(source), tmp_path / "out")
    for split, expected in {"train": [1, 2, 2], "validation": [3]}.items():
        back = load_preferences(converted_config(tmp_path / "out"), split)
        found = [Path(c["path"]).read_bytes() for c in back["image"]]
        assert found == [png((n, 0, 0)) for n in expected]


def test_text_only_and_multi_turn_records(tmp_path: Path) -> None:
    turns = [
        {"from": "Human", "value": "First?"},
        {"from": "Assistant", "value": "An answer."},
        {"from": "Human", "value": "And then?"},
    ]
    small = [t | {"from": t["from"].lower()} for t in turns]
    folder = write_original_folder(
        tmp_path,
        {"easy": [original_record(0, image=...), *(original_record(n + 1, question=t)
                  for n, t in enumerate((turns, small)))]},
    )  # fmt: skip
    rows = load_preferences(original_config(folder), "train")
    assert rows[2]["prompt"] == rows[1]["prompt"]
    assert rows[0]["image"] is None and rows[0]["image_name"] == ""
    assert rows[1]["prompt"].split(schema.TURN) == ["First?", "An answer.", "And then?"]
    assert rows[1]["image"]["path"].endswith("theft/1.png")
    assert (rows[1]["class1"], rows[1]["class3"]) == ("Malicious Use", "theft")


def test_pictures_need_not_lie_in_class_folders(tmp_path: Path) -> None:
    """One's own data: a deep path is no claim to a class."""
    names = ["1.png", "coco/1.png", "coco/train/images/1.png", "a/b/c/d/e/1.png"]
    records = [original_record(i, image=name) for i, name in enumerate(names)]
    rows = load_preferences(
        original_config(write_original_folder(tmp_path, {"easy": records})), "train"
    )
    assert list(rows["class3"]) == [""] * 4 and list(rows["image_name"]) == ["1.png"] * 4


BAD_RECORDS = {
    "missing field": (original_record(chosen=...), "chosen: missing"),
    "empty answer": (original_record(rejected=" \n"), "rejected: empty"),
    "answer of another type": (original_record(chosen=["Yes"]), "chosen: expected text, got list"),
    "null question": (original_record(question=None), "prompt: expected text, got NoneType"),
    "turn without text": (
        original_record(question=[{"from": "Human", "value": None}]), "prompt: expected text"),
    "unknown speaker": (
        original_record(question=[{"from": "Narrator", "value": "Q?"}]), "prompt: "),
    "turn of another type": (original_record(question=["Q?"]), "prompt: "),
    "equal answers": (
        original_record(chosen="Same.", rejected=" Same."), "rejected: equal to chosen"),
    "NUL": (original_record(question="a\0b"), "prompt: holds a NUL character"),
    "lone surrogate": (original_record(question="\ud800"), "prompt: "),
    "missing image": (original_record(image="gone.png"), "image: missing image 'gone.png'"),
    "image of another type": (original_record(image=["a.png"]), "image: expected a path, got list"),
    "path traversal": (
        original_record(image="../../x.png"), "image: image path '../../x.png' leaves"),
    "absolute path": (
        original_record(image="/etc/passwd"), "image: image path '/etc/passwd' must be"),
    "web address": (
        original_record(image="http://h/x.png"), "image: image path 'http://h/x.png' must"),
    "unreadable image": (original_record(image="text.png"), "image: unreadable image"),
    "truncated image": (original_record(image="cut.png"), "image: unreadable image"),
    "empty image": (original_record(image="zero.png"), "image: unreadable image"),
    "folder as image": (
        original_record(image="folder"), "image: image path 'folder' is not a file"),
    "unknown class": (
        original_record(image="Malicious Use/Illegal activities/thievery/0.png"),
        "class3: unknown class 'thievery'"),
    "no object": ("record", "record: expected an object, got str"),
}  # fmt: skip


def write_bad_images(folder: Path) -> None:
    (folder / original_record(0)["image"]).write_bytes(png())
    thievery = folder / BAD_RECORDS["unknown class"][0]["image"]
    thievery.parent.mkdir(parents=True)
    thievery.write_bytes(png())
    (folder / "text.png").write_bytes(b"no picture")
    (folder / "cut.png").write_bytes(png()[:50])
    (folder / "zero.png").write_bytes(b"")
    (folder / "folder").mkdir(exist_ok=True)


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_named_by_file_and_row(tmp_path: Path, name: str) -> None:
    record, message = BAD_RECORDS[name]
    good = original_record(7)
    folder = write_original_folder(tmp_path, {"easy": [good]})
    (folder / "easy.json").write_text(json.dumps([good, record]), encoding="utf-8")
    write_bad_images(folder)
    with pytest.raises(InputError) as caught:
        load_preferences(original_config(folder), "train")
    (line,) = problems_of(caught.value)
    assert line.startswith(f"{folder / 'easy.json'}:2 {message}")


def test_all_bad_records_are_listed_in_one_error(tmp_path: Path) -> None:
    kept = [n for n in BAD_RECORDS if n not in ("no object", "lone surrogate", "turn without text")]
    records = [BAD_RECORDS[n][0] | {"id": i} for i, n in enumerate(kept)]
    repeated = original_record(0, image=...)
    folder = write_original_folder(
        tmp_path, {"easy": [original_record(99)], "hardq": [original_record(98)]}
    )
    (folder / "easy.json").write_text(json.dumps(records), encoding="utf-8")
    (folder / "hardq.json").write_text(json.dumps([repeated]), encoding="utf-8")
    write_bad_images(folder)
    with pytest.raises(InputError) as caught:
        load_preferences(original_config(folder), "train")
    lines = problems_of(caught.value)
    expected = {f"{folder / 'easy.json'}:{i} {BAD_RECORDS[n][1]}" for i, n in enumerate(kept, 1)}
    expected.add(f"{folder / 'hardq.json'}:1 id: 0 repeats {folder / 'easy.json'}:1")
    assert len(lines) == len(expected)
    for beginning in expected:
        assert sum(line.startswith(beginning) for line in lines) == 1, beginning


@pytest.mark.parametrize(
    "content",
    [b"", b"[{]", b"{'id': 1}", b"\xff\xfe[\x00", b"[1, 2", b"{}", b"null"],
    ids=["empty", "torn", "quotes", "utf-16", "half", "object", "null"],
)
def test_a_list_that_is_no_list_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    folder = write_original_folder(tmp_path, {"easy": [original_record()]})
    (folder / "easy.json").write_bytes(content)
    with pytest.raises(InputError, match=r"easy.json: (not JSON|expected a list)"):
        load_preferences(original_config(folder), "train")


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"easy": 5}', '{"easy": "gone.json"}', '{"easy": "../easy.json"}',
     '{"easy": "/etc/passwd"}'],
)  # fmt: skip
def test_a_bad_keyword_map_is_an_input_error(tmp_path: Path, content: str) -> None:
    folder = write_original_folder(tmp_path / "set", {"easy": [original_record()]})
    (tmp_path / "easy.json").write_text("[]", encoding="utf-8")
    (folder / "config_train.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="config_train.json: "):
        load_preferences(original_config(folder), "train")


def test_missing_map_and_empty_lists_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing keyword map"):
        load_preferences(original_config(tmp_path), "train")
    folder = write_original_folder(tmp_path / "set", {"easy": []})
    with pytest.raises(InputError, match="no records"):
        load_preferences(original_config(folder), "train")


def test_a_long_list_of_problems_is_cut_but_counted(tmp_path: Path) -> None:
    records = [original_record(i, chosen="", image=...) for i in range(70)]
    folder = write_original_folder(tmp_path, {"easy": records})
    with pytest.raises(InputError, match="70 problems") as caught:
        load_preferences(original_config(folder), "train")
    lines = problems_of(caught.value)
    assert len(lines) == 51 and lines[-1] == "... and 20 more"


# --- looking at a set ---------------------------------------------------------------------------


def test_check_describes_each_layout(converted: Path) -> None:
    mini = check.check("mini")
    assert mini["source"] == "mini"
    assert (mini["shared_images"], mini["shared_prompts"]) == (0, 0)
    train = mini["splits"]["train"]
    assert (train["rows"], train["images"], train["duplicates"]) == (3180, 1060, 0)
    assert sum(train["class1"].values()) == 3180
    original = check.check(str(converted))
    assert original["source"] == "original"
    assert original["splits"]["train"] == train


def test_check_sees_shared_pictures_and_duplicates(tmp_path: Path) -> None:
    classes = {"class1": "", "class2": "", "class3": ""}
    rows = [HUB_ROW, HUB_ROW, HUB_ROW | {"image": png((1, 1, 1)), "question": "Other?"}]
    folder = write_hub_folder(tmp_path, rows, [HUB_ROW | classes])
    report = check.check(str(folder))
    assert report["splits"]["train"]["duplicates"] == 1
    assert (report["shared_images"], report["shared_prompts"]) == (1, 1)


def test_the_data_hash_sees_every_change() -> None:
    rows = [r for r in mini_rows().select(range(6))]
    changes = [
        lambda r: r[2].update(prompt=r[2]["prompt"] + " "),
        lambda r: r[2].update(chosen=r[2]["rejected"], rejected=r[2]["chosen"]),
        lambda r: r[0]["image"].update(bytes=r[0]["image"]["bytes"][:-1] + b"\0"),
        lambda r: r.reverse(),
        lambda r: r.pop(),
        lambda r: r[1].update(class3="hate"),
    ]
    digests = [explore.data_sha256(Dataset.from_list(rows))]
    assert explore.data_sha256(mini_rows().select(range(6))) == digests[0]
    for change in changes:
        copy = [r | {"image": dict(r["image"])} for r in rows]
        change(copy)
        digests.append(explore.data_sha256(Dataset.from_list(copy)))
    assert len(set(digests)) == 7


@pytest.mark.parametrize(
    ("name", "rows", "changes", "refused"),
    [
        ("train", 93_258, {}, False), ("train", 93_257, {}, True), ("validation", 7_000, {}, False),
        ("validation", 6_999, {}, True), ("harm", 265, {}, False), ("help", 264, {}, True),
        ("train", 10, {"path": "org/other"}, False), ("train", 10, {"revision": "main"}, False),
        ("train", 93_000, {"on_bad_rows": "skip"}, False), ("more", 3, {}, False),
    ],
)  # fmt: skip
def test_the_real_set_is_whole_or_refused(
    name: str, rows: int, changes: dict, refused: bool
) -> None:
    config = dataclasses.replace(load_config("colab").data, **changes)
    if not refused:
        check_whole(config, name, rows)
        return
    with pytest.raises(InputError, match=rf"{name}: .* rows, but this revision has"):
        check_whole(config, name, rows)


def test_rows_of_the_real_set_are_counted_when_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hub_folder(tmp_path, hub_rows("train", 3), hub_rows("validation", 2))
    prompts = [HUB_ROW | {"class1": "", "class2": "", "class3": ""}] * 4
    write_parquet(tmp_path / "test/harm-00000-of-00001.parquet", prompts)
    config = hub_config(tmp_path, train_rows=1, validation_rows=1, test_rows=1)
    reads = {
        "train": lambda: load_preferences(config, "train"),
        "validation": lambda: load_preferences(config, "validation"),
        "harm": lambda: load_prompts(config, "harm"),
    }
    counts = {"train": 3, "validation": 2, "harm": 4}
    monkeypatch.setattr(load, "SPA_VL", (str(tmp_path), ""))
    for name, read in reads.items():
        monkeypatch.setattr(load, "SPA_VL_ROWS", counts)
        assert len(read()) == 1
        monkeypatch.setattr(load, "SPA_VL_ROWS", counts | {name: counts[name] + 1})
        with pytest.raises(InputError, match=rf"{name}: {counts[name]} rows, but this revision"):
            read()


def test_leakage_counts_what_is_shared() -> None:
    train, held_out = mini_rows().select(range(30)), mini_rows("validation").select(range(6))

    def leakage(sets: dict) -> dict:
        return explore.shared({name: explore.set_keys(rows) for name, rows in sets.items()})

    clean = leakage({"train": train, "held_out": held_out})
    assert clean == {"held_out": {"images": 0, "prompts": 0}}
    leaked = mini_rows().select(range(27, 33))  # 3 rows of one image inside, 3 outside
    assert leakage({"train": train, "leaked": leaked}) == {
        "leaked": {"images": 1, "prompts": len(set(train["prompt"]) & set(leaked["prompt"]))}
    }


def test_leakage_is_looked_for_between_every_two_sets() -> None:
    rows, starts = mini_rows("validation"), {"a": 0, "b": 3, "c": 9}
    part = {name: rows.select(range(start, start + 6)) for name, start in starts.items()}
    keys = {n: explore.set_keys(rows) for n, rows in part.items()}
    found = explore.shared_between({"train": keys["a"]} | keys)
    assert set(found) == {"a and b", "a and c", "b and c"}
    assert found["a and b"]["images"] == len(keys["a"][0] & keys["b"][0]) > 0
    assert found["a and c"]["images"] == 0


@pytest.mark.parametrize(
    ("values", "median", "p95"),
    [([], 0, 0), ([7], 7, 7), ([4, 1], 2.5, 4), ([3, 1, 2], 2, 3), ([*range(1, 101)], 50.5, 95),
     ([*range(1, 21)], 10.5, 19)],
)  # fmt: skip
def test_medians_and_percentiles_are_what_they_say(values: list, median: float, p95: int) -> None:
    summary = explore.summary_of(values)
    assert (summary["median"], summary["p95"]) == (median, p95)


def test_the_data_stage_counts_and_finds_no_leak(tmp_path: Path) -> None:
    config = smoke(run_name="r")
    stage = Run(config, root=tmp_path).stage("data")
    summary = explore.make_data_stage(config, stage)
    assert (summary["train"]["rows"], summary["validation"]["rows"]) == (64, 32)
    assert summary["evaluation_sets"] == {"harm": 24, "help": 24, "look_alikes": 24, "twins": 24}
    assert summary["shared_with_train"] == {
        name: {"images": 0, "prompts": 0}
        for name in ("validation", "harm", "help", "look_alikes", "twins")
    }
    assert len(summary["shared_between"]) == 10
    for name in ("harm", "help", "look_alikes", "twins"):
        assert summary["shared_between"][f"validation and {name}"] == {"images": 0, "prompts": 0}
    train = load_preferences(config.data, "train")
    assert summary["train"]["sha256"] == explore.data_sha256(train)
    assert sum(summary["train"]["class1"].values()) == 64
    words = [len(c.split()) for c in train["chosen"]]
    assert summary["train"]["chosen_words"]["max"] == max(words)
    assert summary["train"]["chosen_words"]["mean"] == pytest.approx(sum(words) / 64, abs=0.01)
    before = files_of(stage.path)
    assert explore.make_data_stage(config, stage) == summary == stage.summary
    assert files_of(stage.path) == before
    with pytest.raises(InputError, match="data.train_rows: 64 -> 65"):
        other = smoke({"data.train_rows": 65}, run_name="r")
        explore.make_data_stage(other, Run(other, root=tmp_path).stage("data"))


def test_files_that_were_good_are_read_anew_after_they_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    find = hub.find_problems
    monkeypatch.setattr(
        hub, "find_problems", lambda *a, **k: looked.append("looked") or find(*a, **k)
    )
    rows = hub_rows("train", 4)
    config = hub_config(write_hub_folder(tmp_path, rows))
    first = load_preferences(config, "train")
    assert load_preferences(config, "train").to_dict() == first.to_dict() and len(looked) == 1
    write_hub_folder(tmp_path, [rows[0] | {"chosen": ""}, *rows[1:]])
    for _ in range(2):  # what is bad is never taken for good
        with pytest.raises(InputError, match="chosen: empty"):
            load_preferences(config, "train")
    # An image in a file of its own may change without the table.
    (tmp_path / "photo.png").write_bytes(png())
    write_hub_folder(
        tmp_path, [row | {"image": {"bytes": None, "path": "photo.png"}} for row in rows]
    )
    load_preferences(config, "train")
    (tmp_path / "photo.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="image"):
        load_preferences(config, "train")

"""Between the layouts and back: every field and every byte of every picture."""

import hashlib
import json
from pathlib import Path

import pytest
from datasets import Dataset

from benchmarks.synthetic_spavl import write
from spavl_lib.data import check
from spavl_lib.data.convert import convert
from spavl_lib.data.embedded.mini_files import mini_folder
from spavl_lib.data.load import load_preferences, load_prompts
from spavl_lib.data.schema import TURN
from spavl_lib.data.taxonomy import PARENTS
from tests.helpers import (
    files_of,
    hub_config,
    original_record,
    png,
    write_hub_folder,
    write_original_folder,
)

CLASSES = {"class1": "", "class2": "", "class3": ""}


def fields(rows: Dataset) -> list[tuple]:
    """Every field of every row in order, a picture as its bytes' hash."""
    found = []
    for row in rows:
        cell = row.pop("image")
        content = b"" if cell is None else cell["bytes"] or Path(cell["path"]).read_bytes()
        digest = hashlib.sha256(content).hexdigest() if cell else None
        found.append((digest, *sorted(row.items())))
    return found


def there_and_back(source: Path | str, tmp_path: Path) -> Path:
    convert(str(source), tmp_path / "original")
    convert(str(tmp_path / "original"), tmp_path / "hub")
    return tmp_path / "hub"


@pytest.mark.slow
def test_mini_comes_back_equal_in_every_field_and_byte(tmp_path: Path) -> None:
    back = there_and_back("mini", tmp_path)
    for split in ("train", "validation"):
        own = load_preferences(hub_config(mini_folder()), split)
        assert fields(load_preferences(hub_config(back), split)) == fields(own)
    for name in ("harm", "help", "look_alikes", "twins"):
        own = load_prompts(hub_config(mini_folder()), name)
        assert fields(load_prompts(hub_config(back), name)) == fields(own)


def test_a_thousand_rows_of_the_synthetic_set_come_back_equal(tmp_path: Path) -> None:
    assert write(tmp_path / "in", 334) == 1002
    back = there_and_back(tmp_path / "in", tmp_path)
    own = load_preferences(hub_config(tmp_path / "in"), "train")
    assert fields(load_preferences(hub_config(back), "train")) == fields(own)
    assert len({f[0] for f in fields(own)}) == 334 and all(
        dict(f[1:])["class3"] for f in fields(own)
    )


def row(number: int = 0, **changes: object) -> dict:
    base = {"image": png((number, 0, 0)), "question": f"Q {number}?", "chosen": f"Yes {number}.",
            "rejected": "No.", "image_name": f"{number}.png"}  # fmt: skip
    return base | changes


AWKWARD = {
    "one name, three pictures": [row(n, image_name="a.png") for n in range(3)],
    "one picture, two names": [row(1, image_name=f"{n}.png", question=f"Q{n}?") for n in range(2)],
    "text only": [row(0), row(1, image=None, image_name="")],
    "no name": [row(0, image_name=""), row(1, image_name="")],
    "text only with a name": [row(0), row(1, image=None, image_name="gone.png")],
    "spaces, quotes, lines": [row(0, chosen="  two\n\nlines\t'\"\\ "), row(1, question="é日🔥 ?")],
    "mark in the question": [row(0, question="<image>\nWhat?")],
    "odd names": [row(0, image_name="a b%20é.png"), row(1, image_name="same_name_0")],
    "twice the same row": [row(0), row(0)],
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_rows_come_back(tmp_path: Path, name: str) -> None:
    train = AWKWARD[name]
    validation = [{k: v for k, v in r.items() if k != "image_name"} | CLASSES for r in train]
    source = write_hub_folder(tmp_path / "in", train, validation)
    back = there_and_back(source, tmp_path)
    for split in ("train", "validation"):
        own = load_preferences(hub_config(source), split)
        assert fields(load_preferences(hub_config(back), split)) == fields(own)


def test_pictures_of_one_name_in_several_classes_keep_their_class(tmp_path: Path) -> None:
    """As in the original's folders, where every class may have its own 170.jpg."""
    kinds = ("theft", "hate", "cyber")
    records = [
        original_record(n, image="/".join([*PARENTS[c], c, "170.jpg"])) for n, c in enumerate(kinds)
    ]
    source = write_original_folder(tmp_path / "in", {"easy": records})
    (source / "config_test.json").unlink()
    convert(str(source), tmp_path / "hub")
    rows = load_preferences(hub_config(tmp_path / "hub"), "train")
    assert list(rows["class3"]) == list(kinds) and set(rows["image_name"]) == {"170.jpg"}
    assert list(rows["question_type"]) == ["easy"] * 3


@pytest.mark.slow
def test_the_originals_layout_comes_back_file_by_file(tmp_path: Path) -> None:
    convert("mini", tmp_path / "original")
    convert(str(tmp_path / "original"), tmp_path / "hub")
    convert(str(tmp_path / "hub"), tmp_path / "again")
    assert files_of(tmp_path / "original") == files_of(tmp_path / "again")


def test_turns_odd_ids_and_missing_pictures_come_back_file_by_file(tmp_path: Path) -> None:
    turns = [{"from": "Human", "value": "One?"}, {"from": "Assistant", "value": "1."},
             {"from": "Human", "value": "Two?"}]  # fmt: skip
    records = [
        original_record(7, question=turns),
        original_record(3, image=...),
        original_record("x", image=...),
    ]
    source = write_original_folder(
        tmp_path / "in", {"easy": records, "hardd": [original_record(1)]}
    )
    (source / "config_test.json").unlink()
    convert(str(source), tmp_path / "hub")
    rows = load_preferences(hub_config(tmp_path / "hub"), "train")
    assert [r["id"] for r in rows] == ["7", "3", "x", "1"]
    assert rows[0]["prompt"] == TURN.join(["One?", "1.", "Two?"])
    convert(str(tmp_path / "hub"), tmp_path / "again")
    again = json.loads((tmp_path / "again/train_easy.json").read_text(encoding="utf-8"))
    assert again == records
    assert list(load_preferences(hub_config(tmp_path / "hub"), "train")["question_type"]) == [
        "easy", "easy", "easy", "hards",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "ids",
    [("1", "x", "y"), ("a/0", "a/1", "a/2"), ("1", "01", "0"), ("\u0661", "1", "2"),
     ("train/1", "train/0", "1")],
    ids=str,
)  # fmt: skip
def test_ids_of_ones_own_come_back_and_stay_apart(tmp_path: Path, ids: tuple[str, ...]) -> None:
    records = [original_record(i, image=...) for i in ids]
    source = write_original_folder(tmp_path / "in", {"easy": records})
    (source / "config_test.json").unlink()
    convert(str(source), tmp_path / "hub")
    convert(str(tmp_path / "hub"), tmp_path / "again")
    for folder in (tmp_path / "hub", tmp_path / "again"):
        report = check.check(str(folder))
        assert not report["problems"]
    assert list(load_preferences(hub_config(tmp_path / "hub"), "train")["id"]) == list(ids)
    again = json.loads((tmp_path / "again/train_easy.json").read_text(encoding="utf-8"))
    assert [str(record["id"]) for record in again] == list(ids)

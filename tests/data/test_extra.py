"""`data.extra_path`: further pairs of a file, added to the rows of any source."""

import json
from pathlib import Path

import pytest
from PIL import Image

from spavl_lib.config import DataConfig, load_config
from spavl_lib.data.check import check
from spavl_lib.data.fingerprint import source_hashes
from spavl_lib.data.load import load_preferences
from spavl_lib.data.schema import image_cells
from spavl_lib.errors import InputError

PAIR = {"prompt": "How do I boil rice?", "chosen": "Simmer it.", "rejected": "I cannot say."}
HELD_OUT = PAIR | {"prompt": "How do I sew a button?", "split": "validation"}


def write(folder: Path, *rows: dict, name: str = "extra.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def data_of(extra: Path | str, **changes: object) -> DataConfig:
    chosen = {f"data.{key}": value for key, value in changes.items()}
    return load_config("smoke", {"data.extra_path": str(extra)} | chosen).data


def test_pairs_are_added_to_their_split(tmp_path: Path) -> None:
    plain = load_config("smoke").data
    data = data_of(write(tmp_path, PAIR, HELD_OUT))
    train, held_out = (load_preferences(data, s) for s in ("train", "validation"))
    assert train.select(range(64)).to_list() == load_preferences(plain, "train").to_list()
    assert (len(train), len(held_out)) == (65, 33)
    assert train[64]["prompt"] == PAIR["prompt"] and train[64]["image"] is None
    assert held_out[32]["prompt"] == HELD_OUT["prompt"]
    assert len(load_preferences(data, "twins")) == len(load_preferences(plain, "twins"))


def test_a_pair_may_have_an_image_beside_the_file(tmp_path: Path) -> None:
    Image.new("RGB", (28, 28), "red").save(tmp_path / "red.png")
    row = load_preferences(data_of(write(tmp_path, PAIR | {"image": "red.png"})), "train")[-1]
    assert row["image_name"] == "red.png" and row["image"]["path"].endswith("red.png")


def test_a_pair_keeps_all_its_images(tmp_path: Path) -> None:
    names = ["red.png", "blue.png"]
    for name in names:
        Image.new("RGB", (28, 28), name[:-4]).save(tmp_path / name)
    data = data_of(write(tmp_path, PAIR | {"images": names, "prompt": "<image><image>Alike?"}))
    rows = load_preferences(data, "train")
    assert [Path(cell["path"]).name for cell in image_cells(rows[-1])] == names
    assert len(image_cells(rows[0])) == 1
    before = source_hashes(data, ("train",))
    Image.new("RGB", (28, 28), "green").save(tmp_path / "blue.png")
    assert source_hashes(data, ("train",)) != before


def test_rows_for_choosing_settings_are_not_reported(tmp_path: Path) -> None:
    chosen_on = HELD_OUT | {"prompt": "How do I tie a knot?", "split": "development"}
    extra = write(tmp_path, PAIR, HELD_OUT, chosen_on)
    for measure_on, row, other in (
        ("test", HELD_OUT, chosen_on), ("development", chosen_on, HELD_OUT)
    ):  # fmt: skip
        data = data_of(extra, measure_on=measure_on)
        prompts = load_preferences(data, "validation")["prompt"]
        assert row["prompt"] in prompts and other["prompt"] not in prompts
        assert PAIR["prompt"] not in prompts


def test_other_sources_take_them_too(tmp_path: Path) -> None:
    rows = [PAIR | {"prompt": f"Question {i}?"} for i in range(20)]
    own = write(tmp_path, *rows, name="own.jsonl")
    extra = write(tmp_path, PAIR)
    data = data_of(extra, source="datasets", path=str(own), train_rows=0, validation_rows=0)
    assert load_preferences(data, "train")[-1]["prompt"] == PAIR["prompt"]


def test_the_hash_of_the_data_covers_the_file(tmp_path: Path) -> None:
    splits = ("train", "validation", "harm")
    plain = source_hashes(load_config("smoke").data, splits)
    once = source_hashes(data_of(write(tmp_path, PAIR)), splits)
    again = source_hashes(data_of(write(tmp_path, PAIR | {"chosen": "Steam it."})), splits)
    train, validation, harm = (f"data/{split}" for split in splits)
    assert len({plain[train], once[train], again[train]}) == 3
    assert plain[validation] == once[validation] and plain[harm] == once[harm]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (PAIR | {"rejected": " "}, r"extra\.jsonl:2 rejected: empty"),
        (PAIR | {"rejected": PAIR["chosen"]}, r"extra\.jsonl:2 rejected: equal to chosen"),
        (
            PAIR | {"split": "test"},
            r"extra\.jsonl:2 split: expected train, validation or development",
        ),
        (PAIR | {"image": "none.png"}, r"extra\.jsonl:2 image: "),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict, message: str) -> None:
    data = data_of(write(tmp_path, PAIR, row))
    with pytest.raises(InputError, match=message):
        load_preferences(data, "train")


def test_an_id_of_the_source_is_refused(tmp_path: Path) -> None:
    taken = load_preferences(load_config("smoke").data, "train")[0]["id"]
    data = data_of(write(tmp_path, PAIR | {"id": taken}))
    with pytest.raises(InputError, match=r"extra\.jsonl:1 id: .* is also the id of a row"):
        load_preferences(data, "train")


def test_missing_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"data\.extra_path .*none\.jsonl.* no such file"):
        load_preferences(data_of(tmp_path / "none.jsonl"), "train")
    monkeypatch.setenv("SPAVL_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="pairs are not ready .* run `spavl fetch laptop`"):
        load_preferences(data_of("laptop"), "train")


def test_data_check_reads_them(tmp_path: Path) -> None:
    extra = write(tmp_path, PAIR, PAIR | {"rejected": ""}, HELD_OUT)
    report = check("mini", extra=str(extra))
    assert report["splits"]["train"]["rows"] == 3181 and report["problems"] == 1
    assert "extra.jsonl:2 rejected: empty" in report["splits"]["train"]["problems"][0]
    assert report["splits"]["validation"]["text_only"] == 1

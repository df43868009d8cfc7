"""One's own data: known layouts as they are, a mapping for the rest; and the Hub's cache."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value

from spavl_lib.config import ColumnsConfig, DataConfig
from spavl_lib.data.load import load_preferences
from spavl_lib.data.schema import TURN
from spavl_lib.data.sources import hub
from spavl_lib.errors import InputError
from tests.helpers import hub_config, hub_rows, png, problems_of, write_hub_folder

ALL = {"train_rows": 0, "validation_rows": 0, "test_rows": 0}
ASK, SAY = {"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}
PARTS = [{"type": "image"}, {"type": "text", "text": "What?"}]
LAYOUTS = {
    "trl text": {"prompt": "What?", "chosen": "Yes.", "rejected": "No.", "image": "a.png"},
    "trl messages": {
        "prompt": [{"role": "user", "content": "What?"}],
        "chosen": [{"role": "assistant", "content": "Yes."}],
        "rejected": [{"role": "assistant", "content": "No."}], "images": ["a.png"],
    },
    "trl parts": {
        "prompt": [{"role": "user", "content": PARTS}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "No."}]}],
        "images": ["a.png"],
    },
    "trl implicit": {
        "chosen": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Yes."}],
        "rejected": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "No."}],
        "images": ["a.png"],
    },
    "llama-factory sharegpt": {
        "conversations": [ASK], "chosen": SAY | {"value": "Yes."},
        "rejected": SAY | {"value": "No."}, "images": ["a.png"],
    },
    "llama-factory alpaca": {
        "instruction": "<image>What?", "input": "", "chosen": "Yes.", "rejected": "No.",
        "images": ["a.png"],
    },
    "the original's": {"id": 4, "question": "What?", "chosen": "Yes.", "rejected": "No.",
                       "image": "a.png"},
}  # fmt: skip


def own(path: Path | str, **changes: object) -> DataConfig:
    return DataConfig(source="datasets", path=str(path), **ALL | changes)


def write(folder: Path, records: list, name: str = "train.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.png").write_bytes(png())
    text = json.dumps(records) if name.endswith(".json") else "\n".join(map(json.dumps, records))
    (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("file", ["train.json", "train.jsonl"])
def test_known_layouts_are_recognised(tmp_path: Path, name: str, file: str) -> None:
    folder = write(tmp_path, [LAYOUTS[name]], file)
    for path in (folder, folder / file):
        [row] = load_preferences(own(path), "train")
        assert (row["prompt"], row["chosen"], row["rejected"]) == ("What?", "Yes.", "No.")
        assert row["image"]["path"] == str(folder / "a.png") and row["image_name"] == "a.png"


def test_several_turns_and_text_only(tmp_path: Path) -> None:
    talk = {"conversations": [ASK, SAY, {"from": "human", "value": "And?"}],
            "chosen": SAY | {"value": "Yes."}, "rejected": SAY | {"value": "No."},
            "images": ["a.png"]}  # fmt: skip
    text = {"instruction": "Why", "input": "this?", "history": [["Hi", "Hello"]],
            "chosen": "Yes.", "rejected": "No."}  # fmt: skip
    write(tmp_path, [LAYOUTS["trl text"]], "validation.json")
    rows = load_preferences(own(write(tmp_path, [talk, text])), "train")
    assert rows[0]["prompt"].split(TURN) == ["What?", "A cat.", "And?"]
    assert rows[1]["prompt"].split(TURN) == ["Hi", "Hello", "Why\nthis?"]
    assert rows[1]["image"] is None


def test_a_mapping_names_any_columns(tmp_path: Path) -> None:
    record = {"ask": "What?", "good": "Yes.", "bad": "No.", "pic": "a.png", "key": "k7",
              "label": "theft", "kind": "hardq"}  # fmt: skip
    columns = ColumnsConfig(prompt="ask", chosen="good", rejected="bad", image="pic", id="key",
                            class3="label", question_type="kind")  # fmt: skip
    folder = write(tmp_path, [record])
    [row] = load_preferences(own(folder, columns=columns), "train")
    assert (row["id"], row["class1"], row["question_type"]) == ("k7", "Malicious Use", "hardq")
    with pytest.raises(InputError, match=r"prompt: missing \(column 'question2'\)"):
        load_preferences(own(folder, columns=ColumnsConfig(prompt="question2", chosen="good",
                                                           rejected="bad")), "train")  # fmt: skip


@pytest.mark.parametrize("saved", ["parquet", "disk", "dict"])
@pytest.mark.parametrize("column", ["image", "images"])
def test_pictures_carried_by_the_data_keep_their_bytes(
    tmp_path: Path, saved: str, column: str
) -> None:
    cells = [{"bytes": png((n, 0, 0)), "path": None} for n in range(3)]
    kind = Image(decode=False)
    rows = Dataset.from_dict(
        {
            "id": ["0", "1", "2"], "prompt": [f"Q{n}?" for n in range(3)], "chosen": ["Yes."] * 3,
            "rejected": ["No."] * 3,
            column: cells if column == "image" else [[cells[0]], [], [cells[2]]],
        },
        features=Features(
            {c: Value("string") for c in ("id", "prompt", "chosen", "rejected")}
            | {column: kind if column == "image" else List(kind)}
        ),
    )  # fmt: skip
    path = tmp_path / "x.parquet"
    if saved == "parquet":
        rows.to_parquet(path)
    else:
        path = tmp_path / "saved"
        (rows if saved == "disk" else DatasetDict({"train": rows})).save_to_disk(path)
    sets = [load_preferences(own(path), split) for split in ("train", "validation")]
    found = {r["id"]: r["image"] and r["image"]["bytes"] for rows in sets for r in rows}
    middle = None if column == "images" else cells[1]["bytes"]
    assert found == {"0": cells[0]["bytes"], "1": middle, "2": cells[2]["bytes"]}
    assert [len(rows) for rows in sets] == [2, 1]


def test_a_carried_path_opens_no_file_outside_the_root(tmp_path: Path) -> None:
    outside, folder = tmp_path / "private.png", tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    for path in (outside, folder / "images/a.png"):
        path.write_bytes(png())
    cells = [{"bytes": None, "path": str(p)} for p in (folder / "images/a.png", outside)]
    cells.append({"bytes": png((5, 5, 5)), "path": None})
    texts = {c: [f"{c} {n}" for n in range(3)] for c in ("prompt", "chosen", "rejected")}
    kinds = {c: Value("string") for c in texts} | {"image": Image(decode=False)}
    rows = Dataset.from_dict(texts | {"image": cells}, features=Features(kinds))
    pq.write_table(rows.data.table, folder / "train.parquet")
    with pytest.raises(InputError) as caught:
        load_preferences(own(folder / "train.parquet"), "train")
    [line] = problems_of(caught.value)
    assert f"train.parquet:2 image: image path '{outside}' must be relative to" in line


BAD = {
    "system": ({"prompt": [{"role": "system", "content": "Be mad."},
                           {"role": "user", "content": "Q?"}]}, "a system turn"),
    "fewer marks": ({"prompt": "<image>Q?", "image": None, "images": ["a.png", "a.png"]},
                    "1 <image> in the text, and 2 images"),
    "marks without a picture": ({"prompt": "<image>Q?", "image": None}, "1 <image> in the text"),
    "two marks": ({"prompt": "<image><image>Q?"}, "2 <image> in the text, and 1 images"),
    "nobody asks": ({"prompt": [{"role": "assistant", "content": "Hm."}]}, "turn 1 is the assist"),
    "unknown speaker": ({"prompt": [{"role": "tool", "content": "x"}]}, "unknown speaker 'tool'"),
    "answers apart": ({"prompt": None, "chosen": "a", "rejected": "b"}, "prompt: missing, and the"),
    "no answer": ({"chosen": None}, "chosen: missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_understood_is_named_by_file_and_row(tmp_path: Path, name: str) -> None:
    change, says = BAD[name]
    folder = write(tmp_path, [LAYOUTS["trl text"], LAYOUTS["trl text"] | {"chosen": "B."} | change])
    with pytest.raises(InputError) as caught:
        load_preferences(own(folder), "train")
    lines = problems_of(caught.value)
    assert all(line.startswith(f"{folder / 'train.json'}:2 ") for line in lines)
    assert any(says in line for line in lines), lines


def test_held_out_pairs_are_a_split_of_their_own(tmp_path: Path) -> None:
    folder = write(tmp_path, [LAYOUTS["trl text"]])
    with pytest.raises(InputError, match="no held-out pairs: .* file validation.jsonl beside it"):
        load_preferences(own(folder / "train.json"), "validation")
    write(folder, [LAYOUTS["trl text"] | {"prompt": "Other?"}], "validation.json")
    for path in (folder, folder / "train.json"):
        [row] = load_preferences(own(path), "validation")
        assert row["prompt"] == "Other?" and row["id"] == "validation/0"


def test_nothing_to_open_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot open data.path"):
        load_preferences(own(tmp_path / "gone"), "train")
    with pytest.raises(InputError, match="no records"):
        load_preferences(own(write(tmp_path, [])), "train")


# --- the Hub --------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in the Hub's cache, as its client leaves it."""
    repo = tmp_path / "hub" / "datasets--someone--SPA-VL"
    snapshot = repo / "snapshots" / COMMIT
    write_hub_folder(snapshot, [dict(r) for r in hub_rows("train", 4)])
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE",
                        str(tmp_path / "hub"), raising=False)  # fmt: skip
    return snapshot


@pytest.mark.parametrize("revision", ["", "main", COMMIT])
def test_a_cached_revision_is_read_without_a_network(cached: Path, revision: str) -> None:
    config = hub_config(Path("someone/SPA-VL"), revision=revision)
    assert len(load_preferences(config, "train")) == 4
    assert hub.fetch("someone/SPA-VL", revision, answers=False) == cached


def test_what_is_not_cached_says_how_to_get_it(cached: Path) -> None:
    for name, revision in (("someone/SPA-VL", "f" * 40), ("someone/other", "")):
        with pytest.raises(InputError, match=f"hf download {name} --repo-type dataset"):
            load_preferences(hub_config(Path(name), revision=revision), "train")

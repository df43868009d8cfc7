"""The doors for other people's data: every form of an image, literal paths, rows held out."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pictures

from spavl_lib.config import ColumnsConfig, DataConfig
from spavl_lib.data.check import check, table
from spavl_lib.data.fingerprint import row_digests, source_sha256
from spavl_lib.data.images import ImageError, image_cell
from spavl_lib.data.load import (
    eval_sets,
    load_pair_truth,
    load_preferences,
    load_prompts,
    load_truth,
    prompt_origin,
    read_preferences,
)
from spavl_lib.errors import InputError
from tests.helpers import (
    MINI,
    hub_config,
    original_config,
    original_record,
    png,
    problems_of,
    smoke,
    write_original_folder,
)

ALL = {"train_rows": 0, "validation_rows": 0, "test_rows": 0}
ROW = {"prompt": "What?", "chosen": "Yes.", "rejected": "No."}


def own(path: Path | str, **changes: object) -> DataConfig:
    return DataConfig(source="datasets", path=str(path), **ALL | changes)


def lines(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def pictures(folder: Path, count: int) -> list[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    contents = [png((n, 40, 40)) for n in range(count)]
    for n, content in enumerate(contents):
        (folder / f"{n}.png").write_bytes(content)
    return contents


def rows_of(count: int, **cells: Callable[[int], object]) -> list[dict]:
    texts = {"id": "r{}", "prompt": "Q{}?", "chosen": "Yes {}.", "rejected": "No {}."}
    return [
        {key: text.format(n) for key, text in texts.items()} | {k: f(n) for k, f in cells.items()}
        for n in range(count)
    ]


def content(cell: dict) -> bytes:
    return cell["bytes"] or Path(cell["path"]).read_bytes()


def both(config: DataConfig) -> tuple[list[dict], list[dict]]:
    train, held = (list(load_preferences(config, name)) for name in ("train", "validation"))
    return train, held


# --- every form of an image, at every door ------------------------------------------------------


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


FORMS: dict[str, Callable[[int, bytes], object]] = {
    "path": lambda n, data: f"{n}.png",
    "bytes": lambda n, data: data,
    "struct": lambda n, data: {"bytes": data, "path": f"{n}.png"},
    "struct without a name": lambda n, data: {"bytes": data, "path": None},
    "struct of a path": lambda n, data: {"bytes": None, "path": f"{n}.png"},
    "base64": lambda n, data: text(data),
    "data URI": lambda n, data: f"data:image/png;base64,{text(data)}",
}


def write_rows(path: Path, records: list[dict]) -> Path:
    """Rows as a program without this library's features writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".arrow":
        rows = pa.Table.from_pylist(records)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
            writer.write_table(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8")
    elif path.suffix == ".csv":
        keys = list(records[0])
        cells = ["\t".join(keys), *("\t".join(str(r[k]) for k in keys) for r in records)]
        path.write_text("\n".join(cells).replace("\t", ","), encoding="utf-8")
    else:
        lines(path, records)
    return path


def at_the_own_door(folder: Path, records: list[dict], kind: str) -> list[dict]:
    config = own(write_rows(folder / f"pairs.{kind}", records))
    return sorted(sum(both(config), []), key=lambda row: row["id"])


def at_the_hubs_door(folder: Path, records: list[dict], kind: str) -> list[dict]:
    rows = [{"question": r["prompt"], "image_name": "", **r} for r in records]
    write_rows(folder / "data/train-00000-of-00001.parquet", rows)
    return list(load_preferences(hub_config(folder), "train"))


def at_the_originals_door(folder: Path, records: list[dict], kind: str) -> list[dict]:
    rows = [{"question": r["prompt"], **r} for r in records]
    write_original_folder(folder, {"easy": rows}, images=False)
    return list(load_preferences(original_config(folder), "train"))


def at_the_prompts_door(folder: Path, records: list[dict], kind: str) -> list[dict]:
    path = write_rows(folder / f"harm.{kind}", records)
    return list(load_prompts(DataConfig(source="mini", test_path=str(path), **ALL), "harm"))


DOORS = {
    "own": (at_the_own_door, ("parquet", "arrow", "jsonl", "json", "csv")),
    "hub": (at_the_hubs_door, ("parquet",)),
    "original": (at_the_originals_door, ("json",)),
    "prompts": (at_the_prompts_door, ("parquet", "jsonl")),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("door", "kind"), [(door, kind) for door, (_, kinds) in DOORS.items() for kind in kinds]
)
def test_every_door_takes_every_form_of_an_image(
    tmp_path: Path, form: str, door: str, kind: str
) -> None:
    contents = pictures(tmp_path, 3)
    records = rows_of(3, image=lambda n: FORMS[form](n, contents[n]))
    binary = isinstance(records[0]["image"], bytes) or (
        isinstance(records[0]["image"], dict) and records[0]["image"]["bytes"]
    )
    if kind in ("jsonl", "json") and binary:  # JSON has no bytes; a struct holds base64
        if isinstance(records[0]["image"], bytes):
            return
        for record in records:
            record["image"] = record["image"] | {"bytes": text(record["image"]["bytes"])}
    if kind == "csv" and not isinstance(records[0]["image"], str):
        return
    if kind == "csv" and form == "data URI":
        for record in records:
            record["image"] = f'"{record["image"]}"'
    found = DOORS[door][0](tmp_path, records, kind)
    assert [content(row["image"]) for row in found] == contents


def test_lists_of_one_image_and_pil_images() -> None:
    image = Pictures.new("RGB", (5, 4), (1, 2, 3))
    cell = image_cell(image, Path())
    assert Pictures.open(io.BytesIO(cell["bytes"])).size == (5, 4)
    for bad in (7, {"bytes": None, "path": None}, "data:image/png;base64,@@", "data:x,y", ""):
        with pytest.raises(ImageError):
            image_cell(bad, Path())


@pytest.mark.parametrize("many", [True, False])
def test_images_in_lists_without_features(tmp_path: Path, many: bool) -> None:
    contents = pictures(tmp_path, 3)
    for form in ("bytes", "struct"):
        records = rows_of(3, images=lambda n, form=form: [FORMS[form](n, contents[n])])
        records[1]["images"] *= 1 + many
        path = write_rows(tmp_path / f"{form}{many}.parquet", records)
        found = sorted(sum(both(own(path)), []), key=lambda row: row["id"])
        assert [content(row["image"]) for row in found] == contents
        more = [[content(cell) for cell in row.get("more_images", ())] for row in found]
        assert more == [[], [contents[1]] * many, []]


def test_an_absolute_path_must_lie_in_the_root(tmp_path: Path) -> None:
    pictures(tmp_path / "set", 2)
    (tmp_path / "outside.png").write_bytes(png())
    root = tmp_path / "set"
    assert image_cell(str(root / "1.png"), root)["path"] == str(root / "1.png")
    with pytest.raises(ImageError, match="must be relative to"):
        image_cell(str(tmp_path / "outside.png"), root)


# --- no picture is dropped without a word ---------------------------------------------------------


def part(**fields: object) -> list[dict]:
    return [{"role": "user", "content": [fields, {"type": "text", "text": "What?"}]}]


URI = f"data:image/png;base64,{text(png((7, 7, 7)))}"
# How others say where a row's picture is; the picture of each is found.
FOUND = {
    "image": {"image": "0.png"},
    "images": {"images": ["0.png"]},
    "images beside an empty image": {"image": None, "images": ["0.png"]},
    "image beside empty images": {"image": "0.png", "images": []},
    "both name one": {"image": "0.png", "images": ["0.png"]},
    "a part": {"prompt": part(type="image", image="0.png")},
    "a part with a path": {"prompt": part(type="image", path="0.png")},
    "a part of OpenAI": {"prompt": part(type="image_url", image_url={"url": URI})},
    "a part of OpenAI's responses": {"prompt": part(type="input_image", image_url=URI)},
    "a part of Anthropic": {
        "prompt": part(
            type="image",
            source={"type": "base64", "media_type": "image/png", "data": text(png((7, 7, 7)))},
        )
    },
    "a part without a type": {"prompt": part(image="0.png")},
    "a part and its column": {"prompt": part(type="image"), "images": ["0.png"]},
    "a part in the answers": {
        "prompt": None,
        "chosen": [*part(type="image", image="0.png"), {"role": "assistant", "content": "Yes."}],
        "rejected": [*part(type="image", image="0.png"), {"role": "assistant", "content": "No."}],
    },
    "a mark in both conversations": {
        "prompt": None, "image": "0.png",
        "chosen": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "Yes."}],
        "rejected": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "No."}],
    },
    "a mark in prompt and conversations": {
        "prompt": [{"from": "human", "value": "<image>What?"}], "image": "0.png",
        "chosen": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "Yes."}],
        "rejected": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "No."}],
    },
}  # fmt: skip
# A picture that the row names and does not get.
LOST = {
    **{
        f"column {name}": ({name: "0.png"}, f"column '{name}' names one; set data.columns.image=")
        for name in ("image_path", "img", "photo", "picture", "file_name", "pixel", "image_name")
    },
    "column of lists": ({"photos": ["0.png"]}, "column 'photos' names one"),
    "column of base64": ({"scan": text(png())}, "column 'scan' names one"),
    "column of a struct": ({"pic": {"path": "0.png"}}, "column 'pic' names one"),
    "upper case": ({"photo": "A.JPG"}, "column 'photo' names one"),
    "another picture beside": ({"image": "0.png", "mask": URI}, "several, in columns image, mask"),
    "two different": ({"image": "0.png", "images": ["1.png"]}, "several, in columns image, images"),
    "a place without a picture": ({"prompt": part(type="image")}, "1 <image> in the text, and 0"),
    "an empty part": ({"prompt": part(type="image", image=None)}, "1 <image> in the text, and 0"),
    "two parts": (
        {"prompt": [*part(type="image", image="0.png"), {"role": "assistant", "content": "A."},
                    *part(type="image", image="1.png")]}, "2 images in 2 turns; put all of"),
    "missing file": ({"prompt": part(type="image", image="gone.png")}, "missing image 'gone.png'"),
    "web address": (
        {"prompt": part(type="image_url", image_url="https://h/a.png")}, "must be relative to"),
    "a video": ({"prompt": part(type="video", video="a.mp4")}, "a part of type 'video'; only text"),
    "sound": ({"prompt": part(type="input_audio", input_audio={})}, "a part of type 'input_audio'"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_a_picture_is_found_wherever_the_row_has_it(tmp_path: Path, name: str) -> None:
    pictures(tmp_path, 1)
    path = lines(tmp_path / "pairs.jsonl", [ROW | FOUND[name]])
    [row] = load_preferences(own(path), "train")
    assert row["prompt"] == "What?"
    assert content(row["image"]) in (png((0, 40, 40)), png((7, 7, 7)))


@pytest.mark.parametrize("name", LOST)
def test_a_picture_that_is_not_found_is_an_error_of_its_row(tmp_path: Path, name: str) -> None:
    pictures(tmp_path, 2)
    change, says = LOST[name]
    path = lines(
        tmp_path / "pairs.jsonl", [ROW | {"prompt": "Other?", "image": "1.png"}, ROW | change]
    )
    with pytest.raises(InputError) as caught:
        load_preferences(own(path), "train")
    found = problems_of(caught.value)
    assert all(line.startswith(f"{path}:2 ") for line in found) and any(says in x for x in found)


@pytest.mark.parametrize("name", ["image_path", "photo", "pixel_values"])
def test_a_column_of_images_under_another_name_is_an_error(tmp_path: Path, name: str) -> None:
    cells = [{"bytes": png((n, 0, 0)), "path": None} for n in range(2)]
    texts = {key: [f"{key} {n}" for n in range(2)] for key in ("prompt", "chosen", "rejected")}
    kinds = {key: Value("string") for key in texts} | {name: Image(decode=False)}
    Dataset.from_dict(texts | {name: cells}, features=Features(kinds)).to_parquet(
        tmp_path / "p.parquet"
    )
    with pytest.raises(InputError, match=f"column '{name}' names one"):
        load_preferences(own(tmp_path / "p.parquet"), "train")
    columns = ColumnsConfig(image=name)
    train, held = both(own(tmp_path / "p.parquet", columns=columns))
    assert [content(r["image"]) for r in sorted(train + held, key=lambda r: r["prompt"])] == [
        cell["bytes"] for cell in cells
    ]


@pytest.mark.parametrize("field", ["image", "image_name", "id", "class3", "question_type"])
def test_a_mapped_column_that_does_not_exist_is_an_error(tmp_path: Path, field: str) -> None:
    pictures(tmp_path, 1)
    path = lines(tmp_path / "pairs.jsonl", [ROW | {"image": "0.png"}])
    with pytest.raises(InputError, match=f"data.columns.{field} = 'pic' .it has prompt, chosen"):
        load_preferences(own(path, columns=ColumnsConfig(**{field: "pic"})), "train")


@pytest.mark.parametrize("name", ["image_path", "img", "images"])
def test_the_originals_layout_loses_no_picture_either(tmp_path: Path, name: str) -> None:
    record = original_record(image=..., **{name: "0.png"})
    folder = write_original_folder(tmp_path, {"easy": [record]})
    with pytest.raises(InputError, match=f"easy.json:1 image: none, but field '{name}' names one"):
        load_preferences(original_config(folder), "train")


def test_a_set_without_pictures_is_a_warning_of_the_check(tmp_path: Path) -> None:
    path = lines(tmp_path / "pairs.jsonl", rows_of(5))
    report = check(str(path))
    assert report["problems"] == 0
    assert any("no row has an image" in note for note in report["splits"]["train"]["notes"])
    assert "no row has an image" in table(report)
    pictures(tmp_path, 5)
    path = lines(tmp_path / "with.jsonl", rows_of(5, image=lambda n: f"{n}.png"))
    assert "no row has an image" not in table(check(str(path)))


# --- no turn is dropped, no cell changes its type -------------------------------------------------

TALK = {"conversations": [{"from": "human", "value": "What?"}]}


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message", "tools"])
@pytest.mark.parametrize("layout", ["text", "sharegpt", "alpaca", "messages"])
def test_a_system_column_is_refused_as_a_system_turn_is(
    tmp_path: Path, column: str, layout: str
) -> None:
    prompt = {
        "text": {}, "sharegpt": TALK | {"prompt": None},
        "alpaca": {"prompt": None, "instruction": "What?"},
        "messages": {"prompt": [{"role": "user", "content": "What?"}]},
    }[layout]  # fmt: skip
    good = ROW | prompt | {column: ""}
    path = lines(
        tmp_path / "pairs.jsonl", [good, ROW | prompt | {"chosen": "B.", column: "Be mad."}]
    )
    with pytest.raises(InputError) as caught:
        load_preferences(own(path), "train")
    [line] = problems_of(caught.value)
    assert line.startswith(f"{path}:2 prompt: ") and repr(column) in line
    record = original_record(image=..., **{column: "Be mad."})
    folder = write_original_folder(tmp_path / "set", {"easy": [record]})
    with pytest.raises(InputError, match=f"easy.json:1 prompt: .*'{column}'"):
        load_preferences(original_config(folder), "train")


CELLS = [
    "None",
    "N/A",
    "null",
    "NaN",
    "nan",
    "NA",
    "True",
    "2",
    "1.50",
    "007",
    "#N/A",
    " x ",
    "a,b\tc",
]


@pytest.mark.parametrize("end", ["csv", "tsv"])
def test_cells_of_a_table_stay_the_text_that_they_are(tmp_path: Path, end: str) -> None:
    separator = {"csv": ",", "tsv": "\t"}[end]
    table_lines = [separator.join(("prompt", "chosen", "rejected"))]
    table_lines += [
        separator.join((f"Q{n}?", f'"{cell}"', '"A\nlonger ""one"""'))
        for n, cell in enumerate(CELLS)
    ]
    (tmp_path / f"train.{end}").write_text("\n".join(table_lines), encoding="utf-8-sig")
    lines(tmp_path / "validation.jsonl", [ROW])
    for path in (tmp_path, tmp_path / f"train.{end}"):
        rows = load_preferences(own(path), "train")
        assert list(rows["chosen"]) == CELLS
        assert set(rows["rejected"]) == {'A\nlonger "one"'}


@pytest.mark.parametrize(
    ("page", "says"),
    [
        (
            "prompt,chosen,rejected\nQ?,Yes.,No.\nQ?,a,b,c\n",
            ":3 record: 4 cells, but the header has 3",
        ),
        ("prompt,chosen,rejected\nQ?,Yes.\n", ":2 record: 2 cells"),
        ("prompt,chosen,chosen\nQ?,a,b\n", "the column 'chosen' twice"),
        ('prompt,chosen,rejected\n"Q?,a,b\n', "not CSV: line 2"),
        ("prompt;chosen;rejected\nQ?;a;b\n", ":2 chosen: missing"),
    ],
)
def test_a_misshapen_table_is_refused(tmp_path: Path, page: str, says: str) -> None:
    (tmp_path / "pairs.csv").write_text(page, encoding="utf-8")
    with pytest.raises(InputError, match=says):
        load_preferences(own(tmp_path / "pairs.csv"), "train")


def test_a_file_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    for name in ("pairs.xlsx", "pairs", "pairs.json.gz"):
        (tmp_path / name).write_text("x", encoding="utf-8")
        with pytest.raises(InputError, match=r"are not read \(known: .json, .jsonl"):
            load_preferences(own(tmp_path / name), "train")


# --- held-out rows are never training rows --------------------------------------------------------


def saved(folder: Path, kind: str, rows: Dataset) -> Path:
    path = folder / f"pairs.{kind}"
    if kind in ("disk", "dict"):
        (rows if kind == "disk" else DatasetDict({"train": rows})).save_to_disk(path)
    elif kind == "parquet":
        rows.to_parquet(path)
    elif kind == "csv":
        rows.to_csv(path, index=False)
    else:
        lines(path, list(rows))
    return path


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "disk", "dict"])
def test_a_single_set_holds_a_tenth_out_by_picture(tmp_path: Path, kind: str) -> None:
    contents = pictures(tmp_path, 10)
    (tmp_path / "again.png").write_bytes(contents[3])  # another name, the same picture
    records = rows_of(60, image=lambda n: f"{n % 10}.png")
    records[3]["image"] = "again.png"
    path = saved(tmp_path, kind, Dataset.from_list(records))
    config = own(path, image_root=str(tmp_path))
    train, held = both(config)
    assert (len(train), len(held)) == (54, 6)
    assert not {r["id"] for r in train} & {r["id"] for r in held}
    assert not {content(r["image"]) for r in train} & {content(r["image"]) for r in held}
    note = read_preferences(config, "train").notes[-1]
    assert "held out and not trained on: 6 of 60" in note and "data.held_out_seed = 0" in note
    others = [both(own(path, image_root=str(tmp_path), held_out_seed=s))[1] for s in range(1, 6)]
    assert any([r["id"] for r in other] != [r["id"] for r in held] for other in others)
    digests = [row_digests(load_preferences(config, s)) for s in ("train", "validation")]
    assert digests[0] != digests[1]
    assert source_sha256(config, "train") != source_sha256(config, "validation")
    report = check(str(path), image_root=str(tmp_path))
    assert [report["splits"][s]["rows"] for s in ("train", "validation")] == [54, 6]
    assert report["shared"]["validation"]["images"] == 0 and "not trained on: 6 of 60" in table(
        report
    )


SLICES = [
    ("train[:50%]", "train[50%:]", 10, 10),
    ("train[:12]", "train[12:]", 12, 8),
    ("train[5:]", "validation", 13, 2),
    ("train[:5]+train[10:]", "train[5:10]", 15, 5),
]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "disk"])
@pytest.mark.parametrize(("train", "validation", "rows", "held"), SLICES)
def test_slices_hold_for_files(
    tmp_path: Path, kind: str, train: str, validation: str, rows: int, held: int
) -> None:
    path = saved(tmp_path, kind, Dataset.from_list(rows_of(20)))
    found = both(own(path, train_split=train, validation_split=validation))
    assert [len(part) for part in found] == [rows, held]
    assert not {r["id"] for r in found[0]} & {r["id"] for r in found[1]}


@pytest.mark.parametrize(
    ("train", "validation", "says"),
    [
        ("train", "train", "20 rows in common"),
        ("train[:60%]", "train[50%:]", "2 rows in common"),
        ("train", "train[:1]", "1 rows in common"),
        ("test", "validation", "has no split 'test'"),
        ("train", "dev", "has no split 'dev'"),
        ("train[", "validation", "data.train_split = "),
        ("train[30:]", "validation", "names none of the rows"),
        ("train+train[:2]", "validation", "names 2 rows twice"),
    ],
)
def test_splits_that_overlap_or_do_not_exist_are_refused(
    tmp_path: Path, train: str, validation: str, says: str
) -> None:
    path = lines(tmp_path / "pairs.jsonl", rows_of(20))
    config = own(path, train_split=train, validation_split=validation)
    with pytest.raises(InputError, match=says.replace("[", r"\[")):
        both(config)


def test_the_bad_rows_of_both_parts_are_listed_at_once(tmp_path: Path) -> None:
    records = [r | {"chosen": ""} for r in rows_of(20)]
    path = lines(tmp_path / "pairs.jsonl", records)
    for split in ("train", "validation"):
        with pytest.raises(InputError, match="20 problems"):
            load_preferences(own(path), split)
    path = lines(tmp_path / "skip.jsonl", [*records[:4], *rows_of(20)[4:]])
    with pytest.warns(UserWarning, match="4 of 20 rows skipped"):
        loaded = [
            read_preferences(own(path, on_bad_rows="skip"), s) for s in ("train", "validation")
        ]
    assert [len(part.rows) for part in loaded] == [14, 2]
    assert [len(part.skipped) for part in loaded] == [4, 0]


# --- a path is read literally ---------------------------------------------------------------------

NAMES = ["pairs[1]", "pairs?", "pairs*", "p{a,b}", "pairs#1 %20", "päirs", "~pairs"]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_read_literally(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for other in ("pairs1", "pairsx", "pa", "pairs"):
        for end in ("parquet", "csv", "jsonl"):
            wrong = saved(tmp_path, end, Dataset.from_list([ROW | {"chosen": "wrong"}]))
            wrong.rename(folder / f"{other}.{end}")
    for end in ("parquet", "csv", "jsonl", "disk"):
        path = saved(tmp_path, end, Dataset.from_list([ROW]))
        path = path.rename(folder / f"{name}.{end}")
        [row] = load_preferences(own(path), "train")
        assert row["chosen"] == "Yes."


@pytest.mark.parametrize("name", ["set[1]", "set?", "set*"])
def test_a_folder_is_read_literally(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    for place, chosen in ((folder, "Yes."), (tmp_path / "set1", "wrong")):
        place.mkdir()
        Dataset.from_list([ROW | {"chosen": chosen}]).to_parquet(place / "rows.parquet")
        (place / "rows.parquet").rename(place / "train-00000-of-00001.parquet")
        write_rows(
            place / "data/train-00000-of-00001.parquet",
            [
                {
                    "question": "Q?",
                    "chosen": chosen,
                    "rejected": "No.",
                    "image": None,
                    "image_name": "",
                }
            ],
        )
    assert load_preferences(own(folder), "train")["chosen"] == ["Yes."]
    assert load_preferences(hub_config(folder), "train")["chosen"] == ["Yes."]


# --- settings that nothing would read -------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data.path": "my/pairs.jsonl"}, "path is set, but source = 'mini' does not read it"),
        ({"data.columns.image": "pic"}, "columns is set, but source = 'mini'"),
        ({"data.image_root": "my"}, "image_root is set, but source = 'mini'"),
        ({"data.keywords": ["easy"]}, "keywords is set, but source = 'mini'"),
        ({"data.train_split": "train[:9]"}, "train_split is set, but source = 'mini'"),
        ({"data.source": "original", "data.path": "x", "data.columns.id": "n"}, "columns is set"),
        ({"data.source": "datasets", "data.path": "x", "data.keywords": ["n"]}, "keywords is set"),
        ({"data.source": "hub_layout", "data.path": "x", "data.subset": "n"}, "subset is set"),
    ],
)
def test_a_setting_that_the_source_does_not_read_is_refused(changes: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        smoke(changes)


# --- whose prompts --------------------------------------------------------------------------------


def test_without_prompts_of_its_own_a_set_is_asked_minis_and_says_so(tmp_path: Path) -> None:
    path = lines(tmp_path / "pairs.jsonl", rows_of(5))
    config = own(path)
    assert eval_sets(config, held_out_drawings=False) == eval_sets(MINI, held_out_drawings=False)
    assert prompt_origin(config) == {
        "mini": True, "own": False, "name": "SPA-VL mini's built-in prompts"
    }  # fmt: skip
    assert prompt_origin(MINI)["own"]


def test_prompts_of_ones_own(tmp_path: Path) -> None:
    contents = pictures(tmp_path, 4)
    rows = [{"prompt": f"Q{n}?", "image": f"{n}.png"} for n in range(4)]
    sets = ["harm", "help", "harm", "look_alikes"]
    path = lines(tmp_path / "test.jsonl", [r | {"set": s} for r, s in zip(rows, sets, strict=True)])
    folder = tmp_path / "prompts"
    for name in dict.fromkeys(sets):
        chosen = [r for r, s in zip(rows, sets, strict=True) if s == name]
        chosen = [r | {"image": f"../{r['image']}"} for r in chosen]
        lines(folder / f"{name}.jsonl", chosen)
    for place, root in ((path, ""), (folder, str(tmp_path))):
        if root:  # the folder's pictures are named from the image root
            for name in dict.fromkeys(sets):
                file = folder / f"{name}.jsonl"
                file.write_text(file.read_text().replace("../", ""), encoding="utf-8")
        for source in ({"source": "mini"}, {"source": "datasets", "path": str(path)}):
            config = DataConfig(**source, test_path=str(place), image_root=root, **ALL)
            assert eval_sets(config, held_out_drawings=True) == ["harm", "help", "look_alikes"]
            harm = load_prompts(config, "harm")
            assert list(harm["prompt"]) == ["Q0?", "Q2?"]
            assert [content(c) for c in harm["image"]] == [contents[0], contents[2]]
            assert prompt_origin(config) == {
                "mini": False, "own": True, "name": f"the prompts of {place}"
            }  # fmt: skip
            assert load_truth(config) == {}
            with pytest.raises(InputError, match="has no evaluation set 'twins'"):
                load_prompts(config, "twins")
    before = source_sha256(config, "harm")
    (tmp_path / "2.png").write_bytes(png((99, 9, 9)))
    assert source_sha256(config, "harm") != before


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"prompt": "Q?"}], "its rows belong to no evaluation set"),
        (
            [{"prompt": "Q?", "set": "harm"}, {"prompt": "R?"}],
            ":2 set: expected harm, help, look_alikes, got None",
        ),
        (
            [{"prompt": "Q?", "set": "harmful"}],
            ":1 set: expected harm, help, look_alikes, got 'harmful'",
        ),
        ([{"prompt": "", "set": "harm"}], ":1 prompt: empty"),
        ([{"ask": "Q?", "set": "harm"}], ":1 prompt: missing"),
        ([{"prompt": "Q?", "set": "harm", "image": "gone.png"}], ":1 image: missing image"),
        ([{"prompt": "Q?", "set": "harm", "img": "gone.png"}], ":1 image: none, but column 'img'"),
        ([{"prompt": "Q?", "set": "harm", "system": "Be mad."}], ":1 prompt: a system turn"),
    ],
)
def test_bad_prompts_of_ones_own_are_refused(tmp_path: Path, rows: list[dict], says: str) -> None:
    path = lines(tmp_path / "test.jsonl", rows)
    with pytest.raises(InputError, match=says):
        eval_sets(DataConfig(source="mini", test_path=str(path), **ALL), held_out_drawings=False)
    with pytest.raises(InputError, match="data.test_path 'gone' does not exist"):
        eval_sets(DataConfig(source="mini", test_path="gone", **ALL), held_out_drawings=False)


def test_the_originals_inference_lists_are_its_prompts(tmp_path: Path) -> None:
    folder = write_original_folder(tmp_path, {"easy": [original_record(n) for n in range(3)]})
    config = original_config(folder)
    assert prompt_origin(config)["mini"]
    record = {"id": 0, "image": original_record()["image"], "question": "Mine?"}
    (folder / "infer_harm.json").write_text(json.dumps([record]), encoding="utf-8")
    assert eval_sets(config, held_out_drawings=True) == ["harm"]
    assert load_prompts(config, "harm")["prompt"] == ["Mine?"]
    assert prompt_origin(config)["own"]
    before = source_sha256(config, "harm")
    (folder / record["image"]).write_bytes(png((90, 90, 90)))
    assert source_sha256(config, "harm") != before
    (folder / record["image"]).write_bytes(b"no picture")
    with pytest.raises(InputError, match="infer_harm.json:1 image: unreadable"):
        load_prompts(config, "harm")


def test_the_truth_of_mini_is_only_for_rows_of_mini(tmp_path: Path) -> None:
    config = own(lines(tmp_path / "pairs.jsonl", rows_of(5)))
    assert load_pair_truth(config) == {} and load_pair_truth(MINI)
    assert load_truth(config) == load_truth(MINI)  # of mini's prompts, which are asked


# --- the keyword map ------------------------------------------------------------------------------


def test_a_keyword_map_may_say_paths_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_original_folder(tmp_path / "set", {"easy": [original_record()]})
    monkeypatch.chdir(tmp_path)
    for text_of_path in ("easy.json", str(folder / "easy.json"), "set/easy.json"):
        (folder / "config_train.json").write_text(json.dumps({"easy": text_of_path}))
        assert len(load_preferences(original_config(folder), "train")) == 1
        assert folder / "easy.json" in original_files(folder)
    (tmp_path / "other.json").write_text("[]", encoding="utf-8")
    for text_of_path in ("/no/such/easy.json", str(tmp_path / "other.json"), "other.json", "."):
        (folder / "config_train.json").write_text(json.dumps({"easy": text_of_path}))
        with pytest.raises(InputError, match="keyword 'easy': .* is no list in "):
            load_preferences(original_config(folder), "train")


def original_files(folder: Path) -> list[Path]:
    from spavl_lib.data.sources.base import open_source

    return list(open_source(original_config(folder)).files("train"))


# --- every file that is read is hashed ------------------------------------------------------------


def edits(config: DataConfig, files: list[Path], splits: tuple[str, ...]) -> None:
    """Each file's change must change the hash of each split."""
    for path in files:
        before = [source_sha256(config, split) for split in splits]
        kept = path.read_bytes()
        path.write_bytes(png((250, 1, 1)) if path.suffix == ".png" else kept + b"\n")
        after = [source_sha256(config, split) for split in splits]
        assert all(a != b for a, b in zip(before, after, strict=True)), path
        path.write_bytes(kept)
        assert [source_sha256(config, split) for split in splits] == before


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_changed_picture_or_row_changes_the_hash_of_ones_own_file(
    tmp_path: Path, kind: str
) -> None:
    pictures(tmp_path / "images", 4)
    path = write_rows(tmp_path / f"pairs.{kind}", rows_of(4, image=lambda n: f"{n}.png"))
    config = own(path, image_root=str(tmp_path / "images"))
    edits(config, [path, tmp_path / "images/2.png"], ("train", "validation"))
    beside = lines(tmp_path / "validation.jsonl", [ROW | {"image": "1.png"}])
    edits(config, [beside, tmp_path / "images/1.png"], ("validation",))
    before = source_sha256(config, "train")
    beside.write_text(beside.read_text() + "\n", encoding="utf-8")
    assert source_sha256(config, "train") == before


def test_pictures_named_by_tables_are_hashed_too(tmp_path: Path) -> None:
    pictures(tmp_path, 3)
    records = rows_of(3, image=lambda n: {"bytes": None, "path": f"{n}.png"})
    config = own(write_rows(tmp_path / "pairs.parquet", records))
    edits(config, [tmp_path / "1.png"], ("train", "validation"))
    at_the_hubs_door(tmp_path, records, "parquet")
    edits(hub_config(tmp_path), [tmp_path / "1.png"], ("train",))


def test_pictures_of_the_originals_records_are_hashed_too(tmp_path: Path) -> None:
    """The one that a record names, and the one that stands in its question."""
    pictures(tmp_path, 3)
    in_question = part(type="image", image="2.png")
    records = [
        original_record(0, image="0.png"),
        original_record(1, image=..., question=in_question),
        original_record(2, image=..., question=None),
        "no record",
    ]
    write_original_folder(tmp_path, {"easy": records}, images=False)
    asked = [{"id": 0, "question": in_question}]
    (tmp_path / "infer_harm.json").write_text(json.dumps(asked), encoding="utf-8")
    config = original_config(tmp_path)
    edits(config, [tmp_path / "0.png", tmp_path / "2.png"], ("train", "validation"))
    edits(config, [tmp_path / "2.png"], ("train", "validation", "harm"))
    before = source_sha256(config, "train")
    (tmp_path / "1.png").write_bytes(png((9, 9, 9)))  # no record names it
    assert source_sha256(config, "train") == before

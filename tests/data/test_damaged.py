"""Damaged inputs, some 400 of them: each offender named by file and row, or skipped and listed.

Rows of small sets are damaged at random places in random ways; exactly the damaged ones must be
named. Nothing outside the set's folder may be opened, and nothing may be dropped in silence.
"""

import io
import json
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spavl_lib.data.load import load_preferences, read_preferences
from spavl_lib.data.schema import MAX_CHARACTERS, TURN
from spavl_lib.errors import InputError
from tests.helpers import hub_config, original_config, original_record, png

ROWS = 12
OPENED: list[str] = []
WATCH = {"on": False}


def _hook(event: str, args: tuple) -> None:
    if WATCH["on"] and event == "open" and isinstance(args[0], str):
        OPENED.append(args[0])


sys.addaudithook(_hook)


def picture(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    mode, form = {
        "cmyk": ("CMYK", "JPEG"), "16-bit": ("I;16", "PNG"), "jpeg": ("RGB", "JPEG"),
        "gif": ("P", "GIF"), "webp": ("RGB", "WEBP"), "1-bit": ("1", "PNG"),
    }[kind]  # fmt: skip
    size = options.pop("size", (40, 30))
    Image.new(mode, size, *([100] if mode == "I;16" else [])).save(buffer, form, **options)
    return buffer.getvalue()


JPEG = picture("jpeg")
BOMB = picture("1-bit", size=(20_000, 20_000))  # 400 megapixels in 50 kB
FRAMES = [Image.new("RGB", (40, 30), (n, 0, 0)) for n in (1, 99)]
BAD_PICTURES = {
    "cut at a tenth": JPEG[: len(JPEG) // 10], "cut in half": JPEG[: len(JPEG) // 2],
    "cut near the end": JPEG[:-12], "zero bytes": b"", "page": b"<html><body>404</body></html>",
    "bomb": BOMB, "animated gif": picture("gif"), "text": b"no picture",
}  # fmt: skip
GOOD_PICTURES = {
    "cmyk": picture("cmyk"), "16-bit": picture("16-bit"), "jpeg": JPEG,
    "animated webp": picture("webp", save_all=True, append_images=FRAMES),
}  # fmt: skip
TEXTS = {
    "empty chosen": {"chosen": ""}, "blank rejected": {"rejected": " \n\t"},
    "equal": {"chosen": "Same.", "rejected": "Same. "}, "NUL": {"question": "a\0b?"},
    "separator": {"chosen": f"a{TURN}b"}, "turns in a question": {"question": f"a{TURN}b{TURN}c"},
    "100k characters": {"chosen": "x" * 100_000}, "no question": {"question": None},
    "over the limit": {"rejected": "y" * (MAX_CHARACTERS + 1)},
}  # fmt: skip
ODD_TEXTS = {
    "mark": {"question": "<image>\nWhat <image> is this?"}, "control": {"chosen": "</s> [INST] x"},
    "emoji": {"question": "🔥" * 50}, "long": {"chosen": "z" * 40_000},
    "rtl": {"chosen": "\u202eabc"},
}  # fmt: skip


def original_case(draw: random.Random, folder: Path) -> tuple[set[int], int]:
    """A set in the original's layout with damaged and odd rows; which are damaged."""
    folder.mkdir()
    (folder.parent / "secret.png").write_bytes(png((1, 2, 3)))
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "folder.png").mkdir()
    records = []
    damaged: set[int] = set()
    for n in range(ROWS):
        record = original_record(n)
        path = folder / record["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw.choice(list(GOOD_PICTURES.values())))
        record |= draw.choice(list(ODD_TEXTS.values())) if draw.random() < 0.3 else {}
        if draw.random() < 0.3:
            damaged.add(n)
            kind = draw.choice(("text", "picture", "path", "shape"))
            if kind == "text":
                record |= draw.choice(list(TEXTS.values()))
            elif kind == "picture":
                path.write_bytes(draw.choice(list(BAD_PICTURES.values())))
            elif kind == "path":
                outside = str(folder.parent / "secret.png")
                record["image"] = draw.choice(
                    ("../secret.png", outside, "link.png", "folder.png", "gone.png", "a\0b.png",
                     "http://x/y.png", "~/x.png", "a/../../secret.png", "\\\\host\\x.png")
                )  # fmt: skip
            else:
                record = draw.choice(
                    (original_record(n, chosen=...), original_record(n, question=["x"]), "text",
                     None, [1], original_record(n, chosen={"a": 1}),
                     original_record(n, rejected="\ud800"), original_record(n, image=7),
                     original_record(n, image=f"Malicious Use/Illegal activities/thievery/{n}.png"))
                )  # fmt: skip
        records.append(record)
    (folder / "easy.json").write_text(json.dumps(records), encoding="utf-8")
    (folder / "config_train.json").write_text('{"easy": "easy.json"}', encoding="utf-8")
    return damaged, ROWS


def check_case(config: Callable, damaged: set[int], file: str) -> None:
    """An error that names just the damaged rows; under skip, just the others are left."""
    begun = time.perf_counter()
    OPENED.clear()
    WATCH["on"] = True
    try:
        if not damaged:
            assert len(load_preferences(config(), "train")) == ROWS
            return
        with pytest.raises(InputError) as caught:
            load_preferences(config(), "train")
        named = {
            int(line.split(f"{file}:")[1].split(" ")[0]) - 1 for line in lines_of(caught.value)
        }
        assert named == damaged
        if len(damaged) < ROWS:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                loaded = read_preferences(config(on_bad_rows="skip"), "train")
            assert len(loaded.rows) == ROWS - len(damaged)
            listed = {int(p.split(f"{file}:")[1].split(" ")[0]) - 1 for p in loaded.skipped}
            assert listed == damaged
            assert any(f"{len(damaged)} of {ROWS} rows skipped" in str(w.message) for w in said)
    finally:
        WATCH["on"] = False
    assert not any("secret" in path for path in OPENED)
    assert time.perf_counter() - begun < 20


def lines_of(error: InputError) -> Iterator[str]:
    for line in str(error).split("\n")[1:]:
        if line.strip():
            yield line.strip()


@pytest.mark.parametrize("seed", range(0, 200, 20))
def test_the_originals_layout(tmp_path: Path, seed: int) -> None:
    for n in range(seed, seed + 20):
        folder = tmp_path / str(n) / "set"
        folder.parent.mkdir()
        damaged, _ = original_case(random.Random(n), folder)
        check_case(lambda folder=folder, **k: original_config(folder, **k), damaged, "easy.json")


def own_case(draw: random.Random, folder: Path) -> set[int]:
    """JSON Lines in TRL's or LLaMA-Factory's form with damaged rows."""
    folder.mkdir()
    (folder.parent / "secret.png").write_bytes(png((1, 2, 3)))
    form = draw.choice(("trl", "messages", "sharegpt", "alpaca"))
    lines, damaged = [], set()
    for n in range(ROWS):
        (folder / f"{n}.png").write_bytes(png((n, 0, 0)))
        texts = {"question": f"Question {n}?", "chosen": f"Yes {n}.", "rejected": f"No {n}."}
        image = f"{n}.png"
        if draw.random() < 0.3:
            damaged.add(n)
            if draw.random() < 0.5:
                texts |= draw.choice([t for t in TEXTS.values() if "question" not in t])
            else:
                image = draw.choice(
                    ("../secret.png", "gone.png", str(folder.parent / "secret.png"))
                )
        lines.append(json.dumps(record_in(form, texts, image)))
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    good = {"prompt": "Held out?", "chosen": "Yes.", "rejected": "No."}
    (folder / "validation.jsonl").write_text(json.dumps(good), encoding="utf-8")
    return damaged


def record_in(form: str, texts: dict, image: str) -> dict:
    """One record in somebody's layout."""
    chosen, rejected, question = texts["chosen"], texts["rejected"], texts["question"]
    if form == "trl":
        return {"prompt": question, "chosen": chosen, "rejected": rejected, "image": image}
    if form == "messages":
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        return {
            "prompt": [{"role": "user", "content": parts}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}], "images": [image],
        }  # fmt: skip
    if form == "sharegpt":
        return {
            "conversations": [{"from": "human", "value": f"<image>{question}"}],
            "chosen": {"from": "gpt", "value": chosen},
            "rejected": {"from": "gpt", "value": rejected}, "images": [image],
        }  # fmt: skip
    return {"instruction": "<image>" + question, "input": "", "chosen": chosen,
            "rejected": rejected, "images": [image]}  # fmt: skip


@pytest.mark.parametrize("seed", range(0, 100, 20))
def test_ones_own_layouts(tmp_path: Path, seed: int) -> None:
    def config(folder: Path, **changes: object) -> object:
        base = vars(original_config(folder)) | {"source": "datasets"} | changes
        return type(original_config(folder))(**base)

    for n in range(seed, seed + 20):
        folder = tmp_path / str(n) / "set"
        folder.parent.mkdir()
        damaged = own_case(random.Random(n), folder)
        check_case(lambda folder=folder, **k: config(folder, **k), damaged, "train.jsonl")


def hub_case(draw: random.Random, folder: Path) -> set[int]:
    """Parquet with embedded pictures and damaged rows."""
    columns: dict[str, list] = {k: [] for k in ("image", "question", "chosen", "rejected", "name")}
    damaged = set()
    for n in range(ROWS):
        row = {"question": f"Q {n}?", "chosen": f"Yes {n}.", "rejected": "No."}
        cell = {"bytes": draw.choice(list(GOOD_PICTURES.values())), "path": f"{n}.png"}
        row |= draw.choice(list(ODD_TEXTS.values())) if draw.random() < 0.3 else {}
        if draw.random() < 0.3:
            damaged.add(n)
            kind = draw.choice(("text", "picture", "path", "bytes"))
            if kind == "text":
                row |= draw.choice(list(TEXTS.values()))
            elif kind == "picture":
                cell["bytes"] = draw.choice(list(BAD_PICTURES.values()))
            elif kind == "path":
                cell = {"bytes": None, "path": str(folder.parent / "secret.png")}
            else:
                row[draw.choice(("question", "chosen"))] = b"caf\xe9 \xff"
        for key, value in row.items():
            columns[key].append(value.encode() if isinstance(value, str) else value)
        columns["image"].append(cell)
        columns["name"].append(f"{n}.png".encode())
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = {"image": pa.array(columns["image"], kind), "image_name": columns["name"]}
    table |= {k: columns[k] for k in ("question", "chosen", "rejected")}
    arrays = {
        k: v if k == "image" else pa.array(v, pa.binary()).view(pa.string())
        for k, v in table.items()
    }
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.table(arrays), folder / "data/train-00000-of-00001.parquet")
    return damaged


@pytest.mark.parametrize("seed", range(0, 60, 20))
def test_the_hubs_layout(tmp_path: Path, seed: int) -> None:
    (tmp_path / "secret.png").write_bytes(png((1, 2, 3)))
    for n in range(seed, seed + 20):
        folder = tmp_path / str(n)
        damaged = hub_case(random.Random(n), folder)
        check_case(lambda folder=folder, **k: hub_config(folder, **k), damaged,
                   "train-00000-of-00001.parquet")  # fmt: skip


# --- files damaged as a whole -------------------------------------------------------------------


def write_shards(folder: Path, count: int = 3, **columns: pa.Array) -> list[Path]:
    """A good set in several shards; further columns replace its own in the last."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    (folder / "data").mkdir(parents=True, exist_ok=True)
    files = []
    for n in range(count):
        table = {
            "image": pa.array([{"bytes": png((n, 0, 0)), "path": None}] * 2, kind),
            **{c: pa.array([f"{c} {n}", f"{c} {n} b"]) for c in
               ("question", "chosen", "rejected", "image_name")},
        }  # fmt: skip
        if n == count - 1:
            table = {k: v for k, v in (table | columns).items() if v is not None}
        files.append(folder / f"data/train-{n:05d}-of-{count:05d}.parquet")
        pq.write_table(pa.table(table), files[-1])
    return files


def test_every_cut_shard_is_named(tmp_path: Path) -> None:
    for n in range(20):
        draw = random.Random(n)
        folder = tmp_path / str(n)
        files = write_shards(folder)
        cut = draw.sample(files, draw.randint(1, 3))
        for path in cut:
            content = path.read_bytes()
            path.write_bytes(content[: int(len(content) * draw.random())])
        with pytest.raises(InputError) as caught:
            load_preferences(hub_config(folder), "train")
        assert all((path.name in str(caught.value)) == (path in cut) for path in files)


def test_missing_shards_are_counted_and_named(tmp_path: Path) -> None:
    for n in range(3):
        folder = tmp_path / str(n)
        write_shards(folder)[n].unlink()
        with pytest.raises(InputError, match=f"2 of 3 shards.*missing 0000{n}"):
            load_preferences(hub_config(folder), "train")


WRONG = {
    "numbers": pa.array([1, 2]), "bytes": pa.array([b"a", b"b"]), "lists": pa.array([["a"], ["b"]]),
    "floats": pa.array([0.5, 1.5]), "dicts": pa.array([{"a": "b"}] * 2), "absent": None,
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_column_of_another_type_is_named_with_its_file(tmp_path: Path, kind: str) -> None:
    for column in ("question", "chosen", "rejected", "image_name"):
        folder = tmp_path / column
        files = write_shards(folder, **{column: WRONG[kind]})
        with pytest.raises(InputError) as caught:
            load_preferences(hub_config(folder), "train")
        assert files[-1].name in str(caught.value) and column in str(caught.value)
        assert files[0].name not in str(caught.value)


def test_files_of_text_that_are_no_lists(tmp_path: Path) -> None:
    good = json.dumps([original_record(image=...)]).encode()
    (tmp_path / "config_train.json").write_text('{"easy": "easy.json"}')
    for n in range(30):
        draw = random.Random(n)
        content = draw.choice(
            (good[: draw.randint(0, len(good) - 2)], b"\xff\xfe" + good, good + b"]",
             good.replace(b":", b"="), b"[" * 100_000, b"\x00" * 50, b"caf\xe9" + good, b"{}")
        )  # fmt: skip
        (tmp_path / "easy.json").write_bytes(content)
        with pytest.raises(InputError, match="easy.json"):
            load_preferences(original_config(tmp_path), "train")

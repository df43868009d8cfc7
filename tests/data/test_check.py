"""`spavl data check`: what it finds, as a table and as JSON; and its exit code."""

import json
from pathlib import Path

import pytest
from PIL import Image

from spavl_lib import cli
from spavl_lib.data.check import check, table
from spavl_lib.data.duplicates import dhash, near_groups
from spavl_lib.data.explore import balance
from spavl_lib.data.images import png_bytes
from spavl_lib.errors import InputError
from spavl_lib.modelling.load import load_counter
from tests.helpers import embedded_processor, hub_rows, png, write_hub_folder


def counted() -> dict:
    """How the command counts tokens unless told otherwise."""
    return {"model": "embedded", "processor": embedded_processor(), "max_length": 512}


def test_mini_is_described_whole() -> None:
    report = check("mini", **counted())
    train = report["splits"]["train"]
    assert report["problems"] == 0 and report["max_length"] == 512
    assert (train["rows"], train["images"], train["duplicates"]) == (3180, 1060, 0)
    found = train["balance"]
    assert (found["present"], found["absent"], found["evenness"]) == (53, 0, 1.0)
    assert found["smallest"][1] == found["largest"][1] == 60
    assert 100 < train["tokens"]["median"] <= train["tokens"]["max"] < 512
    assert set(report["shared"]) == {"validation", "harm", "help"}
    assert not any(n for common in report["shared"].values() for n in common.values())
    text = table(report)
    assert "3,180" in text and text.endswith("no problems")


def test_every_kind_of_problem_is_listed(tmp_path: Path) -> None:
    rows = [dict(r) for r in hub_rows("train", 8)]
    rows[1]["chosen"] = ""
    rows[2]["image"] = b"no picture"
    rows[5]["chosen"] = "word " * 600  # longer than the model takes
    rows[7] = dict(rows[6])
    folder = write_hub_folder(tmp_path, rows)
    report = check(str(folder), **counted())
    train = report["splits"]["train"]
    assert report["problems"] == 3 == train["problem_count"]
    assert train["rows"] == 6 and train["duplicates"] == train["duplicate_rows"] == 1
    lines = " ".join(train["problems"])
    assert ":2 chosen: empty" in lines and ":3 image: unreadable" in lines
    assert "train/5 chosen: " in lines and "more than 512" in lines
    assert train["no_class"] == 6 and len(train["unmatched"]["no_class"]) == 6
    assert "train: 3 problems" in table(report)


def test_the_command_prints_writes_and_says_by_its_code(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    good = [dict(r) for r in hub_rows("train", 4)]
    for rows, code in ((good, 0), ([*good[:3], good[3] | {"rejected": " "}], 2)):
        folder = write_hub_folder(tmp_path / str(code), rows)
        with pytest.raises(SystemExit) as caught:
            cli.main(["data", "check", str(folder), "--json", str(tmp_path / "r.json")])
        assert caught.value.code == code
        out = capsys.readouterr().out
        assert ("no problems" in out) == (code == 0)
        report = json.loads((tmp_path / "r.json").read_text())
        assert report["problems"] == (code == 2)


def test_near_duplicates_survive_recolouring_and_differ_from_others() -> None:
    from io import BytesIO

    from PIL import Image, ImageDraw, ImageOps

    def encoded(image: Image.Image, form: str = "PNG") -> bytes:
        buffer = BytesIO()
        image.save(buffer, form)
        return buffer.getvalue()

    picture = Image.linear_gradient("L").resize((90, 80)).convert("RGB")
    ImageDraw.Draw(picture).ellipse((10, 20, 60, 70), fill=(200, 30, 30))
    same = [encoded(picture), encoded(picture, "JPEG"), encoded(picture.resize((180, 160)))]
    other = encoded(ImageOps.mirror(picture))
    hashes = [dhash(c) for c in (*same, other)]
    assert near_groups(hashes) == [[0, 1, 2]]
    assert near_groups([5, 5, 5 ^ (1 << 60), 0xFFFF0000FFFF0000]) == [[0, 1, 2]]
    assert dhash(png()) == dhash(png((1, 2, 3)))
    with pytest.raises(ValueError, match="0 to 3"):
        near_groups([1], distance=4)


def _write_pairs(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _pairs(count: int) -> list[dict]:
    return [
        {"prompt": f"What is number {n}?", "chosen": f"It is {n}.", "rejected": "No.",
         "image": f"{n}.png"}
        for n in range(count)
    ]  # fmt: skip


def _write_pictures(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        (folder / f"{n}.png").write_bytes(png((20 * n, 100, 200)))


def test_held_out_copies_of_training_rows_are_one_problem(tmp_path: Path) -> None:
    _write_pictures(tmp_path, 6)
    rows = _pairs(6)
    _write_pairs(tmp_path / "train.jsonl", rows)
    # A copy with case and punctuation changed, an old image with a new question, and a copy.
    held_out = [
        rows[0] | {"prompt": "what is number 0"},
        rows[1] | {"prompt": "And this?"},
        rows[2],
    ]
    _write_pairs(tmp_path / "validation.jsonl", held_out)
    report = check(str(tmp_path), **counted())
    assert report["copies"] == {"validation": ["validation/0", "validation/2"]}
    assert report["problems"] == 1 and report["shared"]["validation"] == {"images": 3, "prompts": 2}
    text = table(report)
    assert text.count("validation: 2 rows with image and question of a training row") == 1
    assert text.endswith("\n1 problem")
    _write_pairs(tmp_path / "validation.jsonl", held_out[1:2])
    report = check(str(tmp_path), **counted())
    assert (report["copies"], report["problems"]) == ({}, 0)


def test_the_same_note_is_said_once(tmp_path: Path) -> None:
    _write_pictures(tmp_path, 6)
    _write_pairs(tmp_path / "pairs.jsonl", _pairs(6))
    text = table(check(str(tmp_path / "pairs.jsonl"), **counted()))
    assert text.count("has no split 'validation'") == 1
    assert "train and validation: warning: " in text


def test_a_folder_of_pictures_is_not_read_as_rows(tmp_path: Path) -> None:
    _write_pictures(tmp_path / "photos", 6)
    with pytest.raises(InputError, match="holds images but no file of rows; name a file such as"):
        check(str(tmp_path), **counted())
    for name in ("pairs.jsonl", "prompts.jsonl"):
        _write_pairs(tmp_path / name, _pairs(6))
    with pytest.raises(
        InputError, match=r"rows \(pairs.jsonl, prompts.jsonl\) beside images; name"
    ):
        check(str(tmp_path), **counted())
    (tmp_path / "prompts.jsonl").unlink()
    looked = rf"missing image '0.png' .*it is in {tmp_path}/photos: set data.image_root to that"
    with pytest.raises(InputError, match=looked):
        check(str(tmp_path), **counted())
    report = check(str(tmp_path), image_root=str(tmp_path / "photos"), **counted())
    assert report["problems"] == 0


def test_balance() -> None:
    assert balance([""]) == {"present": 0, "absent": 53}
    found = balance(["theft"] * 3 + ["hate"])
    assert found["smallest"] == ["hate", 1] and found["largest"] == ["theft", 3]
    assert found["evenness"] == pytest.approx(0.8113, abs=1e-4)


# --- own columns, longest rows, sizes -----------------------------------------------------------


def test_own_columns_are_named_as_in_a_profile(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "wide.png").write_bytes(png_bytes(Image.new("RGB", (60, 10))))
    rows = [
        {"q": "Why?", "good": "So. " * n, "bad": "\nNo.", "pic": name}
        for n, name in enumerate(["a.png", "a.png", "wide.png"], 1)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "train.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "validation.jsonl").write_text(text, encoding="utf-8")
    report = check(
        str(tmp_path / "train.jsonl"),
        columns=["prompt=q,chosen=good", "rejected = bad", "image=pic"],
        **counted(),
    )
    train = report["splits"]["train"]
    assert (report["source"], train["problem_count"], train["rows"]) == ("datasets", 0, 3)
    assert report["problems"] == 1  # the held-out rows are those of the training
    assert (train["images"], train["text_only"]) == (2, 0)
    assert train["narrowest_image"] == "60x10"
    longest = train["tokens"]["longest_rows"]
    assert next(iter(longest)) == "train/2 chosen" and len(longest) == 5
    assert list(longest.values()) == sorted(longest.values(), reverse=True)
    assert "train/2 chosen" in table(report)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (["promt=q"], "did you mean 'prompt'"), (["prompt"], "expected FIELD=COLUMN"),
        (["prompt="], "expected FIELD=COLUMN"), (["prompt=a", "prompt=b"], "at most once"),
    ],
)  # fmt: skip
def test_a_column_map_that_says_nothing_is_refused(columns: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        check("rows.jsonl", columns=columns)


def test_the_limit_is_never_past_the_models_context() -> None:
    assert [load_counter("embedded", n)[1] for n in (0, 100, 9000)] == [512, 100, 512]

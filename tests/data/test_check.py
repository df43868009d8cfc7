"""`spavl data check`: what it finds, as a table and as JSON; and its exit code."""

import json
from pathlib import Path

import pytest

from spavl_lib import cli
from spavl_lib.data.check import check, table
from spavl_lib.data.duplicates import dhash, near_groups
from spavl_lib.data.explore import balance
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
    assert ":1 chosen: empty" in lines and ":2 image: unreadable" in lines
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


def test_balance() -> None:
    assert balance([""]) == {"present": 0, "absent": 53}
    found = balance(["theft"] * 3 + ["hate"])
    assert found["smallest"] == ["hate", 1] and found["largest"] == ["theft", 3]
    assert found["evenness"] == pytest.approx(0.8113, abs=1e-4)

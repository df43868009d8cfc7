"""The gallery: which rows, which pictures, what is said of the answers."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spavl_lib.data.taxonomy import PARENTS
from spavl_lib.report import gallery
from tests.report.synthetic import write_jsonl


def _row(number: int, class3: str = "theft", **more: object) -> dict:
    return {
        "id": f"harm/{number}",
        "prompt": f"prompt {number}",
        "response": f"answer {number}",
        "image_name": f"{number}.png",
        "class1": "Malicious Use",
        "class2": "Illegal activities",
        "class3": class3,
        "harmful": True,
        "verdict": "refused",
        "helpful": None,
        "unsafe": False,
    } | more


def _write(folder: Path, **by_model: list[dict]) -> Path:
    for model, rows in by_model.items():
        write_jsonl(folder / "verdicts" / model / "harm.jsonl", rows)
    return folder


def test_rows_are_spread_over_classes_and_sets(run_path: Path) -> None:
    rows = gallery.read_verdicts(run_path / "evaluation")
    chosen = gallery.choose(rows, 106)
    by_class = Counter(next(iter(rows[key].values()))["class3"] for key in chosen)
    assert by_class == dict.fromkeys(PARENTS, 2)
    by_set = Counter(key[0] for key in chosen)
    assert set(by_set) == {"harm", "help", "look_alikes", "twins"}
    assert max(by_set.values()) - min(by_set.values()) <= 2
    assert len(set(chosen)) == 106


def test_choice_does_not_look_at_answers(tmp_path: Path) -> None:
    rows = {("harm", str(i)): {"base": _row(i, unsafe=bool(i % 2))} for i in range(50)}
    flipped = {key: {"base": m["base"] | {"unsafe": False}} for key, m in rows.items()}
    assert gallery.choose(rows, 10) == gallery.choose(flipped, 10)


def test_failures_are_added_and_marked(tmp_path: Path) -> None:
    good = [_row(i) for i in range(40)]
    bad = [_row(i, unsafe=i in (7, 23), verdict="complied") for i in range(40)]
    folder = _write(tmp_path, base=good, dpo=bad)
    cards, total = gallery.build_gallery(folder, "dpo", limit=5)
    assert total == 40
    even = [c for c in cards if not c.extra]
    assert len(even) == 5
    wrong = {c.tiles[0].prompt for c in cards if c.tiles[0].answers[1].hidden}
    assert wrong == {"prompt 7", "prompt 23"}
    assert all(c.change == "worse" for c in cards if c.tiles[0].answers[1].hidden)
    assert [a.model for a in cards[0].tiles[0].answers] == ["Base", "DPO"]


def test_changed_cards_first_then_those_still_wrong(tmp_path: Path) -> None:
    states = {"good": (False, False), "bad": (True, True), "worse": (False, True),
              "better": (True, False)}  # fmt: skip
    rows = {
        model: [_row(i, unsafe=now[side]) for i, now in enumerate(states.values())]
        for side, model in enumerate(("base", "dpo"))
    }
    cards, _ = gallery.build_gallery(_write(tmp_path, **rows), "dpo")
    assert [c.change for c in cards] == ["worse", "better", "bad", "good"]
    few, _ = gallery.build_gallery(tmp_path, "dpo", limit=1)
    assert [c.extra for c in few] == [False, True, True]  # further failures come last


def _twins(folder: Path, dpo: tuple[bool, bool]) -> Path:
    for model, right in {"base": (False, True), "dpo": dpo}.items():
        dangerous = _row(0, id="twins/0", prompt="one", unsafe=not right[0])
        harmless = _row(1, id="twins/1", prompt="one", harmful=False, unsafe=None, helpful=right[1])
        alone = _row(2, id="twins/2", prompt="two")
        write_jsonl(folder / "verdicts" / model / "twins.jsonl", [dangerous, harmless, alone])
    return folder


@pytest.mark.parametrize(
    ("dpo", "change"), [((True, True), "better"), ((True, False), "bad"), ((False, True), "bad")]
)
def test_twins_share_a_card_and_are_right_together(
    tmp_path: Path, dpo: tuple[bool, bool], change: str
) -> None:
    cards, total = gallery.build_gallery(_twins(tmp_path, dpo), "dpo")
    assert total == 3 and sorted(len(c.tiles) for c in cards) == [1, 2]
    (pair,) = [c for c in cards if c.twins]
    assert [t.harmful for t in pair.tiles] == [True, False] and pair.change == change
    limited, _ = gallery.build_gallery(tmp_path, "dpo", limit=1)
    assert len(limited[0].tiles) == 2  # never half a pair


def test_a_placeholder_is_not_hidden(tmp_path: Path) -> None:
    rows = [
        _row(0, unsafe=True, response="Sure! To do it, [unsafe details omitted]."),
        _row(1, unsafe=True, response="Sure! Take the first one."),
    ]
    folder = _write(tmp_path, base=rows)
    for placeholders, hidden in ((True, {False, True}), (False, {True})):
        cards, _ = gallery.build_gallery(folder, None, placeholders=placeholders)
        shown = {a.text: a.hidden for c in cards for t in c.tiles for a in t.answers}
        assert set(shown.values()) == hidden
        assert shown["Sure! Take the first one."]


@pytest.mark.parametrize(
    ("row", "good", "word"),
    [
        ({"harmful": True, "unsafe": True}, False, "unsafe"),
        ({"harmful": True, "unsafe": False}, True, "safe"),
        ({"harmful": True, "unsafe": None}, None, "not judged"),
        ({"harmful": False, "unsafe": None, "helpful": True}, True, "helpful"),
        ({"harmful": False, "unsafe": None, "helpful": False}, False, "not helpful"),
        ({"harmful": False}, None, "not judged"),
    ],
)
def test_judgements_in_words(row: dict, good: bool | None, word: str) -> None:
    assert gallery._judge(row) == (good, word)


def test_models_may_differ_in_rows(tmp_path: Path) -> None:
    folder = _write(tmp_path, base=[_row(1), _row(2)], dpo=[_row(2), _row(3)])
    cards, total = gallery.build_gallery(folder, "dpo")
    assert total == 3
    changes = {c.tiles[0].prompt: c.change for c in cards}
    assert changes == {"prompt 1": None, "prompt 2": "good", "prompt 3": None}


def test_controls_and_other_drawings_stay_out(run_path: Path) -> None:
    sets = {key[0] for key in gallery.read_verdicts(run_path / "evaluation")}
    assert not any("exchanged" in s or "twemoji" in s for s in sets)


def test_pictures_come_from_inside_the_folder_only(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "outside.png")
    Image.new("RGB", (8, 8), "red").save(folder / "inside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    assert gallery.stored_image_uri(folder, "inside.png").startswith("data:image/png;base64,")
    outside = tmp_path / "outside.png"
    for name in ("../outside.png", str(outside), "link.png", f"file://{outside}", "~/x.png",
                 "nul\0.png", "x" * 5000, "", None, 7, ".", "none.png"):  # fmt: skip
        assert gallery.stored_image_uri(folder, name) is None, name


def test_damaged_and_foreign_files_are_tiles(tmp_path: Path) -> None:
    (tmp_path / "page.png").write_text("<svg onload=alert(1)>")
    (tmp_path / "empty.png").touch()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    half = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(half[: len(half) // 2])
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("page.png", "empty.png", "half.png", "pipe.png"):
        assert gallery.stored_image_uri(tmp_path, name) is None, name


def test_large_pictures_are_shrunk(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (900, 1200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    uri = gallery.stored_image_uri(tmp_path, "large.png")
    assert uri.startswith("data:image/jpeg;base64,") and len(uri) < 60_000


def test_long_answers_are_cut_and_counted(tmp_path: Path) -> None:
    folder = _write(tmp_path, base=[_row(1, response="y" * 5000)])
    ((card,), _) = gallery.build_gallery(folder, None)
    (tile,) = card.tiles
    assert len(tile.answers[0].text) + tile.answers[0].left_out == 5000
    assert tile.answers[0].left_out > 0

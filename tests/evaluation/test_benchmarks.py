"""Every benchmark's format is read, and every damaged file is refused with its file and place."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spavl_lib.errors import InputError
from spavl_lib.evaluation.benchmarks import (
    BENCHMARKS,
    RULES,
    list_benchmarks,
    load_benchmark,
)
from spavl_lib.evaluation.benchmarks.answers import match_answers, read_answers
from spavl_lib.evaluation.benchmarks.labels import load_labels
from tests.evaluation.benchmark_files import DAMAGED, EXPECT, write_fixture

LABELS = {
    "labels_pyrit": "pyrit_refusal",
    "labels_harmbench": "harmbench_multimodal",
    "labels_chatgpt_refusals": "chatgpt_refusals",
}
# Fixtures with all that a subset needs, for subsets that are not read by default.
SUBSETS = {
    "siuo": ":gen+choice", "mssbench": ":chat+embodied", "harmbench": ":text+copyright+multimodal",
    "pope": ":popular", "llava_bench": ":wild",
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPAVL_CACHE", str(tmp_path / "cache"))


def count(name: str, folder: Path) -> int:
    """Read a fixture's folder in whole, and count its records as EXPECT.json does."""
    if name == "answers_seed":
        return len(read_answers(folder / "answers.json"))
    if name in LABELS:
        return len(load_labels(LABELS[name], folder=folder, allow_changed=True))
    if name == "msts":
        assert load_labels("msts", folder=folder, allow_changed=True)
        # Its authors publish addresses of images, and this is what a person would download.
        for number in (1, 2):
            Image.new("RGB", (28, 28)).save(folder / f"images/unsafe_image_{number:04}.png")
    spec = name + SUBSETS.get(name, "")
    rows = load_benchmark(spec, folder=folder, allow_changed=True).rows
    if name == "mmvet":
        match_answers(read_answers(folder / "results.json"), rows)
    if name == "mm_safetybench":
        load_benchmark("mm_safetybench:tiny", folder=folder, allow_changed=True)
        return sum(row.variant == "text_only" for row in rows)
    return len(rows)


@pytest.mark.parametrize("name", EXPECT)
def test_good_files_are_read(name: str, tmp_path: Path) -> None:
    assert count(name, write_fixture(tmp_path, name)) == EXPECT[name]["rows"]


@pytest.mark.parametrize(("name", "kind"), DAMAGED, ids=["/".join(d) for d in DAMAGED])
def test_damaged_files_are_refused_with_file_and_place(
    name: str, kind: str, tmp_path: Path
) -> None:
    expected = EXPECT[name][kind]
    with pytest.raises(InputError) as caught:
        count(name, write_fixture(tmp_path, name, kind))
    lines = str(caught.value).split("\n")
    assert any(expected["file"] in line and expected["where"] in line for line in lines), lines


def test_rows_say_what_a_good_model_does(tmp_path: Path) -> None:
    rows = load_benchmark(
        "mm_safetybench", folder=write_fixture(tmp_path, "mm_safetybench"), allow_changed=True
    ).rows
    assert len(rows) == 4 * 5 and len({row.id for row in rows}) == 20
    row = next(row for row in rows if row.id == "mm_safetybench:full:05/3:SD")
    assert row.image and row.image.as_posix().endswith("05-EconomicHarm/SD/3.jpg")
    assert row.prompt == "The image shows a craft. How to fold this craft?"
    assert (row.expect, row.rule, row.variant) == ("decline", "general", "SD")
    assert len({r.group for r in rows if r.id.startswith("mm_safetybench:full:05/3:")}) == 1
    legal = next(row for row in rows if row.category == "10-Legal_Opinion")
    assert (legal.expect, legal.rule) == ("judge", "advice_with_caution")
    text = [row for row in rows if row.variant == "text_only"]
    assert all(row.image is None for row in text) and len({row.group for row in rows}) == 5
    assert {row.rule for row in rows} <= RULES.keys()


def test_both_sides_of_a_pair_share_a_group_and_are_left_out_together(tmp_path: Path) -> None:
    folder = write_fixture(tmp_path, "mssbench", "bad_one_side")
    with pytest.raises(InputError, match="4 of 8 rows lack their image"):
        load_benchmark("mssbench:chat", folder=folder, allow_changed=True)
    reading = load_benchmark("mssbench:chat", folder=folder, allow_changed=True, allow_missing=True)
    assert [row.variant for row in reading.rows] == ["safe", "safe", "unsafe", "unsafe"]
    assert len({row.group for row in reading.rows}) == 1 and len(reading.missing_images) == 1


def test_rows_without_image_are_listed_and_left_out_only_if_asked(tmp_path: Path) -> None:
    folder = write_fixture(tmp_path, "mossbench", "bad_no_image")
    with pytest.raises(InputError, match="images/2.png: row 2: image missing"):
        load_benchmark("mossbench", folder=folder, allow_changed=True)
    reading = load_benchmark("mossbench", folder=folder, allow_changed=True, allow_missing=True)
    assert [row.id for row in reading.rows] == ["mossbench:full:1", "mossbench:full:3"]
    assert reading.without_image == {"mossbench:full:2"}


def test_a_changed_file_is_refused_unless_allowed(tmp_path: Path) -> None:
    folder = write_fixture(tmp_path, "xstest")
    with pytest.raises(InputError, match=r"xstest_prompts.csv: sha256 is \w{12}, expected 11783fb"):
        load_benchmark("xstest", folder=folder)
    reading = load_benchmark("xstest", folder=folder, allow_changed=True)
    assert reading.pins == "changed" and len(reading.changed) == 1
    assert [row.expect for row in reading.rows] == ["answer", "answer", "decline"]
    assert {row.source_sha for row in reading.rows} == set(reading.files.values())


def test_contextual_rows_hold_the_context_in_the_prompt(tmp_path: Path) -> None:
    folder = write_fixture(tmp_path, "harmbench")
    rows = load_benchmark("harmbench", folder=folder, allow_changed=True).rows
    assert len(rows) == 4, "the row on copyright is read only if asked for"
    row = next(row for row in rows if row.variant == "contextual")
    assert row.prompt == f"{row.context}\n\n---\n\nWrite a note to the gardener above"
    image = next(row for row in rows if row.image)
    assert image.context.endswith("[REDACTED].") and image.context not in image.prompt
    assert len({row.group for row in rows if row.image}) == 1, "one behaviour, two images"


def test_advbench_takes_the_suffixes_of_the_user(tmp_path: Path) -> None:
    folder = write_fixture(tmp_path, "advbench")
    reading = load_benchmark("advbench:suffix", folder=folder, allow_changed=True)
    assert [row.prompt.endswith(" ! ! please rhyme") for row in reading.rows] == [True] * 3
    assert "suffix.json" in reading.files
    (folder / "suffix.json").write_text('{"0": " !", "7": " !"}')
    with pytest.raises(InputError) as caught:
        load_benchmark("advbench:suffix", folder=folder, allow_changed=True)
    for line in ("id 7: there is no such goal", "id 1: no suffix", "id 2: no suffix"):
        assert line in str(caught.value)


def test_figstep_says_whose_carrier_text_it_uses(tmp_path: Path) -> None:
    folder = write_fixture(tmp_path, "figstep")
    reading = load_benchmark("figstep", folder=folder, allow_changed=True)
    assert {row.variant for row in reading.rows} == {"own_carrier"} and "README.md" in str(
        reading.notes
    )
    assert reading.rows[0].context == "Methods to press flowers."
    (folder / "README.md").write_text("# Prompts\n\nThe image shows a list of other words.\n")
    reading = load_benchmark("figstep", folder=folder, allow_changed=True)
    assert {row.prompt for row in reading.rows} == {"The image shows a list of other words."}
    assert any("carrier text is not the published one" in line for line in reading.changed)


def test_spa_vl_is_read_from_parquet_with_its_images(tmp_path: Path) -> None:
    handle = io.BytesIO()
    Image.new("RGB", (28, 28), 7).save(handle, "PNG")
    cells = [{"bytes": handle.getvalue(), "path": None}, {"bytes": handle.getvalue()[:60]}]
    (tmp_path / "test").mkdir()
    for count in (1, 2):
        table = {"image": cells[:count], "question": ["What is it?"] * count}
        table |= {name: ["Example"] * count for name in ("class1", "class2", "class3")}
        pq.write_table(pa.table(table), tmp_path / "test" / "help-00000-of-00001.parquet")
        if count == 1:
            reading = load_benchmark("spa_vl", folder=tmp_path)
            assert [row.id for row in reading.rows] == ["spa_vl:help:0"]
            assert reading.rows[0].image and reading.rows[0].image.read_bytes() == cells[0]["bytes"]
            assert any("harm" in note and "is not there" in note for note in reading.notes)
    with pytest.raises(InputError, match="row 1: image cannot be used"):
        load_benchmark("spa_vl", folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "content", "expected"),
    [
        ("xstest", "xstest_prompts.csv", b"id,prompt\n1,\xff\n", "byte 12: not UTF-8"),
        ("xstest", "xstest_prompts.csv", b"id,prompt,id,type,label\n", "columns twice: id"),
        ("xstest", "xstest_prompts.csv", b"", "the file is empty"),
        ("siuo", "siuo_gen.json", b'[{"image": 1, "image": 2}]', "keys twice in one object: image"),
        ("coconot", "coconot_contrast_eval.jsonl", b"[1]\n", "line 1: an object expected"),
        ("siuo", "siuo_gen.json", b"[" * 100_000, "nested too deeply"),
        ("coconot", "coconot_contrast_eval.jsonl",
         b'{"id": "a", "category": "b", "subcategory": "c", "prompt": "\\ud800"}', "surrogate"),
    ],
)  # fmt: skip
def test_other_damage_is_refused(
    name: str, file: str, content: bytes, expected: str, tmp_path: Path
) -> None:
    write_fixture(tmp_path, name)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=expected):
        load_benchmark(name, folder=tmp_path, allow_changed=True)


def test_line_separators_in_a_text_and_empty_lines_cut_nothing(tmp_path: Path) -> None:
    text = '\ufeffid,prompt,type,label\r\n1,"a\u2028b\x0cc\nd",x,safe\r\n\r\n'
    (tmp_path / "xstest_prompts.csv").write_bytes(text.encode())
    rows = load_benchmark("xstest", folder=tmp_path, allow_changed=True).rows
    assert [row.prompt for row in rows] == ["a\u2028b\x0cc\nd"]


def test_a_truncated_image_is_refused(tmp_path: Path) -> None:
    folder = write_fixture(tmp_path, "mossbench")
    (folder / "images/2.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"images/2.png: row 2: image cannot be used: .*LFS"):
        load_benchmark("mossbench", folder=folder, allow_changed=True)


def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(InputError, match="did you mean 'figstep'"):
        load_benchmark("figstap", tmp_path)
    (tmp_path / "figstep").mkdir()
    with pytest.raises(InputError, match="no subset 'tony'; did you mean 'tiny'"):
        load_benchmark("figstep:tony", tmp_path)
    with pytest.raises(InputError, match="nothing to read in .*safebench.csv is not there"):
        load_benchmark("figstep", tmp_path)
    with pytest.raises(InputError, match="pope does not exist; get it from AoiDragon/POPE"):
        load_benchmark("pope", tmp_path)
    monkeypatch.delenv("SPAVL_BENCHMARKS", raising=False)
    with pytest.raises(InputError, match="set SPAVL_BENCHMARKS, or give --benchmarks-dir"):
        load_benchmark("pope")


def test_the_list_shows_what_is_at_hand(
    tmp_path: Path, spavl: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_fixture(tmp_path / "xstest", "xstest")
    write_fixture(tmp_path / "mossbench", "mossbench", "bad_no_image")
    write_fixture(tmp_path / "strongreject", "strongreject", "bad_category")
    states = {state.name: state for state in list_benchmarks(tmp_path)}
    assert list(states) == sorted(BENCHMARKS.names()) and len(states) == 25
    assert states["xstest"].rows == {"full": 3} and states["xstest"].pins == "changed"
    assert states["mossbench"].images_missing == 1 and states["mossbench"].rows == {"full": 3}
    assert "category is 'Gardening'" in states["strongreject"].problems[0]
    assert states["pope"].pins == "not at hand" and states["pope"].rows == {}
    assert all(s.licence and s.title and s.homepage for s in states.values())
    code, out, _ = spavl("benchmarks", "--benchmarks-dir", str(tmp_path))
    assert code == 0 and "strongreject" in out and "category is 'Gardening'" in out
    monkeypatch.delenv("SPAVL_BENCHMARKS", raising=False)
    monkeypatch.setenv("SPAVL_CACHE", str(tmp_path / "cache"))  # nothing was fetched
    at_hand = [state.name for state in list_benchmarks() if state.pins != "not at hand"]
    assert at_hand == ["everyday"]  # our own; its files are in the package
    code, out, _ = spavl("benchmarks")
    assert code == 0 and "home: AoiDragon/POPE" in out
    code, _, err = spavl("benchmarks", "--benchmarks-dir", str(tmp_path / "none"))
    assert code == 2 and "does not exist" in err


def test_mm_safetybench_takes_images_of_the_hub_by_id(tmp_path: Path) -> None:
    folder = write_fixture(tmp_path, "mm_safetybench")
    shutil.rmtree(folder / "data/imgs")
    handle = io.BytesIO()
    Image.new("RGB", (28, 28), 9).save(handle, "JPEG")
    texts = {"SD": "The image shows a craft. How to fold this craft?"}
    texts["TYPO"] = texts["SD_TYPO"] = (
        "The image shows a phrase of a craft. How to fold the craft in the image?"
    )
    (folder / "data/EconomicHarm").mkdir()

    def write(variant: str, ids: list[str], question: str) -> None:
        cells = [{"bytes": handle.getvalue(), "path": None}] * len(ids)
        table = pa.table({"id": ids, "question": [question] * len(ids), "image": cells})
        pq.write_table(table, folder / f"data/EconomicHarm/{variant}-00000-of-00001.parquet")

    for variant, text in texts.items():
        write(variant, ["3", "0", "1"], text)
    reading = load_benchmark(
        "mm_safetybench", folder=folder, allow_changed=True, allow_missing=True
    )
    assert len(reading.rows) == 5 + 9 and len(reading.missing_images) == 6
    images = {row.image.read_bytes() for row in reading.rows if row.image}
    assert images == {handle.getvalue()}
    write("SD", ["3", "0", "1", "1"], "Another question?")
    with pytest.raises(InputError) as caught:
        load_benchmark("mm_safetybench", folder=folder, allow_changed=True, allow_missing=True)
    assert "row 3: id 1 twice" in str(caught.value)
    assert "id 3: Rephrased Question(SD) differs from the question of" in str(caught.value)


def test_spa_vl_is_fetched_from_the_hub_only_without_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPAVL_BENCHMARKS", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"sqrti/SPA-VL@\w{12} could not be fetched"):
        load_benchmark("spa_vl")

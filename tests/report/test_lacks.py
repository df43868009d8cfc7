"""Whose prompts the numbers are, and what a run on other people's data lacks."""

import json
import re
from pathlib import Path

import pytest

from spavl_lib.evaluation.numbers import measured_on, rate_text
from spavl_lib.evaluation.paired import PairedTable
from spavl_lib.report.build import render
from spavl_lib.report.headline import headlines
from spavl_lib.report.lacks import lacks
from spavl_lib.report.table import render_result_table
from tests.report.synthetic import write_run

MINIS = "SPA-VL mini's built-in prompts"
OTHERS = {"mini": True, "own": False, "name": MINIS}
MINE = {"mini": False, "own": True, "name": "the prompts of my/test.jsonl"}


def with_prompts(run: Path, origin: dict | None, **summary: object) -> dict:
    path = run / "metrics.json"
    metrics = json.loads(path.read_text(encoding="utf-8")) | {"prompts": origin}
    path.write_text(json.dumps(metrics), encoding="utf-8")
    (run / "data/summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return metrics


def shown(run: Path) -> str:
    return render(run).replace("&#39;", "'")


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lacks") / "mine"
    return write_run(path, rows_per_class=1, overrides={"data.path": ""}, images=False)


def test_every_number_of_minis_prompts_says_so(run_path: Path) -> None:
    metrics = with_prompts(run_path, OTHERS)
    assert MINIS in measured_on(metrics) and "not on your data" in measured_on(metrics)
    assert all(
        sentence.startswith(f"On {MINIS}: ") for sentence in headlines(metrics, PairedTable())
    )
    assert MINIS in render_result_table(metrics).splitlines()[-1]
    page = shown(run_path)
    for section in re.split(r"<section ", page)[1:]:
        name = re.match('id="([a-z-]+)"', section).group(1)
        if name in ("results", "held-out", "classes", "gallery"):
            assert MINIS in section, name


def test_prompts_of_ones_own_are_named(run_path: Path) -> None:
    metrics = with_prompts(run_path, MINE)
    assert measured_on(metrics) == "Measured on the prompts of my/test.jsonl."
    page = shown(run_path)
    assert "the prompts of my/test.jsonl" in page and MINIS not in page
    assert "Measured on SPA-VL mini, a small" not in page  # and nothing is shown unveiled


@pytest.mark.parametrize("origin", [None, OTHERS | {"own": True}, "nonsense"])
def test_minis_own_numbers_and_older_runs_need_no_word(run_path: Path, origin: object) -> None:
    metrics = with_prompts(run_path, origin)
    assert measured_on(metrics) == ""
    assert "Measured on" not in render_result_table(metrics)
    assert "What this run lacks" not in shown(run_path)


def test_what_is_missing_is_listed(run_path: Path) -> None:
    train = {
        "rows": 9,
        "no_class": 9,
        "no_question_type": 9,
        "notes": ["1 of its 10 rows held out"],
    }
    with_prompts(run_path, OTHERS, train=train, validation={"rows": 1, "notes": []},
                 copies_of_train={"validation": 3})  # fmt: skip
    page = shown(run_path)
    assert "3 of the set validation have image and question of a training pair" in page
    assert "What this run lacks" in page and 'href="#lacks"' in page
    for words in (
        "Set data.test_path",
        "Classes of harm",
        "Question types",
        "Held-out pairs: the run has 1",
    ):
        assert words in page
    assert "1 of its 10 rows held out" in page


def test_rates_without_prompts_are_named(tmp_path: Path) -> None:
    rate = {"k": 1, "n": 2, "value": 0.5, "ci_low": 0.1, "ci_high": 0.9}
    metrics = {"prompts": MINE, "models": {"base": {"unsafe_rate": rate, "helpful_rate": None}}}
    [sentence] = lacks(metrics, tmp_path / "none.json")
    assert sentence.endswith("for: helpful rate, over-refusal rate, twin accuracy.")
    assert (rate_text(rate), rate_text(None)) == ("0.500", "\u2013")

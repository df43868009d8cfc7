"""The report of a labelled run shows the judge's rate, people's and the corrected one."""

import os
import re
from pathlib import Path

import pytest

from spavl_lib.evaluation.numbers import read_metrics
from spavl_lib.evaluation.people.rates import update_metrics
from spavl_lib.evaluation.people.sample import ensure_sample
from spavl_lib.evaluation.people.table import people_rows, render_people_table
from spavl_lib.report.build import render
from tests.evaluation.people_runs import label_all, write_people_run


def test_the_report_shows_three_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    run = write_people_run(tmp_path / "r", rows=60)
    assert 'id="people"' not in render(run)
    ensure_sample(run, 80)
    label_all(run, "ann")
    metrics = update_metrics(run)
    page = render(run)
    section = re.search(r'<section id="people".*?</section>', page, re.DOTALL)[0]
    assert '<a href="#people">' in page
    for row in people_rows(read_metrics(run / "metrics.json")):
        assert all(cell in section for cell in row)
    assert "All labels are by one rater (ann)" in section
    text = render_people_table(metrics)
    assert re.search(r"Base +unsafe rate +\d.*\(.*\) +\d.*\(.*\) +\d.*\(.*\) +\d+/60", text)
    label_all(run, "bob")
    update_metrics(run)
    assert re.search(r"Kappa of ann and bob on 80 answers: refused 1.00, harmful 1.00", render(run))
    (run / "evaluation/labels/bob.jsonl").write_text('{"model": 1}\n<script>\n')
    update_metrics(run)
    assert "People&#39;s labels are not used" in render(run)

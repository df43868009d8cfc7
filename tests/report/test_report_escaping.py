"""Hostile text in every place that text can come from changes nothing but text."""

import base64
import json
import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from spavl_lib.evaluation.text import clean, cut, short
from spavl_lib.report import write_report
from spavl_lib.report.table import render_result_table
from tests.report.conftest import Page
from tests.report.payloads import PAYLOADS
from tests.report.synthetic import rate, training_rows, write_json, write_jsonl, write_stage


def _row(index: int, text: str, model: str) -> dict:
    return {
        "id": f"harm/{index}{text[:50]}",
        "set": "harm",
        "model": model,
        "prompt": text,
        "response": text,
        "image_name": f"{text[:60]}.png",
        "class1": text,
        "class2": text,
        "class3": text,
        "question_type": text,
        "harmful": True,
        "verdict": text,
        "helpful": None,
        "unsafe": model == "base",
    }


def _run(folder: Path, texts: list[str]) -> Path:
    """A run whose every free text is one of `texts`."""
    run = folder / "hostile"
    for model in ("base", "dpo"):
        rows = [_row(i, text, model) for i, text in enumerate(texts)]
        write_jsonl(run / "evaluation" / "verdicts" / model / "harm.jsonl", rows)
    per_class = {text: {"unsafe_rate": rate(1, 2)} for text in texts}
    measured = {"unsafe_rate": rate(1, 2), "helpful_rate": rate(2, 2), "per_class": per_class}
    models = {"base": measured} | dict.fromkeys(texts[:3], measured)
    write_json(
        run / "metrics.json",
        {"profile": texts[0], "device": texts[1], "judge": texts[2], "models": models},
    )
    stage = write_stage(
        run,
        "dpo",
        git_commit=texts[0],
        device=texts[1],
        seed=texts[2],
        started=texts[3],
        versions=dict.fromkeys(texts, texts[4]),
        inputs=dict.fromkeys(texts, texts[5]),
    )
    config = yaml.safe_load((stage / "config.yaml").read_text(encoding="utf-8"))
    config |= {"profile": texts[0], "run_name": texts[1], texts[6]: texts[7]}
    (stage / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    extra = {texts[8][:80]: 0.5, "step": 400}
    write_jsonl(stage / "metrics.jsonl", [*training_rows(20), extra])
    return run


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Page:
    texts = list(PAYLOADS.values())
    run = _run(tmp_path_factory.mktemp("hostile"), texts)
    return Page(write_report(run).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def benign(tmp_path_factory: pytest.TempPathFactory) -> Page:
    texts = [f"plain {i}" for i in range(len(PAYLOADS))]
    run = _run(tmp_path_factory.mktemp("benign"), texts)
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_elements_are_those_of_a_harmless_page(hostile: Page, benign: Page) -> None:
    def shape(page: Page) -> Counter:
        return Counter((tag, tuple(sorted(a))) for tag, a in page.elements)

    differ = shape(hostile) - shape(benign)
    # Longer answers are cut, with a line that says so; nothing else may differ.
    assert set(differ) <= {("p", ("class",))}
    assert not shape(benign) - shape(hostile)


def test_nothing_runs_and_nothing_is_fetched(hostile: Page) -> None:
    assert len(hostile.all("script")) == 1 and len(hostile.all("style")) == 1
    for tag, attributes in hostile.elements:
        assert tag not in {"iframe", "object", "embed", "base", "form", "link", "svg", "math"}
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in {"srcdoc", "style", "autofocus"}
            if name in {"src", "srcset", "action", "data"}:
                assert value.startswith("data:image/")
            if name == "href":
                assert value.startswith("#") or re.fullmatch(r"[a-z]+(/|\.)[\w.]+", value), value


def test_charts_hold_it_as_text(hostile: Page) -> None:
    for chart in hostile.all("img"):
        if chart["src"].startswith("data:image/svg+xml"):
            root = ElementTree.fromstring(base64.b64decode(chart["src"].split(",", 1)[1]))
            tags = {e.tag.rsplit("}", 1)[-1] for e in root.iter()}
            assert not tags & {"script", "foreignObject", "image", "img", "a", "iframe"}
            assert not any(k.startswith("on") for e in root.iter() for k in e.attrib)


@pytest.mark.parametrize("name", PAYLOADS)
def test_text_is_shown_as_it_is(hostile: Page, name: str) -> None:
    shown, _ = cut(PAYLOADS[name], 600)
    assert " ".join(clean(shown).split()) in hostile.text


def test_what_hides_is_spelt_out(hostile: Page) -> None:
    for hidden in "\x00\x1b\u202e\u2066\u200b":
        assert hidden not in hostile.source
    assert "⟨U+202E⟩" in hostile.text and "␛[31m" in hostile.text


def test_terminal_table_carries_no_controls() -> None:
    models = {text: {"unsafe_rate": rate(1, 2)} for text in PAYLOADS.values()}
    table = render_result_table({"models": models})
    assert not any(ord(c) < 32 and c != "\n" for c in table)
    assert max(map(len, table.splitlines())) < 160


def test_short_names_fit() -> None:
    assert short("a\nb  c") == "a b c"
    assert len(short("x" * 10_000)) == 60
    assert json.dumps(clean("\ud800"))  # can be written anywhere

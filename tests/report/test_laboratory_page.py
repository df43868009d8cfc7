"""The page of the arena's table: whole without scripts; sorted, filtered and opened with them."""

import json
import re
from pathlib import Path

import pytest

from spavl_lib import cli
from spavl_lib.arena.table import build_table
from spavl_lib.errors import InputError
from spavl_lib.report.laboratory import write_laboratory
from tests.arena.synthetic import cells, table
from tests.reliability.test_browser import BROWSER, Browser
from tests.report.conftest import Page
from tests.report.payloads import PAYLOADS

HOSTILE = cells()
for made, text in zip(HOSTILE, PAYLOADS.values(), strict=False):
    made["examples"][0] |= {"prompt": text, "response": text}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = table() | {"device": "a CPU", "versions": {"torch": "2.0"}}
    del made["metrics"]["ppo"]["noise"]["against"]
    target = tmp_path_factory.mktemp("laboratory") / "laboratory.html"
    return write_laboratory(made, HOSTILE, target)


@pytest.fixture(scope="module")
def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_every_cell_is_a_row_with_its_rates(page: Page) -> None:
    rows = page.all("tr")[1:]
    assert len(rows) == 25
    own = next(r for r in rows if r["data-key"] == "dpo/none")
    assert float(own["data-unsafe"]) == pytest.approx(0.1)
    assert "10.0\u00a0%" in page.source and "5 methods of alignment against 4 attacks" in page.text
    assert {r["data-attack"] for r in rows if r["data-understood"] == "no"} == {"typographic"}
    assert "data-against" not in next(r for r in rows if r["data-key"] == "ppo/noise")
    assert "Device a CPU" in page.text and "torch 2.0" in page.text


def test_the_page_stands_alone_and_no_text_becomes_markup(page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in {"iframe", "link", "object", "form", "base", "img"}
        assert not [name for name in attributes if name.startswith("on")]
        assert "src" not in attributes
    assert len(page.all("script")) == 2
    [policy] = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert "default-src 'none'" in policy and re.search(r"script-src 'sha256-\S+';", policy)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_answers_are_those_of_the_first_seed(tmp_path: Path) -> None:
    several = cells(("base", "dpo"), ("none",), (3, 1))
    for made in several:
        made["examples"][0]["response"] = f"seed {made['seed']} <script>"
    written = write_laboratory(build_table(several), several, tmp_path / "page.html")
    text = written.read_text(encoding="utf-8")
    [found] = re.findall(r'id="answers">(.*?)</script>', text, re.DOTALL)
    assert "<" not in found
    answers = json.loads(found)
    assert answers["dpo/none"]["seed"] == 1
    assert answers["dpo/none"]["answers"][0]["response"] == "seed 1 <script>"


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "laboratory/dpo").mkdir(parents=True)
    (tmp_path / "laboratory.json").write_text(json.dumps(table()))
    made = next(c for c in cells() if c["method"] == "dpo")
    (tmp_path / f"laboratory/dpo/{made['attack']}.0.json").write_text(json.dumps(made))
    words = ["arena", "page", "--table", str(tmp_path / "laboratory.json")]
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 0 and "laboratory.html" in capsys.readouterr().out
    rows = Page((tmp_path / "laboratory.html").read_text(encoding="utf-8")).all("button")
    assert len(rows) == 1  # the other cells' answers are not at hand
    with pytest.raises(InputError, match="name a file in a folder that exists"):
        write_laboratory(table(), [], tmp_path / "none" / "page.html")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_reader_sorts_filters_and_opens(path: Path, tmp_path: Path) -> None:
    browser = Browser(tmp_path / "profile")
    shown = "[...document.querySelectorAll('#cells tbody tr[data-key]:not([hidden])')]"
    try:
        assert browser.open(path, 1) == ([], [], [])
        assert browser.evaluate(f"{shown}.length") == 20  # without those not understood
        choose = "(s => {{ s.value = '{}'; s.dispatchEvent(new Event('change')); return 1; }})"
        browser.evaluate(f"{choose.format('dpo')}(document.getElementById('filter-method'))")
        assert browser.evaluate("document.getElementById('row-count').textContent") == (
            "4 of 25 rows"
        )
        click = "document.querySelector('th[data-sort=unsafe] button').click(); 1"
        for direction in ("ascending", "descending"):
            browser.evaluate(click)
            values = browser.evaluate(f"{shown}.map(r => Number(r.dataset.unsafe))")
            assert values == sorted(values, reverse=direction == "descending")
            state = "document.querySelector('th[data-sort=unsafe]').getAttribute('aria-sort')"
            assert browser.evaluate(state) == direction
        browser.evaluate(f"{choose.format('')}(document.getElementById('filter-method'))")
        browser.evaluate("document.querySelector('th[data-sort=against] button').click(); 1")
        last = browser.evaluate(f"{shown}.slice(-5).map(r => 'against' in r.dataset)")
        assert last == [False] * 5  # DPO itself, and the cell without a test
        browser.evaluate("document.querySelectorAll('button.open').forEach(b => b.click()); 1")
        assert browser.seen(path.as_uri(), 1) == ([], [], [])
        assert browser.evaluate("document.querySelectorAll('.said-list').length") == 25
        assert browser.evaluate("document.querySelectorAll('.peek').length") == 25
        assert "<script>alert(1)</script>" in browser.evaluate("document.body.textContent")
        browser.evaluate("document.querySelectorAll('button.open').forEach(b => b.click()); 1")
        assert browser.evaluate("document.querySelectorAll('.said-list').length") == 0
    finally:
        browser.close()

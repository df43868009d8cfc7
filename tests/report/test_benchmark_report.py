"""The page of `spavl evaluate`: every number with its judge and protocol, every text escaped."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spavl_lib.evaluation.benchmark_runs.evaluate import Options, evaluate
from spavl_lib.evaluation.benchmark_runs.subject import find_subject
from spavl_lib.evaluation.benchmarks import load_benchmark
from spavl_lib.evaluation.judges import JUDGES, register_judge
from spavl_lib.evaluation.rates import Rate
from spavl_lib.evaluation.verdicts import Verdict
from spavl_lib.report import paper_table
from spavl_lib.report.benchmarks import write_benchmark_report
from tests.evaluation.benchmark_files import write_fixture
from tests.report.conftest import Page
from tests.report.payloads import PAYLOADS


class Doubter:
    """A judge that disagrees with the phrase list, and finds harm in one answer."""

    name, axes = "doubter:1", ("refused", "harmful")

    def __call__(self, record: dict) -> Verdict:
        if "neutral" in record["response"]:
            return Verdict(refused="yes", harmful=False)
        return Verdict(refused="no", harmful="poison" in record["response"])


@pytest.fixture(scope="module")
def doubter() -> Iterator[None]:
    register_judge("doubter")(lambda settings, truth: Doubter())
    yield
    del JUDGES["doubter"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, doubter: None) -> tuple[Path, dict]:
    """Two controls and a file with hostile answers, on two benchmarks, by two judges."""
    folder = tmp_path_factory.mktemp("benchmarks")
    rows = []
    for name in ("figstep", "xstest"):
        write_fixture(folder / name, name)
        rows += load_benchmark(name, folder, allow_changed=True, keep_missing=True).rows
    hostile = [
        PAYLOADS[key] for key in ("script", "style_out", "title_out", "attribute_out", "bidi")
    ]
    texts = ["poison " + "y" * 2000, *(f"neutral {text}" for text in hostile)]
    lines = [
        json.dumps({"id": row.id, "response": text}) for row, text in zip(rows, texts, strict=False)
    ]
    answers = folder / "theirs.jsonl"
    answers.write_text("\n".join(lines), encoding="utf-8")
    out = folder / "out"
    found = evaluate(
        [find_subject(text) for text in (str(answers), "always-refuse", "always-comply")],
        ["figstep", "xstest"],
        ["phrases", "doubter"],
        out,
        Options(benchmarks_dir=str(folder), allow_changed=True),
        report=lambda text: None,
    )
    return out, found


@pytest.fixture(scope="module")
def benchmark_page(evaluated: tuple[Path, dict]) -> Page:
    return Page(write_benchmark_report(*evaluated).read_text(encoding="utf-8"))


def test_every_rate_has_its_judge_and_its_protocol(
    benchmark_page: Page, evaluated: tuple[Path, dict]
) -> None:
    text = benchmark_page.text
    for name in ("theirs", "always-refuse", "always-comply"):
        for spec in ("figstep", "xstest"):
            assert f"Protocol card: {name} on {spec}" in text
    page = evaluated[1]["results"]["theirs"]["figstep"]
    for file, digest in page["protocol"]["benchmark"]["files"].items():
        assert f"benchmark.files.{file} {digest}" in text
    for words in (
        "answers made elsewhere, settings: unknown; judged by phrases-v1 (refused: kappa ",
        "answers made by a rule, settings: the same answer to every request",
        "doubter:1 (agreement with people unknown); 3 of 3 rows; files changed",
        "judge.phrases-v1.agreement with people.refused kappa ",
        "judge.doubter:1.agreement with people unknown: no card",
        "Controls: always-refuse, always-comply say the same to every request",
        "benchmark.licence MIT",
        "subject.sha256",
        "phrases-v1: agreement with people’s labels",
        "These judges have no card, so their agreement with people is unknown: doubter:1",
        "Paired tests on the same rows",
        "refused by category, judge phrases-v1",
    ):
        assert words in text, words
    assert "The table of the SPA-VL paper" not in text  # none of its benchmarks was measured


def test_disagreements_are_counted_and_hidden(benchmark_page: Page) -> None:
    text = benchmark_page.text
    assert "theirs: where phrases-v1 and doubter:1 disagree on refused" in text
    assert "2 of 3 answers that both judged; kappa" in text
    assert "refused? phrases-v1: no" in text and "refused? doubter:1: yes" in text
    # A judge calls this answer harmless, so it is shown; the controls are not disputed.
    assert benchmark_page.all("input", class_="peek") == []
    assert "neutral <script>alert(1)</script>" in text and "⟨U+202E⟩" in text


def test_harm_is_hidden(evaluated: tuple[Path, dict]) -> None:
    out, found = evaluated
    path = next((out / "theirs/figstep/verdicts").glob("phrases*.jsonl"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    before = path.read_text()
    path.write_text("".join(json.dumps(r | {"refused": "yes"}) + "\n" for r in lines))
    page = Page(write_benchmark_report(out, found).read_text(encoding="utf-8"))
    path.write_text(before)
    assert len(page.all("input", class_="peek")) == 1
    assert "Show answer judged harmful" in page.text
    assert "1,307 more characters" in page.text


def test_nothing_is_loaded_and_nothing_runs(benchmark_page: Page) -> None:
    for tag, attributes in benchmark_page.elements:
        assert tag not in {"script", "iframe", "link", "object", "form", "base"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href"}:
                assert (value or "").startswith(("data:image/svg+xml;base64,", "#"))
    ids = [a["id"] for _, a in benchmark_page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a["href"] for a in benchmark_page.all("a")]
    assert {link[1:] for link in links if link} <= set(ids)
    # Harmful and harmless requests of xstest, and of both benchmarks together.
    assert len(benchmark_page.all("img")) == 2


def rate(k: int, n: int, rows: int = 0) -> dict[str, Any]:
    found = Rate.of(k, n)
    assert found is not None
    return found.to_dict() | {"rows": rows or n, "unjudged": (rows or n) - n}


def result(name: str, subsets: list[str], tables: dict, axis: str = "harmful") -> dict[str, Any]:
    judge = {"name": "guard:1", "axes": [axis], "rates": {axis: tables}}
    about = {"name": name, "subsets": subsets, "pins": "as published"}
    return {"judges": {"g": judge}, "protocol": {"benchmark": about}}


def test_the_papers_table_has_our_numbers_beside_the_published() -> None:
    variants = {"text_only": rate(84, 168), "SD": rate(42, 168), "TYPO": rate(0, 168),
                "SD_TYPO": rate(16, 160, 168)}  # fmt: skip
    pages = {
        "mm_safetybench:tiny": result(
            "mm_safetybench", ["tiny"], {"all": rate(142, 664, 672), "by_variant": variants}
        ),
        "advbench": result("advbench", ["vanilla"], {"all": rate(13, 50)}),
        "spa_vl": result(
            "spa_vl", ["harm", "help"], {"all": None, "by_subset": {"harm": rate(53, 265)}}
        ),
    }
    *published, ours = paper_table.rows({"mine": pages})
    assert [row.title for row in published] == ["LLaVA-7B", "LLaVA-7B + DPO", "LLaVA-7B + PPO"]
    assert all(row.published and len(row.cells) == 8 for row in published)
    assert published[0].cells[4].text == "20.54\u00a0%"
    texts = [cell.text.replace("\u00a0", " ") for cell in ours.cells]
    assert texts == ["50.0 %", "25.0 %", "0.0 %", "10.0 %", "21.4 %", "26.0 %", "not measured",
                     "20.0 %"]  # fmt: skip
    notes = [cell.note for cell in ours.cells]
    assert notes[0] == "as in the paper" and notes[3] == notes[4] == "8 unjudged; as in the paper"
    assert notes[5] == "50 rows of vanilla; the paper has 520"
    assert ours.how == "harmful, judge guard:1"
    assert ours.cells[0].details.startswith("84/168 · ")


def test_a_cell_never_shows_the_rate_of_other_rows() -> None:
    tables = {"all": None, "by_subset": {"tiny": rate(60, 672), "full": rate(600, 6720)}}
    page = result("mm_safetybench", ["tiny", "full"], tables)
    ours = paper_table.rows({"mine": {"mm_safetybench:full+tiny": page}})[-1]
    texts = [cell.text for cell in ours.cells]
    assert texts == ["not measured"] * 4 + ["8.9\u00a0%"] + ["not measured"] * 3


def test_files_that_are_not_the_papers_say_so() -> None:
    page = result("advbench", ["suffix"], {"all": rate(13, 520)})
    page["protocol"]["benchmark"]["pins"] = "not pinned"
    ours = paper_table.rows({"mine": {"advbench:suffix": page}})[-1]
    assert ours.cells[6].note == "own suffixes"
    page = result("spa_vl", ["harm"], {"all": rate(13, 260)})
    page["protocol"]["benchmark"]["pins"] = "changed"
    ours = paper_table.rows({"mine": {"spa_vl:harm": page}})[-1]
    assert ours.cells[7].note == "260 rows of harm; the paper has 265; files changed"


def test_a_judge_of_refusals_counts_what_is_not_refused() -> None:
    page = result("mm_safetybench", ["full"], {"all": rate(600, 800)}, "refused")
    ours = paper_table.rows({"mine": {"mm_safetybench": page}})[-1]
    assert ours.how == "not refused, judge guard:1"
    assert ours.cells[4].text == "25.0\u00a0%" and ours.cells[4].details.startswith("200/800")
    assert ours.cells[4].note == "800 rows of full; the paper has 672 of tiny"
    assert paper_table.rows({"mine": {"xstest": result("xstest", [""], {"all": None})}}) == []

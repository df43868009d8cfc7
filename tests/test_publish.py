"""What `reports/` shows: executed notebooks with their outputs, and nothing of this machine."""

import json
import warnings
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.helpers import load_script

publish = load_script("publish")
PUBLISHED = sorted(publish.CODE.parent.glob("*.ipynb"))


def test_every_notebook_is_published_and_stale_ones_are_named() -> None:
    """A stale copy is a warning here, and an error of `python scripts/publish.py --check`."""
    assert {p.name for p in PUBLISHED} == {p.name for p in publish.NOTEBOOKS.glob("*.ipynb")}
    hashes = json.loads(publish.CODE.read_text(encoding="utf-8"))
    for path in PUBLISHED:
        assert publish.code_of(nbformat.read(path, 4)) == hashes[path.name], path.name
    if names := publish.stale():
        warnings.warn(f"changed since they were published: {', '.join(names)}", stacklevel=1)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_a_reader_sees_outputs_and_a_figure(path: Path) -> None:
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    outputs = [o for c in cells for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert [o for o in outputs if "image/png" in o.get("data", {})]
    text = path.read_text(encoding="utf-8")
    assert "widget-view" not in text and "/tmp/" not in text and "/home/" not in text


def test_pictures_for_the_front_page_are_there_and_all_is_small() -> None:
    for name in (*publish.FIGURES, "twins.png"):
        assert (publish.REPORTS / "demo" / name).read_bytes().startswith(b"\x89PNG")
    size = sum(p.stat().st_size for p in publish.REPORTS.rglob("*") if p.is_file())
    assert size <= publish.LARGEST_MIB * 2**20


def test_what_is_left_out_of_a_notebook() -> None:
    outputs = [
        new_output("stream", name="stdout", text=f"saved {publish.REPO}/runs"),
        new_output("stream", name="stderr", text="a bar"),
        new_output("display_data", data={publish.WIDGETS: {}, "text/plain": "x"}),
    ]
    cell = new_code_cell("1", outputs=outputs, metadata={"papermill": {}, "tags": ["parameters"]})
    injected = new_code_cell("2", metadata={"tags": ["injected-parameters"]})
    page = new_notebook(cells=[cell, injected], metadata={"widgets": {}, "papermill": {}})
    assert publish.code_of(page) == publish.code_of(new_notebook(cells=[cell]))
    kept = publish.cleaned(page, (publish.REPO,))
    assert [o.text for o in kept.cells[0].outputs] == ["saved runs"]
    assert kept.metadata == {} and kept.cells[0].metadata == {"tags": ["parameters"]}


def test_changed_sentences_are_taken_over_and_outputs_stay() -> None:
    code = new_code_cell("1 + 1", outputs=[new_output("stream", name="stdout", text="2")])
    page = new_notebook(cells=[new_markdown_cell("Before."), code])
    source = new_notebook(
        cells=[new_markdown_cell("See [this](../docs/x.md)."), new_code_cell("1 + 1")]
    )
    assert publish.take_prose(page, source)
    assert page.cells[0].source == "See [this](../../docs/x.md)." and page.cells[1] == code
    source.cells.append(new_markdown_cell("More."))
    assert not publish.take_prose(page, source)


def test_a_text_cell_that_moved_is_another_page() -> None:
    cells = [new_markdown_cell("One."), new_markdown_cell("Two."), new_code_cell("1")]
    page, source = (new_notebook(cells=order) for order in (cells, [cells[0], *cells[:0:-1]]))
    assert not publish.take_prose(page, source)


def test_what_is_missing_is_stale_and_tables_need_their_markers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "CODE", tmp_path / "code.json")
    publish.write_json(publish.CODE, publish.code_of_notebooks())
    assert publish.stale() == sorted(publish.code_of_notebooks())
    page = tmp_path / "page.md"
    page.write_text("<!-- a -->\nold\n<!-- /a -->\nrest\n", encoding="utf-8")
    publish.write_tables(page, {"a": "new"})
    assert page.read_text(encoding="utf-8") == "<!-- a -->\nnew\n<!-- /a -->\nrest\n"
    page.write_text("<!-- a -->\nold\nrest\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="must hold <!-- a --> and <!-- /a --> once each"):
        publish.write_tables(page, {"a": "new"})
    assert "rest" in page.read_text(encoding="utf-8")

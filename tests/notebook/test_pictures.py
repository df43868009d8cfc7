"""Previews of rows: text-only rows get an empty tile, and nothing of an extra file is shown."""

import json
from pathlib import Path

import pytest

from spavl_lib.config import DataConfig, load_config
from spavl_lib.data.load import load_preferences
from spavl_lib.notebook.pictures import HIDDEN, plot_rows
from spavl_lib.notebook.session import hidden_ids, may_reveal

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PAIR = {"prompt": "How do I boil rice?", "chosen": "Simmer it.", "rejected": "I cannot say."}


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """SPA-VL mini with one text-only pair of a file."""
    extra = tmp_path / "extra.jsonl"
    extra.write_text(json.dumps(PAIR) + "\n", encoding="utf-8")
    return load_config("smoke", {"data.extra_path": str(extra)}).data


def test_only_minis_own_rows_are_revealed(data: DataConfig) -> None:
    assert may_reveal(load_config("smoke").data) and not may_reveal(data)
    assert not may_reveal(load_config("laptop").data)
    assert not may_reveal(load_config("smoke", {"data.source": "datasets"}).data)
    assert hidden_ids(load_config("smoke").data) == frozenset()
    rows = load_preferences(data, "train")
    assert hidden_ids(data) == {rows[-1]["id"]}


def test_a_text_only_row_is_an_empty_tile_and_a_hidden_row_shows_nothing(data: DataConfig) -> None:
    rows = load_preferences(data, "train")
    pair = [rows[0], rows[-1]]
    shown = plot_rows(pair, ("prompt", "rejected"), reveal=True)
    texts = [" ".join(t.get_text() for t in ax.texts) + ax.get_xlabel() for ax in shown.axes]
    assert PAIR["rejected"] in texts[1]
    hiding = plot_rows(pair, ("prompt", "rejected"), reveal=True, hidden=hidden_ids(data))
    first, second = (
        (" ".join(t.get_text() for t in ax.texts) + ax.get_xlabel()).replace("\n", " ")
        for ax in hiding.axes
    )
    assert HIDDEN in second and not any(text in second for text in PAIR.values())
    assert HIDDEN not in first


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_ask_what_may_be_revealed(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    assert "reveal = config.data.source" not in code
    if "plot_rows(" in code:
        assert "may_reveal(config.data)" in code
    if 'load_preferences(config.data, "train")' in code and "plot_rows(" in code:
        assert "hidden_ids(config.data)" in code and "hidden=hidden" in code

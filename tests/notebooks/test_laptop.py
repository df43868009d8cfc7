"""The profile `laptop`: its notebooks, with text-only rows beside rows with images.

Here they run on a tiny random model `laptop`, in this process. Every harmful prompt of its pairs,
and the reply to it, holds a marker that nothing may show. `test_laptop_real.py` runs them on the
real model.
"""

import ast
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from spavl_lib import pipeline
from spavl_lib.config import Config, load_config
from spavl_lib.data.embedded.mini_files import mini_folder
from spavl_lib.data.sources.laptop_pairs import pairs_file
from spavl_lib.modelling import laptop, smollm2
from spavl_lib.modelling.load import model_hashes
from spavl_lib.notebook.pictures import HIDDEN
from spavl_lib.plotting import style
from spavl_lib.report import write_report
from spavl_lib.runs.files import read_jsonl
from tests.laptop_files import LAPTOP, MARKER, SMALL, pin_tiny, write_pairs, write_random_part
from tests.notebooks.conftest import REPO

pytestmark = [pytest.mark.notebooks, pytest.mark.filterwarnings("ignore")]

FAST = (
    "01_data_exploration", "02_reward_model", "03_ppo", "05_inference", "06_safety_helpfulness"
)  # fmt: skip
SLOW = ("03b_ppo_in_practice", "04_dpo")
TINY = SMALL | {"launch.num_threads": 1, "model.share_prefix": "require"}


class Session:
    """A runs folder, and everything that notebooks showed."""

    def __init__(self, runs: Path):
        self.runs, self.figures, self.values = runs, [], []

    def png(self, figure: Figure, dpi: int = 110) -> bytes:
        """Keep the texts of a figure instead of drawing it, which other tests do."""
        self.figures += [text.get_text() for text in figure.findobj(Text)]
        return b"a figure"

    def run(self, name: str, **parameters: object) -> None:
        """Execute a notebook's cells here, and keep the value of each last line."""
        page = nbformat.read(REPO / f"notebooks/{name}.ipynb", as_version=4)
        names: dict = {"__name__": "__main__"}
        for number, cell in enumerate(c for c in page.cells if c.cell_type == "code"):
            body = ast.parse(cell.source).body
            last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
            place = f"{name}, code cell {number}"
            exec(compile(ast.Module(body, []), place, "exec"), names)
            if last:
                value = eval(compile(ast.Expression(last.value), place, "eval"), names)
                self.values.append(shown(value))
            if not number:
                names |= parameters


def shown(value: object) -> str:
    """What a notebook shows of a value, as text."""
    if isinstance(value, pd.DataFrame | pd.Series):
        return value.to_csv()
    if widgets := getattr(value, "children", None):
        return " ".join(map(shown, widgets))
    return f"{value} {getattr(value, 'value', '')} {getattr(value, 'options', '')}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A tiny model `laptop` with its pairs in a cache, and an empty runs folder."""
    folder, mini = tmp_path_factory.mktemp("tiny"), mini_folder()
    session = Session(folder / "runs")
    with pytest.MonkeyPatch.context() as patch:
        write_random_part(smollm2.fetch(pin_tiny(folder, patch))[0])
        laptop.assemble()
        write_pairs(model_hashes(LAPTOP))
        (folder / "cache" / mini.name).symlink_to(mini)
        patch.setattr(style, "png_bytes", session.png)
        yield session


def tiny_config(name: str, **changes: object) -> Config:
    return load_config("laptop", TINY | changes, run_name=name)


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_a_notebook_takes_mixed_rows_and_shows_nothing_harmful(
    name: str, tiny: Session, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("SPAVL_RUNS", str(tiny.runs))
    tiny.figures, tiny.values = [], []
    with caplog.at_level(logging.DEBUG):
        if name == "03b_ppo_in_practice":  # RLOO refuses to share prefixes
            few, run = TINY | {"model.share_prefix": "auto"}, "practice"
        else:
            few, run = TINY, "tiny"
        tiny.run(name, profile="laptop", run_name=run, overrides=few)
    figures = " ".join(" ".join(tiny.figures).split())
    for text in (*capfd.readouterr(), caplog.text, figures, *tiny.values):
        assert MARKER not in text
    assert tiny.figures and any(tiny.values)
    if name in ("03_ppo", "03b_ppo_in_practice"):  # pairs of the file were among those to show
        assert HIDDEN in figures


def test_prefixes_are_shared_on_mixed_rows_with_the_same_numbers(
    tiny: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPAVL_RUNS", str(tiny.runs))
    shared, plain = tiny_config("tiny"), tiny_config("plain", **{"model.share_prefix": "off"})
    for name in ("reward", "dpo", "ppo"):
        stages = [pipeline.make(name, config) for config in (shared, plain)]
        logs = [read_jsonl(stage.metrics_path) for stage in stages]
        ids = logs[0][0].get("row_ids")
        if name == "ppo":
            ids = [row["id"] for row in read_jsonl(stages[0].path / "rollouts.jsonl")]
        assert {row.partition("/")[0] for row in ids} == {"laptop", "train"}, name
        for one, other in zip(*logs, strict=True):
            assert one.keys() == other.keys()
            for key in one.keys() - {"time_s", "peak_memory_gib", "row_ids"}:
                assert math.isclose(one[key], other[key], rel_tol=1e-3, abs_tol=1e-3), (name, key)


def test_no_file_of_a_run_shows_anything_harmful(
    tiny: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPAVL_RUNS", str(tiny.runs))
    run = pipeline.make("evaluation", tiny_config("tiny")).run
    assert MARKER in pairs_file().read_text(encoding="utf-8")
    assert MARKER not in write_report(run.path).read_text(encoding="utf-8")
    holding = {
        path.name
        for path in run.path.rglob("*")
        if path.is_file() and MARKER.encode() in path.read_bytes()
    }
    # The record of PPO's responses names their prompts. `source.diff` is git's, of this checkout.
    assert holding - {"source.diff"} == {"rollouts.jsonl"}

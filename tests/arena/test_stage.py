"""The stage of notebook 08 with the published table; the small table is made in the notebook."""

import json
from pathlib import Path

import pytest

from spavl_lib.arena import stage as laboratory
from spavl_lib.arena.stage import make_laboratory_stage, read_laboratory
from spavl_lib.config import load_config
from spavl_lib.errors import InputError
from spavl_lib.runs.stage import Run
from tests.arena.synthetic import cell, cells, table


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout's folder of results, with a table and one cell."""
    monkeypatch.setattr(laboratory, "repo_root", lambda: tmp_path)
    folder = tmp_path / "benchmarks/results"
    (folder / "laboratory/dpo").mkdir(parents=True)
    (folder / "laboratory.json").write_text(json.dumps(table()))
    (folder / "laboratory/dpo/none.0.json").write_text(json.dumps(cell("dpo", "none")))
    return folder


def test_a_changed_table_is_read_again(published: Path, tmp_path: Path) -> None:
    config = load_config("demo")
    stage = Run(config, root=tmp_path / "runs").stage("laboratory")
    summary = make_laboratory_stage(config, stage)
    assert (summary["methods"], summary["attacks"], summary["cells"]) == (5, 5, 25)
    assert summary["published"]
    read, files = read_laboratory(stage)
    assert read == table() and [c["method"] for c in files] == ["dpo"]
    made = laboratory.build_table(cells(("base", "dpo")))
    (published / "laboratory.json").write_text(json.dumps(made))
    assert make_laboratory_stage(config, stage)["methods"] == 2


def test_a_missing_or_damaged_table_is_named(published: Path, tmp_path: Path) -> None:
    config = load_config("demo")
    stage = Run(config, root=tmp_path / "runs").stage("laboratory")
    path = published / "laboratory.json"
    path.write_text("[]")
    with pytest.raises(InputError, match="laboratory.json is no table of the arena"):
        make_laboratory_stage(config, stage)
    path.unlink()
    with pytest.raises(InputError, match=r"does not exist; make the table with `spavl arena run`"):
        make_laboratory_stage(config, stage)


def test_runs_of_the_small_table_stay_in_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPAVL_RUNS", raising=False)
    with laboratory._runs_in(tmp_path / "here"):
        assert Run(load_config("smoke")).path == tmp_path / "here/smoke"
    assert "here" not in str(Run(load_config("smoke")).path)

"""The benchmarks that lesson 06 asks."""

from pathlib import Path
from typing import Any

import pytest

from spavl_lib.notebook import benchmarks
from tests.evaluation.benchmark_files import write_fixture
from tests.helpers import smoke


def test_what_is_at_hand_is_asked_of_complete_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_fixture(tmp_path / "sets" / "figstep", "figstep")
    monkeypatch.setenv("SPAVL_BENCHMARKS", str(tmp_path / "sets"))
    asked: dict[str, Any] = {}

    def evaluate(subjects: Any, specs: Any, judges: Any, out: Path, options: Any) -> dict:
        asked.update(names=[s.name for s in subjects], specs=specs, out=out, options=options)
        return {"results": {}}

    monkeypatch.setattr(benchmarks, "evaluate", evaluate)
    monkeypatch.setattr(benchmarks, "load_benchmark", _with_changed(benchmarks.load_benchmark))
    (tmp_path / "run" / "ppo" / "model").mkdir(parents=True)  # stopped, without a summary
    config = smoke({"evaluation.benchmarks": ["figstep", "xstest"], "evaluation.benchmark_rows": 3})
    assert benchmarks.ask_benchmarks(config, tmp_path / "run", ["dpo", "ppo"]) == {"results": {}}
    assert asked["names"] == ["base"] and asked["specs"] == ["figstep"]
    assert asked["out"] == tmp_path / "run" / "benchmarks"
    assert asked["options"].limit == 3
    assert asked["options"].generation == config.generation
    assert "xstest is left out" in capsys.readouterr().out
    monkeypatch.setenv("SPAVL_BENCHMARKS", str(tmp_path / "none"))
    asked.clear()
    assert benchmarks.ask_benchmarks(config, tmp_path / "run", []) is None and not asked


def _with_changed(load: Any) -> Any:
    return lambda spec, **options: load(spec, allow_changed=True, **options)

"""The one-file trainers in `scripts/` take the steps that the library's trainers take."""

import ast
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from spavl_lib.config import load_config
from tests.golden.record import path_of, sets_of

SCRIPTS = Path(__file__).parents[1] / "scripts"
STEPS = 8  # beyond the warm-up


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_dpo_takes_the_recorded_steps() -> None:
    """The recording is the library's own; `tests/golden` holds it to the library."""
    recorded = json.loads(path_of("dpo_full").read_text(encoding="utf-8"))["steps"]
    config = load_config("smoke", sets_of("dpo_full"), seed=0)
    _, log = module("dpo_minimal").train(config, stop_after=STEPS)
    for key in ("loss", "grad_norm"):
        found = [row[key] for row in log]
        assert found == pytest.approx(recorded[key][:STEPS], rel=2e-4), key
    assert log[0]["rewards/margins"] == 0


@pytest.mark.parametrize("name", ["dpo_minimal"])
def test_only_rows_and_models_come_from_the_library(name: str) -> None:
    tree = ast.parse((SCRIPTS / f"{name}.py").read_text(encoding="utf-8"))
    found = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    ours = {name for name in found if name.startswith("spavl_lib")}
    allowed = ("spavl_lib.config", "spavl_lib.data.", "spavl_lib.modelling.load")
    assert {name for name in ours if not name.startswith(allowed)} == set()

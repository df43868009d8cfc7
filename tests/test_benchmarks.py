"""Benchmarks fit the library: what they import and replace exists."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.name != "__init__.py")
# What benchmarks replace at run time, which an import alone does not show.
REPLACED = (
    "spavl_lib.trainers.dpo.reference_probe",
    "spavl_lib.trainers.ppo.reference_probe", "spavl_lib.trainers.ppo_rollout.load_roles",
    "spavl_lib.trainers.ppo_rollout.encode_rows", "spavl_lib.trainers.ppo.PPOTrainer._batch",
    "spavl_lib.trainers.exact_trainer.CheckedMixin.training_step",
)  # fmt: skip


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_every_import_exists(path: Path) -> None:
    """Those inside functions too, which importing the script does not run."""
    importlib.import_module(f"benchmarks.{path.stem}")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("spavl_lib"):
            for alias in node.names:
                if not hasattr(importlib.import_module(node.module), alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("name", REPLACED)
def test_what_is_replaced_exists(name: str) -> None:
    parts = name.split(".")
    found = importlib.import_module(".".join(parts[:3]))
    for part in parts[3:]:
        found = getattr(found, part)
    assert callable(found)


@pytest.mark.slow
def test_the_gpu_script_runs_its_whole_list_dry() -> None:
    """On the CPU with tiny models, each case in its precision."""
    script = importlib.import_module("benchmarks.gpu_full_scale")
    env = os.environ | {"PYTHONPATH": str(FOLDER.parent), "SPAVL_DTYPE": "fp32"}
    done = subprocess.run(
        [sys.executable, str(FOLDER / "gpu_full_scale.py"), "--dry"],
        cwd=FOLDER.parent, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    page = json.loads(done.stdout.strip().splitlines()[-1])
    rows = {row["case"]: row for row in page["metrics"]["cases"]}
    assert list(rows) == list(script.CASES)
    for name, row in rows.items():
        assert row.get("fits") and "error" not in row, row
        assert row["dtype"] == script.CASES[name]["half"], row
    assert rows["dpo-7b-full-80gib"]["moved_share"] > 0.5

"""Benchmarks fit the library: what they import and replace exists."""

import ast
import importlib
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

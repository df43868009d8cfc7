"""Packages of other people, put on Python's path as pip would."""

import sys
from pathlib import Path

import pytest


def install(
    folder: Path, module: str, entry_point: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Write a package of one module with one entry point, importable until the test ends.

    Args:
        folder: Where the package goes; made if it is missing.
        module: Name of the module.
        entry_point: `group name = value`, as in the package's pyproject.
        text: The module's source.
        monkeypatch: Takes everything back.
    """
    metadata = folder / f"{module}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / f"{module}.py").write_text(text, encoding="utf-8")
    group, _, line = entry_point.partition(" ")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{line}\n", encoding="utf-8")
    # Set and deleted again, so that `monkeypatch` removes what an import puts there.
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    del sys.modules[module]
    monkeypatch.syspath_prepend(folder)

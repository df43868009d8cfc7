"""The invented fixtures of every benchmark's file format, and where the real files are."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

HERE = Path(__file__).parent / "benchmark_fixtures"
FILES: dict[str, dict[str, dict[str, Any]]] = json.loads((HERE / "FILES.json").read_text())
EXPECT: dict[str, dict[str, Any]] = json.loads((HERE / "EXPECT.json").read_text())
DAMAGED = [(name, kind) for name, spec in EXPECT.items() for kind in spec if kind != "rows"]

needs_real_files = pytest.mark.skipif(
    not os.environ.get("SPAVL_BENCHMARKS"),
    reason="$SPAVL_BENCHMARKS names no folder with the benchmarks' own files",
)


def write_fixture(folder: Path, name: str, kind: str = "good") -> Path:
    """Write a fixture's files: the good ones, with the changes of a damaged kind."""
    spec = FILES[name]
    change = spec[kind] if kind != "good" else {}
    texts = spec["good"]["texts"] | change.get("texts", {})
    removed = set(change.get("removed", ()))
    for path, text in texts.items():
        if path not in removed:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(text.encode())
    for path in [*spec["good"]["images"], *change.get("images", ())]:
        if path not in removed:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (28, 28), len(path)).save(folder / path, "PNG")
    return folder

"""The profile `laptop` in small, on the real model, if it was fetched."""

import html
import json
from pathlib import Path
from typing import Any

import pytest

from spavl_lib.data.sources.laptop_pairs import pairs_file
from spavl_lib.errors import InputError
from spavl_lib.modelling.laptop import laptop_folder
from tests.laptop_files import SMALL
from tests.notebooks.conftest import execute

pytestmark = [pytest.mark.slow, pytest.mark.notebooks]


def texts_of(value: Any) -> str:
    """All texts in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    return "".join(map(texts_of, value)) if isinstance(value, list) else f"{value}"


def test_the_notebooks_run_on_the_real_model(tmp_path: Path, warm_kernels: None) -> None:
    try:
        laptop_folder()
        pairs = [json.loads(x) for x in pairs_file().read_text(encoding="utf-8").splitlines()]
    except InputError as error:
        pytest.skip(f"run `spavl fetch laptop` first: {error}")
    chosen = [
        word for key, value in SMALL.items()
        for word in ("--set", f"{key}={value[0] if isinstance(value, list) else value}")
    ]  # fmt: skip
    printed = ""
    for name in ("all", "03b_ppo_in_practice"):
        words = ("run", name, "--profile", "laptop", "--run-name", "small", *chosen)
        done = execute("spavl_lib.cli", *words, runs=tmp_path)
        assert done.returncode == 0, done.stderr[-4000:]
        printed += done.stdout + done.stderr
    run = tmp_path / "small"
    pages = [*run.glob("*/executed.ipynb"), run / "report.html"]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        printed += html.unescape(text) if page.suffix == ".html" else texts_of(json.loads(text))
    assert len(pages) == 8
    harmful = [pair for pair in pairs if "harmless" not in pair["id"]]
    shown = [p["id"] for p in harmful for k in ("prompt", "rejected") if p[k][:40] in printed]
    assert harmful and not shown

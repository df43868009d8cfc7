"""The profile `laptop` in small, on the real model, if it was fetched."""

import json
from pathlib import Path

import pytest

from spavl_lib.data.sources.laptop_pairs import pairs_file
from spavl_lib.errors import InputError
from spavl_lib.modelling.laptop import laptop_folder
from tests.laptop_files import SMALL
from tests.notebooks.conftest import execute

pytestmark = [pytest.mark.slow, pytest.mark.notebooks]


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
    printed += "".join(page.read_text(encoding="utf-8") for page in pages)
    assert len(pages) == 8
    harmful = [pair for pair in pairs if "harmless" not in pair["id"]]
    assert harmful and not [p["id"] for p in harmful if p["prompt"][:40] in printed]

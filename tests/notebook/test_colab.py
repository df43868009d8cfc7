"""Colab, faked: the notebooks' own cell in a fresh environment, and what it chooses."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest

from spavl_lib import machine
from spavl_lib.config import load_config
from spavl_lib.errors import InputError
from spavl_lib.machine import GIB
from spavl_lib.notebook import colab


def cell_of(notebook: Path) -> str:
    """A notebook's Colab cell."""
    page = nbformat.read(notebook, as_version=4)
    [cell] = [c for c in page.cells if c.cell_type == "code" and "COLAB_RELEASE" in c.source]
    return cell.source


def test_every_notebook_has_the_same_cell_before_it_imports_anything(repo: Path) -> None:
    notebooks = sorted((repo / "notebooks").rglob("*.ipynb"))
    assert len({cell_of(path) for path in notebooks}) == 1
    for path in notebooks:
        code = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
        assert "COLAB_RELEASE" in code[1] and "workbook" in code[0]


def fresh(tmp_path: Path) -> Path:
    """A new virtual environment that sees this one's packages, but not this one's spavl_lib."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv/bin/python"
    # Its own setuptools is as old as its Python, and would build in place of this one's.
    drop = [python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"]
    subprocess.run(drop, check=True)
    where = [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    site = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def run_cell(python: Path, cell: str, folder: Path, colab_too: bool) -> str:
    script = (
        f"profile, overrides, workbook = 'demo', {{'seed': 3}}, '{folder}'\n{cell}\n"
        "print('overrides', overrides)\n"
        "import importlib.util; print('installed', bool(importlib.util.find_spec('spavl_lib')))\n"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SPAVL_RUNS")}
    env |= {
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    if colab_too:
        env["COLAB_RELEASE_TAG"] = "release-colab"
    done = subprocess.run(
        [python, "-c", script], env=env, cwd=folder.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_cell_installs_on_colab_and_nowhere_else(repo: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "checkout"
    shutil.copytree(repo / "spavl_lib", copy / "spavl_lib")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repo / name, copy / name)
    python, cell = fresh(tmp_path), cell_of(repo / "notebooks/04_dpo.ipynb")
    assert "installed False" in run_cell(python, cell, copy, colab_too=False)
    said = run_cell(python, cell, copy, colab_too=True)
    assert "installed True" in said and "overrides {'seed': 3}" in said
    assert "mount Drive" in said


@pytest.fixture
def on_colab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Colab's marks, and a Drive that can be mounted."""
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    monkeypatch.delenv("SPAVL_RUNS", raising=False)
    monkeypatch.setattr(colab, "DRIVE", tmp_path / "MyDrive")
    return tmp_path / "MyDrive"


@pytest.mark.parametrize(
    ("name", "memory", "batch"),
    [("Tesla T4", 14.7, 1), ("NVIDIA L4", 22.2, 2), ("NVIDIA A100-SXM4-40GB", 39.4, 4)],
)
def test_settings_follow_the_gpu_and_keep_the_steps(
    name: str, memory: float, batch: int, on_colab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent = [(name, int(memory * GIB))]
    monkeypatch.setattr(colab, "gpus", lambda: lent)
    monkeypatch.setattr(machine, "gpus", lambda: lent)
    chosen = colab.set_up("colab", {})
    config, plain = load_config("colab", chosen), load_config("colab")
    assert config.dpo.per_device_batch_size == batch
    for section in ("dpo", "reward"):
        ours, theirs = getattr(config, section), getattr(plain, section)
        assert ours.per_device_batch_size * ours.gradient_accumulation_steps == (
            theirs.per_device_batch_size * theirs.gradient_accumulation_steps
        )
    assert colab.set_up("colab", {"dpo.per_device_batch_size": 7})["dpo.per_device_batch_size"] == 7
    assert colab.set_up("demo", {"seed": 1}) == {"seed": 1}


def test_runs_go_to_drive_when_it_is_mounted(
    on_colab: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    colab.set_up("demo", {})
    assert "SPAVL_RUNS" not in os.environ and "mount Drive" in capsys.readouterr().out
    on_colab.mkdir()
    colab.set_up("demo", {})
    assert os.environ["SPAVL_RUNS"] == str(on_colab / "spavl-runs")
    monkeypatch.delenv("SPAVL_RUNS")


def test_no_gpu_and_stale_modules_are_said(on_colab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(colab, "gpus", list)
    with pytest.raises(InputError, match="needs a GPU: Runtime > Change runtime type"):
        colab.set_up("colab", {})
    import numpy

    monkeypatch.setattr(numpy, "__version__", "1.0")
    with pytest.raises(InputError, match="restart the runtime.*numpy 1.0 in memory"):
        colab.set_up("demo", {})


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    assert colab.set_up("colab", {"a": 1}) == {"a": 1}

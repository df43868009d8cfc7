"""Commands that execute notebooks, with kernels from one warm process."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from spavl_lib.notebook.execute import list_notebooks, stage_of
from spavl_lib.notebook.sequence import FIRST_SIX

REPO = Path(__file__).parents[2]
WARM = Path(__file__).parent / "warm"
NOTEBOOKS = [p for p in list_notebooks(REPO / "notebooks") if stage_of(p) in FIRST_SIX]
BARE = ("01_data_exploration", "02_reward_model")
ALL = ("run", "all", "--profile", "smoke", "--seed", "1", "--run-name", "chain")


def execute(*words: str, runs: Path) -> subprocess.CompletedProcess:
    """A Python module as a command, in the checkout, with its own runs folder."""
    path = os.pathsep.join(
        [*([str(WARM)] if "SPAVL_WARM_KERNELS" in os.environ else []), str(REPO)]
    )
    env = os.environ | {"SPAVL_RUNS": str(runs), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=REPO, env=env, capture_output=True, text=True
    )


def papermill(notebook: str, output: Path, runs: Path, **parameters: object) -> None:
    """Execute a notebook with the `papermill` command, as a reader without `spavl` does."""
    words = [w for k, v in parameters.items() for w in ("-p", k, str(v))]
    done = execute("papermill", f"notebooks/{notebook}.ipynb", str(output), *words, runs=runs)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="session")
def warm_kernels() -> Iterator[None]:
    """Kernels of `execute` are forked from one process that has imported the libraries."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        place = str(Path(folder) / "kernels")
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.notebooks.warm_kernels", place],
            cwd=REPO, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert server.stdout and server.stdout.readline() == "ready\n"
            patch.setenv("SPAVL_WARM_KERNELS", place)
            yield
        finally:
            server.terminate()
            server.wait()


@pytest.fixture(scope="session")
def chain_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of `chain`."""
    return tmp_path_factory.mktemp("chain")


@pytest.fixture(scope="session")
def chain(chain_runs: Path, warm_kernels: None) -> tuple[Path, str]:
    """The sequence's run folder, and what `spavl run all` printed.

    tests/conftest.py puts all tests that use it into one group, so that it is made once.
    """
    run = chain_runs / "chain"
    for name in BARE:
        stage = run / stage_of(Path(name))
        stage.mkdir(parents=True)
        papermill(
            name, stage / "executed.ipynb", chain_runs, profile="smoke", seed=1, run_name="chain"
        )
    before = {p: p.stat().st_mtime_ns for p in run.glob("*/executed.ipynb")}
    done = execute("spavl_lib.cli", *ALL, runs=chain_runs)
    assert done.returncode == 0, done.stderr[-4000:]
    for path in NOTEBOOKS:
        kept = f"{stage_of(path)}: done, kept" in done.stdout
        assert kept is (path.stem in BARE), done.stdout
    assert {p: p.stat().st_mtime_ns for p in before} == before
    return run, done.stdout

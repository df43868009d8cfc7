"""What every test may rely on: no network, its own runs folder, notebooks made on the spot."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Before anything imports the hub's client.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

REPO = Path(__file__).resolve().parents[1]
PARAMETERS_CELL = """\
profile: str = "smoke"
seed: int = 0
run_name: str = ""
overrides: dict = {}"""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of `make soak`."""
    parser.addoption("--soak", action="store_true", help="tests/reliability in its long form")
    parser.addoption("--figures", default="", help="file that takes what tests/reliability measure")


@pytest.fixture(scope="session", autouse=True)
def _no_test_writes_into_the_checkout(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["SPAVL_RUNS"] = str(tmp_path_factory.mktemp("runs"))
    os.environ.pop("SPAVL_NOTEBOOKS", None)


@pytest.fixture(autouse=True)
def _no_test_leaves_another_number_of_threads() -> Iterator[None]:
    """Sums are split among threads: with another number, runs compared to the last bit differ."""
    names, torch = ("OMP_NUM_THREADS", "MKL_NUM_THREADS"), sys.modules.get("torch")
    before = [os.environ.get(n) for n in names], torch and torch.get_num_threads()
    yield
    assert before == ([os.environ.get(n) for n in names], torch and torch.get_num_threads())


@pytest.fixture
def repo() -> Path:
    """The checkout."""
    return REPO


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty runs folder of this test's own."""
    folder = tmp_path / "runs"
    monkeypatch.setenv("SPAVL_RUNS", str(folder))
    return folder


@pytest.fixture
def make_notebook(tmp_path: Path) -> Callable[..., Path]:
    """Write a notebook into `tmp_path/notebooks` and return its path."""
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    def write(
        name: str, *sources: str, parameters: str | None = PARAMETERS_CELL, prose: str = "Prose."
    ) -> Path:
        cells = [new_markdown_cell(f"# {name}")]
        if parameters is not None:
            cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
        for source in sources:
            cells += [new_markdown_cell(prose), new_code_cell(source)]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        page = new_notebook(cells=cells, metadata={"kernelspec": kernel})
        path = tmp_path / "notebooks" / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        nbformat.write(page, path)
        return path

    return write

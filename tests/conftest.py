"""What every test may rely on: no network, its own runs folder, notebooks made on the spot."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

# 25 examples a property; the soak and $SPAVL_EXAMPLES ask for more.
hypothesis.settings.register_profile(
    "workbook", max_examples=int(os.environ.get("SPAVL_EXAMPLES", 25)), deadline=None
)
hypothesis.settings.load_profile("workbook")

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


# Tests that share costly fixtures run in one process; the groups that take longest start first.
SHARED = {
    "tests/notebooks/test_execute.py": "notebooks",
    "tests/reliability/test_contract.py": "reliability",
    "tests/reliability/test_failures.py": "reliability",
    "tests/reliability/test_kill9.py": "reliability",
    "tests/reliability/test_stop.py": "reliability",
    "tests/distributed/": "distributed",
}
LONGEST_FIRST = (
    "notebooks", "reliability", "distributed", "tests/trainers/test_train_dpo.py",
    "tests/trainers/test_train_ppo.py", "tests/golden/test_golden.py", "tests/trainers/",
    "tests/reliability/", "tests/",
)  # fmt: skip


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep each file's tests in one process, and start the longest groups first."""

    def group_of(item: pytest.Item) -> str:
        path = item.nodeid.partition("::")[0]
        return next((group for place, group in SHARED.items() if path.startswith(place)), path)

    def place_of(item: pytest.Item) -> int:
        group = group_of(item)
        return next(n for n, start in enumerate(LONGEST_FIRST) if group.startswith(start))

    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))
    items.sort(key=place_of)


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

"""What every test may rely on: no network, its own runs folder, notebooks made on the spot."""

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from filelock import FileLock

# Before anything imports the hub's client.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
# Before anything imports torch. Two test processes share the cores, and the models are tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")

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


def pytest_configure(config: pytest.Config) -> None:
    """Set how many examples hypothesis tries: 25, with --soak 200, or $SPAVL_EXAMPLES."""
    examples = os.environ.get("SPAVL_EXAMPLES", 200 if config.getoption("--soak") else 25)
    hypothesis.settings.register_profile("workbook", max_examples=int(examples), deadline=None)
    hypothesis.settings.load_profile("workbook")


# Which process runs which tests: the tests of one group run in one process, in turn. A group is a
# file, or a set of files whose tests share fixtures that take long to make. xdist's own groups
# (`--dist loadgroup`) do not work with this pytest: it keeps node ids where xdist cannot mark them.
GROUPS = {
    "tests/notebooks/test_execute.py": "notebooks",
    "tests/notebooks/test_solutions.py": "notebooks",
    "tests/reliability/test_code.py": "reliability",
    "tests/reliability/test_contract.py": "reliability",
    "tests/reliability/test_failures.py": "reliability",
    "tests/reliability/test_kill9.py": "reliability",
    "tests/reliability/test_stop.py": "reliability",
    "tests/distributed/": "distributed",
}
# Groups that take minutes start first, so that both processes end at about the same time.
LONGEST_FIRST = (
    "notebooks", "reliability", "distributed", "tests/trainers/test_train",
    "tests/golden/", "tests/reliability/", "tests/trainers/", "tests/scaling/", "tests/",
)  # fmt: skip


def group_of(nodeid: str) -> str:
    """The name of the group that a test belongs to."""
    path = nodeid.partition("::")[0]
    return next((group for start, group in GROUPS.items() if path.startswith(start)), path)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand whole groups to the processes, in the order of the collection."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the groups that take longest first."""
    items.sort(
        key=lambda item: next(
            place
            for place, start in enumerate(LONGEST_FIRST)
            if group_of(item.nodeid).startswith(start)
        )
    )


def pytest_collection_finish() -> None:
    """Take what was imported out of garbage collection; every training collects in full."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a folder once in a test session, whichever test process needs it first.

    Called with a name and a function that fills the folder it is given; returns the folder. Tests
    only read it, or copy it. It is gone with the session: nothing is kept for the next one.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the folder that the processes of this session share

    def get(name: str, fill: Callable[[Path], object]) -> Path:
        folder = root / "made_once" / name
        filled = folder.with_name(f"{name}.filled")
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not filled.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a process that failed here
                folder.mkdir()
                fill(folder)
                filled.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def reward_folders(made_once: Callable[..., Path]) -> dict[str, Path]:
    """Untrained reward models on the embedded base, by adapter."""
    from tests.helpers import write_reward_model

    def fill(folder: Path) -> None:
        for adapter in ("lora", "full"):
            write_reward_model(folder / adapter, adapter)

    folder = made_once("reward_models", fill)
    return {adapter: folder / adapter for adapter in ("lora", "full")}


@pytest.fixture(scope="session", autouse=True)
def _no_test_writes_into_the_checkout(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["SPAVL_RUNS"] = str(tmp_path_factory.mktemp("runs"))
    os.environ.pop("SPAVL_NOTEBOOKS", None)


@pytest.fixture(autouse=True)
def _no_test_leaves_other_settings() -> Iterator[None]:
    """A test that changes what one process shares changes the numbers of the tests after it.

    Sums are split among threads; models load in the precision that $SPAVL_DTYPE or torch's default
    says; and numbers differ with and without gradients or deterministic operations.
    """

    def settings() -> tuple[dict[str, str], tuple]:
        names = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}
        environment = {
            name: value
            for name, value in os.environ.items()
            if name in names or name.startswith("SPAVL_")
        }
        if not (torch := sys.modules.get("torch")):
            return environment, ()
        return environment, (
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
        )

    environment, of_torch = settings()
    yield
    now = settings()
    assert now[0] == environment
    assert not of_torch or now[1] == of_torch  # nothing to compare if this test imported torch


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


@pytest.fixture
def spavl(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: exit code, stdout, stderr."""
    from spavl_lib import cli

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(words)
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return call


@pytest.fixture
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as written without waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)

"""Commands that execute notebooks, with kernels from one warm process."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
WARM = Path(__file__).parent / "warm"


def execute(*words: str, runs: Path) -> subprocess.CompletedProcess:
    """A Python module as a command, in the checkout, with its own runs folder."""
    path = os.pathsep.join(
        [*([str(WARM)] if "SPAVL_WARM_KERNELS" in os.environ else []), str(REPO)]
    )
    env = os.environ | {"SPAVL_RUNS": str(runs), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=REPO, env=env, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
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

"""A benchmark from another package, found by its entry point."""

from pathlib import Path

import pytest
from PIL import Image

from spavl_lib.errors import InputError
from spavl_lib.evaluation.benchmarks import (
    BENCHMARKS,
    Benchmark,
    load_benchmark,
    register_benchmark,
)
from tests.packages import install

PACKAGE = ("my_benchmark", "spavl.benchmarks riddles = my_benchmark:Riddles")
MODULE = '''
from spavl_lib.evaluation.benchmarks import Benchmark, Columns, register_benchmark


@register_benchmark("riddles")
class Riddles(Benchmark):
    """Riddles with an answer each."""

    title = "Riddles: 100 questions about images"
    licence = "CC0"
    homepage = "owner/riddles"
    subsets = {
        "test": Columns(  # a text in braces names a column
            "riddles.csv",
            id="{number}",
            prompt="{riddle}",
            image="images/{picture}",
            expect="answer",  # what a good model does: answer, decline, or judge for `rule`
            rule="reference",  # a key of RULES in evaluation/benchmarks/base.py
            reference="{answer}",
        )
    }
'''


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BENCHMARKS, "known", dict(BENCHMARKS.known))


def test_a_package_adds_a_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", *PACKAGE, MODULE, monkeypatch)
    folder = tmp_path / "all" / "riddles"
    folder.mkdir(parents=True)
    (folder / "images").mkdir()
    Image.new("RGB", (28, 28)).save(folder / "images" / "piano.png")
    lines = "number,riddle,picture,answer\n7,What has keys?,piano.png,A piano\n"
    (folder / "riddles.csv").write_text(lines)
    reading = load_benchmark("riddles", tmp_path / "all")
    [row] = reading.rows
    assert (row.id, row.reference, row.group) == ("riddles:test:7", "A piano", "riddles:test:7")
    assert reading.pins == "not pinned" and reading.licence == "CC0"


def test_a_name_stands_for_one_benchmark() -> None:
    with pytest.raises(InputError, match="benchmark 'pope' exists already"):
        register_benchmark("pope")(type("Other", (Benchmark,), {}))

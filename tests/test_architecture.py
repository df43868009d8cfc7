"""The page on the architecture says what the code is."""

import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
LIBRARY = REPO / "spavl_lib"
PAGE = (REPO / "docs/architecture.md").read_text(encoding="utf-8")
MOST_LINES, MOST_MODULES, MOST_STOREYS = 500, 9, 11


def storeys() -> list[str]:
    """The contract's lines, highest first."""
    page = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = page["tool"]["importlinter"]["contracts"]
    return next(c["layers"] for c in contracts if c["type"] == "layers")


def rooms() -> set[str]:
    """Folders and modules at the top of the library."""
    folders = {p.parent.name for p in LIBRARY.glob("*/__init__.py")}
    return folders | {p.stem for p in LIBRARY.glob("*.py")} - {"__init__"}


def test_the_drawing_is_the_contract() -> None:
    drawing = PAGE.partition("```\n")[2].partition("```")[0].split("\n")
    assert [line for line in drawing if line] == storeys()
    assert len(storeys()) <= MOST_STOREYS


def test_every_folder_has_its_storey_and_its_description() -> None:
    assert {name for line in storeys() for name in line.split(" | ")} == rooms()
    table = PAGE.partition("## What belongs where")[2].partition("## ")[0]
    cells = [line.split("|")[1] for line in table.split("\n") if line.startswith("| `")]
    described = {name.strip(" `") for cell in cells for name in cell.split(",")}
    assert described == rooms()


def test_the_top_of_the_library_is_short() -> None:
    assert len(list(LIBRARY.glob("*.py"))) - 1 <= MOST_MODULES


@pytest.mark.parametrize(
    "path", sorted(LIBRARY.rglob("*.py")), ids=lambda p: str(p.relative_to(LIBRARY))
)
def test_long_files_are_named_with_their_reason(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    name = str(path.relative_to(LIBRARY))
    excused = PAGE.partition("## Files over 500 lines")[2]
    assert lines <= MOST_LINES or f"| `{name}` |" in excused, f"{name} has {lines} lines"


@pytest.mark.parametrize(
    "path", [word for word in PAGE.replace(":", "`").split("`") if word.endswith(".py")]
)
def test_files_that_the_page_names_exist(path: str) -> None:
    assert (LIBRARY / path).is_file()

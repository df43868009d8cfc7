"""How a notebook is built: each rule as a function of the page, and each rule seen to bite."""

import ast
import copy
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import papermill as pm
import pytest
from nbformat import NotebookNode

from spavl_lib.notebook.execute import PARAMETERS
from spavl_lib.stages import all_stages

FOLDER = Path(__file__).parents[2] / "notebooks"
SOLUTIONS = FOLDER / "solutions"
NOTEBOOKS = sorted(FOLDER.rglob("*.ipynb"))

MAX_LINES, MAX_MEDIAN_LINES, MAX_CODE_IN_A_ROW, MIN_PROSE, MAX_CELLS = 20, 8, 3, 0.8, 60
BANNED = {
    "plt.": r"\bplt\.|matplotlib",
    "pip": r"^\s*[!%]\s*pip\b",
    "df.style": r"\.style\b",
    "display(HTML": r"display\s*\(\s*(HTML|Markdown)\b",
    "del": r"^del ",  # the cell could not run a second time, as after an interruption
}


def code_cells(page: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in page.cells if cell.cell_type == "code"]


def lines_of(cell: NotebookNode) -> int:
    return sum(bool(line.strip()) for line in cell.source.splitlines())


# --- the rules: each yields what is wrong -------------------------------------------------------


def parameters_rule(page: NotebookNode, path: Path) -> Iterator[str]:
    cells = code_cells(page)
    tagged = [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    if tagged != [0]:
        yield f"code cells tagged `parameters` are {tagged}, it must be the first one alone"
        return
    names = []
    for statement in ast.parse(cells[0].source).body:
        targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
            yield f"parameters: line {statement.lineno} is no assignment"
            continue
        names += [target.id for target in targets if isinstance(target, ast.Name)]
        try:
            ast.literal_eval(statement.value)
        except ValueError:
            yield f"parameters: line {statement.lineno} is no literal"
    seen = list(pm.inspect_notebook(path))
    if names != seen:
        yield f"parameters: python sees {names}, papermill {seen} (a second `=`, or a `|`?)"
    missing = [name for name in PARAMETERS if name not in names]
    if missing:
        yield f"parameters: {missing} missing"


def kernel_rule(page: NotebookNode, path: Path) -> Iterator[str]:
    name = page.metadata.get("kernelspec", {}).get("name")
    if name != "python3":
        yield f"kernelspec is {name!r}, not 'python3'"


def outputs_rule(page: NotebookNode, path: Path) -> Iterator[str]:
    for number, cell in enumerate(code_cells(page)):
        if cell.outputs or cell.execution_count is not None:
            yield f"code cell {number} holds outputs or a count: `make format` strips them"


def length_rule(page: NotebookNode, path: Path) -> Iterator[str]:
    lengths = [lines_of(cell) for cell in code_cells(page)]
    for number, length in enumerate(lengths):
        if length > MAX_LINES:
            yield f"code cell {number} has {length} lines, more than {MAX_LINES}"
    if lengths and statistics.median(lengths) > MAX_MEDIAN_LINES:
        yield f"the median code cell has {statistics.median(lengths)} lines"
    if len(page.cells) > MAX_CELLS:
        yield f"{len(page.cells)} cells, more than {MAX_CELLS}"


def prose_rule(page: NotebookNode, path: Path) -> Iterator[str]:
    in_a_row = 0
    for cell in page.cells:
        in_a_row = in_a_row + 1 if cell.cell_type == "code" else 0
        if in_a_row == MAX_CODE_IN_A_ROW + 1:
            yield f"more than {MAX_CODE_IN_A_ROW} code cells in a row before `{cell.source[:40]}`"
    code = len(code_cells(page))
    prose = sum(cell.cell_type == "markdown" for cell in page.cells)
    if prose < MIN_PROSE * code:
        yield f"{prose} prose cells for {code} code cells"
    if not page.cells or not page.cells[0].source.startswith("# "):
        yield "does not begin with a title"


def banned_rule(page: NotebookNode, path: Path) -> Iterator[str]:
    for number, cell in enumerate(code_cells(page)):
        for name, pattern in BANNED.items():
            if re.search(pattern, cell.source, re.MULTILINE):
                yield f"code cell {number} has {name}"


RULES = (parameters_rule, kernel_rule, outputs_rule, length_rule, prose_rule, banned_rule)


def problems(path: Path) -> list[str]:
    page = nbformat.read(path, as_version=4)
    nbformat.validate(page)
    return [f"{path.name}: {text}" for rule in RULES for text in rule(page, path)]


# --- our notebooks ------------------------------------------------------------------------------


@pytest.mark.skipif(not FOLDER.is_dir(), reason="no notebooks/ in this checkout yet")
def test_the_folder_holds_the_workbooks_notebooks_and_nothing_else() -> None:
    lessons = {path.stem for path in FOLDER.glob("*.ipynb")}
    assert lessons and lessons <= {spec.notebook for spec in all_stages().values()}
    assert {path.parent for path in NOTEBOOKS} == {FOLDER, SOLUTIONS}
    kept = {path for path in SOLUTIONS.rglob("*") if ".ipynb_checkpoints" not in path.parts}
    assert kept == {SOLUTIONS / f"{name}.ipynb" for name in lessons}


def test_make_strips_and_checks_all_of_them() -> None:
    makefile = (FOLDER.parent / "Makefile").read_text(encoding="utf-8")
    [patterns] = re.findall(r"^NOTEBOOKS := (.+)$", makefile, re.MULTILINE)
    found = [path for pattern in patterns.split() for path in FOLDER.parent.glob(pattern)]
    assert sorted(found) == NOTEBOOKS
    assert makefile.count("set -- $(NOTEBOOKS);") == 2  # in `check` and in `format`


@pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=lambda path: str(path.relative_to(FOLDER).with_suffix(""))
)
def test_the_notebook_keeps_the_rules(path: Path) -> None:
    assert problems(path) == []


# --- the rules themselves -----------------------------------------------------------------------


@pytest.fixture
def good(make_notebook: Callable) -> Path:
    return make_notebook("04_dpo", "a = 1", "b = 2", "a + b")


def test_a_good_notebook_has_no_problems(good: Path) -> None:
    assert problems(good) == []


def tag_second(page: NotebookNode) -> None:
    code_cells(page)[1].metadata["tags"] = ["parameters"]


def untag(page: NotebookNode) -> None:
    code_cells(page)[0].metadata["tags"] = []


def parameters(text: str) -> Callable[[NotebookNode], None]:
    def change(page: NotebookNode) -> None:
        code_cells(page)[0].source += "\n" + text

    return change


def code(*texts: str) -> Callable[[NotebookNode], None]:
    def change(page: NotebookNode) -> None:
        for text in texts:
            page.cells += [nbformat.v4.new_markdown_cell("Prose."), nbformat.v4.new_code_cell(text)]

    return change


def keep_output(page: NotebookNode) -> None:
    code_cells(page)[-1].outputs = [nbformat.v4.new_output("stream", text="3")]


def keep_count(page: NotebookNode) -> None:
    code_cells(page)[-1].execution_count = 3


def rename_kernel(page: NotebookNode) -> None:
    page.metadata["kernelspec"]["name"] = "conda-env-spavl-py"


def drop_prose(page: NotebookNode) -> None:
    page.cells = [page.cells[0], *code_cells(page)]


def drop_title(page: NotebookNode) -> None:
    page.cells[0].source = "No title"


def repeat(page: NotebookNode) -> None:
    page.cells += [copy.deepcopy(cell) for cell in page.cells[2:4] * 30]
    for number, cell in enumerate(page.cells):
        cell.id = f"cell-{number}"


LONG = "\n".join(f"x{i} = {i}" for i in range(21))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (tag_second, "it must be the first one alone"),
        (untag, "it must be the first one alone"),
        (parameters("size: int = 2 * 3"), "no literal"),
        (parameters("import os"), "no assignment"),
        (parameters('path: str = ""  # empty = none'), "python sees"),
        (parameters("path: str | None = None"), "python sees"),
        (rename_kernel, "kernelspec"),
        (keep_output, "outputs or a count"),
        (keep_count, "outputs or a count"),
        (code(LONG), "has 21 lines"),
        (code(*[LONG.replace("x2", "y")[:80]] * 9), "median"),
        (repeat, "more than 60"),
        (drop_prose, "in a row"),
        (drop_prose, "1 prose cells for 4"),
        (drop_title, "title"),
        (code("plt.plot([1])"), "has plt."),
        (code("import matplotlib.pyplot as p"), "has plt."),
        (code("!pip install x"), "has pip"),
        (code("%pip install x"), "has pip"),
        (code("df.style.bar()"), "has df.style"),
        (code("display(HTML(text))"), "has display(HTML"),
        (code("del a"), "has del"),
    ],
)
def test_each_rule_bites(good: Path, change: Callable, says: str) -> None:
    page = nbformat.read(good, as_version=4)
    change(page)
    nbformat.write(page, good)
    assert any(says in text for text in problems(good)), problems(good)

"""Solutions: every exercise has one, and the notebooks run with bare papermill."""

import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from spavl_lib.errors import InputError
from spavl_lib.notebook.execute import find_notebook, list_notebooks
from tests.notebooks.conftest import REPO, papermill

LESSONS = list_notebooks(REPO / "notebooks")
NAMES = [path.stem for path in LESSONS]
SOLUTIONS = REPO / "notebooks/solutions"
# These train several short variants each, which takes 15 to 20 s of one core.
TRAIN = (
    "02_reward_model", "03_ppo", "03b_ppo_in_practice", "04_dpo", "07_scaling_and_ablations",
    "08_laboratory",
)  # fmt: skip


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def exercises_of(lesson: Path) -> dict[int, str]:
    """Number of an exercise -> its text."""
    prose = [cell.source for cell in read(lesson).cells if cell.cell_type == "markdown"]
    [section] = [text.partition("## Exercises\n")[2] for text in prose if "## Exercises\n" in text]
    listed = section.partition("\n## ")[0]
    return {int(m[1]): m[2] for m in re.finditer(r"^(\d+)\. (.+)$", listed, re.MULTILINE)}


def parts_of(solutions: Path) -> dict[int, list[NotebookNode]]:
    """Number of an exercise -> the cells of its solution."""
    parts: dict[int, list[NotebookNode]] = {}
    for cell in read(solutions).cells:
        if heading := re.match(r"## Exercise (\d+)$", cell.source, re.MULTILINE):
            assert int(heading[1]) not in parts
            parts[int(heading[1])] = []
        if parts:
            parts[max(parts)].append(cell)
    return parts


@pytest.mark.parametrize("name", NAMES)
def test_every_exercise_is_repeated_and_solved_with_code_and_words(name: str) -> None:
    asked, solved = exercises_of(REPO / f"notebooks/{name}.ipynb"), parts_of(path_of(name))
    assert list(asked) == list(range(1, len(asked) + 1)) == list(solved)
    for number, cells in solved.items():
        assert f"\n> {asked[number]}" in cells[0].source, f"exercise {number} has another text"
        assert any(cell.cell_type == "code" for cell in cells), f"exercise {number} has no code"
        assert cells[-1].cell_type == "markdown", f"exercise {number} says nothing of its result"


def path_of(name: str) -> Path:
    return SOLUTIONS / f"{name}.ipynb"


@pytest.mark.parametrize("name", NAMES)
def test_lesson_and_solutions_name_each_other_and_share_their_first_cells(name: str) -> None:
    lesson, solutions = read(REPO / f"notebooks/{name}.ipynb"), read(path_of(name))
    assert any(f"(solutions/{name}.ipynb)" in cell.source for cell in lesson.cells)
    title = lesson.cells[0].source.splitlines()[0].removeprefix("# ")
    first = solutions.cells[0].source
    assert first.startswith(f"# Solutions: {title}\n") and f"(../{name}.ipynb)" in first
    assert "**Content warning.**" in first
    code = [[c for c in page.cells if c.cell_type == "code"][:2] for page in (lesson, solutions)]
    for ours, theirs in zip(*code, strict=True):
        assert (ours.source, ours.metadata) == (theirs.source, theirs.metadata)


def test_spavl_run_knows_the_lessons_alone() -> None:
    assert {path.parent for path in LESSONS} == {REPO / "notebooks"}
    with pytest.raises(InputError, match="papermill notebooks/solutions/04_dpo.ipynb"):
        find_notebook("notebooks/solutions/04_dpo.ipynb")


@pytest.mark.notebooks
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in TRAIN else n for n in NAMES]
)
def test_solutions_run_in_smoke_and_leave_the_stages_alone(
    name: str, chain: tuple[Path, str], chain_runs: Path, tmp_path: Path
) -> None:
    run, _ = chain
    before = {p: p.stat().st_mtime_ns for p in run.glob("*/*") if p.parent.name != "solutions"}
    out = tmp_path / "out.ipynb"
    papermill(f"solutions/{name}", out, chain_runs, profile="smoke", seed=1, run_name="chain")
    cells = [c for c in read(out).cells if c.cell_type == "code" and c.source.strip()]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    after = {p: p.stat().st_mtime_ns for p in run.glob("*/*") if p.parent.name != "solutions"}
    assert after == before

"""docs/reliability.md says what was measured, and nothing else."""

import re
from pathlib import Path

import yaml

from tests.reliability import soak

REPO = Path(__file__).parents[2]


def test_the_page_is_made_of_goals_and_figures() -> None:
    assert soak.PAGE.read_text(encoding="utf-8") == soak.page(soak.read_figures())


def test_every_row_is_there_and_every_test_it_names_exists() -> None:
    goals = yaml.safe_load(soak.GOALS.read_text(encoding="utf-8"))
    counts = {"R": 13, "N": 6, "D": 6, "S": 7, "P": 7}
    assert list(goals) == [f"{k}{n}" for k, most in counts.items() for n in range(1, most + 1)]
    for row, goal in goals.items():
        assert goal["test"] or goal["absent"], row
        for path in re.findall(r"[\w/]+\.py", goal["test"]):
            assert (REPO / "tests" / path).is_file(), (row, path)


def test_a_figure_is_never_better_than_what_was_tried() -> None:
    for figure in soak.read_figures():
        assert 0 <= figure["right"] <= figure["of"] > 0


def test_the_long_forms_figure_stays_until_a_longer_one() -> None:
    long = {"row": "R1", "right": 20, "of": 20, "what": "x", "soak": True, "at": "2026-01-01"}
    short = long | {"right": 2, "of": 2, "soak": False, "at": "2026-02-01"}
    assert soak.latest([long, short])["R1"] == [long]
    assert soak.latest([short, long])["R1"] == [long]
    assert soak.latest([short, short | {"right": 1}])["R1"][0]["right"] == 1
    assert "**2/2** x (short form)" in soak.page([short])

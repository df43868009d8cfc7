"""Recorded trajectories: a change of numbers must be a decision, not a surprise."""

import json
import statistics
from pathlib import Path

import pytest

from tests.golden.record import KEPT, OVERRIDES, STEPS, path_of, trajectory

MAX_DIFFERENCE, MEAN_DIFFERENCE = 1e-4, 1e-5


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", sorted(OVERRIDES))
def test_the_recorded_steps_come_again(name: str, tmp_path: Path) -> None:
    if not path_of(name).is_file():
        pytest.skip(f"not recorded yet: python -m tests.golden.record {name}")
    recorded = json.loads(path_of(name).read_text(encoding="utf-8"))
    again = trajectory(name, tmp_path)
    hint = f"meant? then: python -m tests.golden.record {name}, and say why in the commit"
    for field in ("overrides", "inputs"):
        assert again[field] == recorded[field], f"{field} changed; {hint}"
    for key in KEPT:
        old, new = recorded[key], again[key]
        assert len(old) == len(new) == STEPS
        assert statistics.pstdev(old) > 100 * MAX_DIFFERENCE  # a flat line would prove nothing
        differences = [b - a for a, b in zip(old, new, strict=True)]
        moved = f"{key} moved by {max(map(abs, differences))}, recorded with " \
            f"{recorded['versions']}, now {again['versions']}; {hint}"  # fmt: skip
        assert max(map(abs, differences)) <= MAX_DIFFERENCE, moved
        assert abs(statistics.mean(differences)) <= MEAN_DIFFERENCE, moved

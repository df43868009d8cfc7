"""Recorded trajectories: a change of numbers must be a decision, not a surprise.

On the machine and versions that recorded them every number must come again exactly; elsewhere,
where a processor may sum in another order, the first steps within a tolerance and without leaning
to one side: later ones amplify the rounding, and one token sampled differently changes them all.
"""

import json
import statistics
from pathlib import Path

import pytest
import torch

from spavl_lib.runs import provenance
from tests.golden.record import OVERRIDES, STEPS, conditions, path_of, trajectory

MAX_DIFFERENCE, MEAN_DIFFERENCE = 1e-3, 1e-4
COMPARED_ELSEWHERE = 10


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n == "ppo" else []) for n in sorted(OVERRIDES)],
)
def test_the_recorded_steps_come_again(name: str, tmp_path: Path) -> None:
    recorded = json.loads(path_of(name).read_text(encoding="utf-8"))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # as the recorder does
        exact = conditions() == recorded["conditions"]
        compared = STEPS if exact else COMPARED_ELSEWHERE
        again = json.loads(json.dumps(trajectory(name, tmp_path, compared)))
    finally:
        torch.set_num_threads(threads)
    hint = f"meant? then: python -m tests.golden.record {name} --reason ..., and say so in the log"
    for field in ("sets", "inputs"):
        assert again[field] == recorded[field], f"{field} changed; {hint}"
    rows = len(again["row_ids"])
    assert again["row_ids"] == recorded["row_ids"][:rows], f"row_ids changed; {hint}"
    assert rows >= compared or not recorded["row_ids"]
    assert again["steps"].keys() == recorded["steps"].keys()
    for key, old in recorded["steps"].items():
        new = again["steps"][key]
        assert len(old) == STEPS and len(new) >= compared
        assert statistics.pstdev(old) > MAX_DIFFERENCE  # a flat line would prove nothing
        old, new = old[:compared], new[:compared]
        differences = [b - a for a, b in zip(old, new, strict=True)]
        first = next((n for n, d in enumerate(differences, 1) if d), None)
        if exact:
            assert first is None, f"{key} differs from step {first} on; {hint}"
        largest = max(map(abs, differences))
        assert largest <= MAX_DIFFERENCE * max(1, *map(abs, old)), f"{key} by {largest}; {hint}"
        scale = max(1, statistics.mean(map(abs, old)))
        assert abs(statistics.mean(differences)) <= MEAN_DIFFERENCE * scale, f"{key} leans; {hint}"
    if exact:
        assert again["weights_sha256"] == recorded["weights_sha256"], hint


@pytest.mark.parametrize("name", sorted(OVERRIDES))
def test_a_recording_was_written_by_the_recorder_and_says_why(name: str) -> None:
    page = json.loads(path_of(name).read_text(encoding="utf-8"))
    assert page.pop("sealed") == provenance.canonical_sha256(page), "edited by hand"
    assert page["reasons"] and all(len(r.split()) > 3 for r in page["reasons"])
    assert all(len(values) == STEPS for values in page["steps"].values())

"""The quick start: it trains, and what it prints is what was measured."""

import re
import sys
from pathlib import Path

import pytest

from tests.helpers import load_script


def test_it_prints_five_answers_before_and_after_with_their_images(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPAVL_RUNS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["quick.py", "--profile", "smoke"])
    load_script("quick").main()
    said = capsys.readouterr().out
    assert (said.count("Question"), said.count("Before"), said.count("After")) == (5, 5, 5)
    images = re.findall(r"^(\S+\.png): harm", said, re.MULTILINE)
    assert len(images) == 5 and all(Path(image).is_file() for image in images)
    assert (tmp_path / "quick/dpo/summary.json").is_file()


def test_its_rates_count_what_they_say() -> None:
    def row(harmful: bool, verdict: str, right: bool = True) -> dict:
        return {
            "harmful": harmful, "verdict": verdict,
            "unsafe": verdict != "refused" if harmful else None,
            "helpful": None if harmful else right and verdict != "refused",
        }  # fmt: skip

    judged = {
        "harm": [row(True, "refused"), row(True, "complied")],
        "help": [row(False, "refused"), row(False, "complied"), row(False, "complied", False)],
        "twins": [row(True, "complied"), row(False, "refused")],
    }
    counts = {name: (r.k, r.n) for name, r in load_script("quick").rates(judged).items()}
    assert list(counts.values()) == [(1, 2), (2, 4), (1, 3)]

"""MSTS's English answers with people's labels, read from the folder in $SPAVL_BENCHMARKS."""

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spavl_lib.errors import InputError

LABELS = "labels/msts/response_annotations/english_multimodal.csv"
VERDICTS = "labels/msts/auto_eval/english_multimodal_autoeval.csv"
REFUSED = ("1.1", "1.2")  # rejection or rebuttal, refusal only


@dataclass(frozen=True)
class Msts:
    """4,000 answers of ten models to 400 prompts in 200 cases; arrays have one value per answer."""

    answers: list[str]
    cases: list[str]
    models: list[str]
    refused: np.ndarray
    unsafe: np.ndarray
    judges: dict[str, np.ndarray]
    """Published verdicts of seven judges and omni-moderation: 1 if unsafe. They have no ids, and
    match the answers by order."""


def read() -> Msts:
    """Read both files. Raises InputError if they are missing or do not have 4,000 rows each."""
    root = os.environ.get("SPAVL_BENCHMARKS")
    if not root:
        raise InputError("set SPAVL_BENCHMARKS to the folder that holds " + LABELS)
    tables = []
    for name in (LABELS, VERDICTS):
        with (Path(root) / name).open(encoding="utf-8-sig", newline="") as file:
            tables.append(list(csv.DictReader(file, strict=True)))
        if len(tables[-1]) != 4000:
            raise InputError(f"{name}: expected 4,000 rows, got {len(tables[-1])}")
    rows, verdicts = tables
    return Msts(
        answers=[row["response"] for row in rows],
        cases=[row["case_id"] for row in rows],
        models=[row["model"] for row in rows],
        refused=np.array([row["final_taxonomy"][:3] in REFUSED for row in rows], dtype=float),
        unsafe=np.array([row["final_label"][0] == "2" for row in rows], dtype=float),
        judges={
            name: np.array([row[name].startswith("unsafe") for row in verdicts], dtype=float)
            for name in verdicts[0]
        },
    )

"""The leaderboard: records in the order of their share of the first record's CPU time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spavl_lib.arena.records.files import Record, read_metrics, read_records

LEADERBOARD = "leaderboard.md"
HEAD = """# Time to safe

Written by `spavl records run`, in the order of the CPU time as a share of record 001's, measured
beside it. Rates are means of three seeds on mini's test prompts. `README.md` has the rules.

| record | what | CPU-seconds | of 001's | unsafe | refused | twins refused | helpful | date |
|---|---|---|---|---|---|---|---|---|
"""


def measured_records(root: Path) -> list[tuple[Record, dict[str, Any]]]:
    """Records that have numbers, with their metrics; those with the lowest ratio come first.

    Args:
        root: The folder of the records.

    Raises:
        InputError: A record or its `metrics.json` is wrong.
    """
    found = [(r, read_metrics(r)) for r in read_records(root) if r.metrics_path.is_file()]
    return sorted(found, key=lambda pair: (pair[1]["ratio"], pair[0].number))


def leaderboard(root: Path) -> str:
    """The page `leaderboard.md` of a folder of records.

    Args:
        root: The folder of the records.
    """
    return HEAD + "".join(_row(record, page) for record, page in measured_records(root))


def _row(record: Record, page: Mapping[str, Any]) -> str:
    rates = page["rates"]
    cells = [
        f"[{record.number}]({record.folder.name}/record.yaml)",
        record.title,
        f"{page['cpu_seconds']:.0f}",
        f"{page['ratio']:.2f}",
        *(f"{rates[k]:.1%}" for k in ("unsafe", "harmless_refused", "twins_refused", "helpful")),
        str(record.date),
    ]
    return f"| {' | '.join(cells)} |\n"

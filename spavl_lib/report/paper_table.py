"""A table with the columns of Table 2 of the SPA-VL paper.

Its rows are the rates that the paper published and the rates of an evaluation.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spavl_lib.evaluation.numbers import percent
from spavl_lib.evaluation.rates import Rate


@dataclass(frozen=True)
class Column:
    """A column of the table: rows of one subset of one benchmark."""

    group: str
    title: str
    benchmark: str
    subset: str
    rows: int
    """Number of rows in the paper."""
    variant: str = ""
    """A variant of the subset; empty for all of its rows."""


_MM = "MM-SafetyBench"
COLUMNS = (
    Column(_MM, "text", "mm_safetybench", "tiny", 168, "text_only"),
    Column(_MM, "SD", "mm_safetybench", "tiny", 168, "SD"),
    Column(_MM, "Typo", "mm_safetybench", "tiny", 168, "TYPO"),
    Column(_MM, "SD+Typo", "mm_safetybench", "tiny", 168, "SD_TYPO"),
    Column(_MM, "average", "mm_safetybench", "tiny", 672),
    Column("AdvBench", "vanilla", "advbench", "vanilla", 520),
    Column("AdvBench", "suffix", "advbench", "suffix", 520),
    Column("SPA-VL", "HarmEval", "spa_vl", "harm", 265),
)
GROUPS = {
    group: sum(column.group == group for column in COLUMNS)
    for group in dict.fromkeys(column.group for column in COLUMNS)
}
# Unsafe answers in %, arXiv 2406.12030, Table 2.
PUBLISHED = {
    "LLaVA-7B": (34.52, 7.74, 22.62, 17.26, 20.54, 98.08, 99.81, 44.15),
    "LLaVA-7B + DPO": (0.00, 0.60, 0.60, 1.19, 0.60, 0.00, 0.00, 0.00),
    "LLaVA-7B + PPO": (0.60, 0.00, 0.00, 1.19, 0.45, 0.19, 2.12, 0.00),
}


@dataclass(frozen=True)
class Cell:
    """One cell of the table."""

    text: str
    details: str = ""
    """Counts and interval."""
    note: str = ""
    """The number of unjudged answers, and how the benchmark's rows differ from the paper's rows."""


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    title: str
    how: str
    """Whose numbers these are: `published`, or the judge and what it counts."""
    cells: tuple[Cell, ...]
    published: bool = False


def opposite(rate: Rate) -> Rate:
    """1 minus a rate. It turns the rate of refusals into the rate of answers that do not refuse."""
    low, high = rate.ends
    k = None if rate.k is None or rate.n is None else rate.n - rate.k
    return Rate(1 - rate.value, 1 - high, 1 - low, k, rate.n)


def rows(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[Row]:
    """The rows of the table; empty if the evaluation measured no column of the table.

    Args:
        results: Subject -> benchmark as the user wrote it -> the content of results.json.
    """
    own = [row for name, pages in results.items() for row in _own(name, pages)]
    if not own:
        return []
    published = [
        Row(title, "published", tuple(Cell(f"{value:.2f}\u00a0%") for value in values), True)
        for title, values in PUBLISHED.items()
    ]
    return published + own


def _own(name: str, pages: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    """A row for each judge of a subject."""
    judges = {key: j for page in pages.values() for key, j in page["judges"].items()}
    for key, judge in judges.items():
        axis = "harmful" if "harmful" in judge["axes"] else "refused"
        if axis not in judge["axes"]:
            continue
        cells = tuple(_cell(pages, column, key, axis) for column in COLUMNS)
        if any(cell.details for cell in cells):
            counted = axis if axis == "harmful" else "not refused"
            label = judge.get("label", judge["name"])
            yield Row(name, f"{counted}, judge {label}", cells)


def _cell(pages: Mapping[str, Mapping[str, Any]], column: Column, judge: str, axis: str) -> Cell:
    for page in pages.values():
        about = page["protocol"]["benchmark"]
        if about["name"] != column.benchmark or judge not in page["judges"]:
            continue
        found, subset = _part(page["judges"][judge]["rates"][axis], about["subsets"], column)
        if not found or "k" not in found:
            continue
        rate = Rate.from_dict(found)
        if rate and axis == "refused":
            rate = opposite(rate)
        notes = [f"{found['unjudged']} unjudged"] if found["unjudged"] else []
        if subset != column.subset or found["rows"] != column.rows:
            whole = f"the paper has {column.rows}" + (
                f" of {column.subset}" if subset != column.subset else ""
            )
            notes.append(f"{found['rows']} rows of {subset}; {whole}")
        # The paper did not publish its suffixes, so the suffixes of any evaluation are others.
        as_published = about["pins"] == "as published" and column.subset != "suffix"
        if not as_published:
            notes.append("own suffixes" if column.subset == "suffix" else f"files {about['pins']}")
        elif len(notes) == bool(found["unjudged"]):
            notes.append("as in the paper")
        if not rate:
            return Cell("nothing judged", f"0/{found['rows']}", "; ".join(notes))
        return Cell(percent(rate), f"{rate.counts} · {rate.interval}", "; ".join(notes))
    return Cell("not measured")


def _part(
    tables: Mapping[str, Any], subsets: list[str], column: Column
) -> tuple[Mapping[str, Any] | None, str]:
    """The rate that belongs in a column, and the subset that it was measured on."""
    if column.benchmark == "mm_safetybench" and len(subsets) == 1:
        if column.variant:
            return tables.get("by_variant", {}).get(column.variant), subsets[0]
        return tables["all"], subsets[0]
    if column.variant:  # the rates of a subset are not split by variant
        return None, column.subset
    if subsets == [column.subset]:
        return tables["all"], column.subset
    return tables.get("by_subset", {}).get(column.subset), column.subset

"""Select rows by filters, or as nested subsets.

A subset is the beginning of a seeded order, so a larger subset contains every smaller one. The
order spreads classes and question types evenly, so each subset has about the proportions of the
whole set.
"""

import random
from collections import defaultdict
from collections.abc import Sequence

from datasets import Dataset

from spavl_lib.data.schema import column


def subset(rows: Dataset, count: int, seed: int = 0, how: str = "stratified") -> Dataset:
    """The first rows of a seeded order, returned in the order of `rows`.

    Args:
        rows: Rows in the schema.
        count: Number of rows; 0 selects all.
        seed: Seed of the order. Subsets with the same seed are nested.
        how: `stratified` over (class3, question_type), or `random`.
    """
    if count <= 0 or count >= len(rows):
        return rows
    if how == "random":
        strata: Sequence[object] = [0] * len(rows)
    else:
        strata = list(zip(column(rows, "class3"), column(rows, "question_type"), strict=True))
    return rows.select(sorted(nested_order(strata, seed)[:count]))


def spread(rows: Dataset, count: int) -> list[dict]:
    """At most `count` rows, evenly over a set, so that classes, types and lengths differ."""
    return [rows[i] for i in range(0, len(rows), max(1, len(rows) // count))][:count]


def nested_order(strata: Sequence[object], seed: int) -> list[int]:
    """Row numbers in an order whose first n rows have about the proportions of the whole.

    Each stratum is shuffled, and its rows get positions in [0, 1) at equal distances from a random
    start. All rows are sorted by position. Among the first n rows, a stratum that has the share s
    of all rows has s n rows, give or take about one row.

    Args:
        strata: The stratum of each row.
        seed: Seed of the shuffles and the starts.
    """
    members: dict[object, list[int]] = defaultdict(list)
    for index, stratum in enumerate(strata):
        members[stratum].append(index)
    placed = []
    for stratum, indices in sorted(members.items(), key=lambda item: str(item[0])):
        draw = random.Random(f"subset/{seed}/{stratum}")
        draw.shuffle(indices)
        start = draw.random()
        placed += [((k + start) / len(indices), draw.random(), i) for k, i in enumerate(indices)]
    return [index for _, _, index in sorted(placed)]


def of_types(rows: Dataset, question_types: Sequence[str]) -> Dataset:
    """Rows of these question types; all rows if `question_types` is empty."""
    if not question_types:
        return rows
    indices = [i for i, t in enumerate(column(rows, "question_type")) if t in question_types]
    return rows.select(indices)


def of_sources(
    rows: Dataset, sources: tuple[list[set[str]], list[set[str]]], names: Sequence[str]
) -> Dataset:
    """Rows whose chosen response and rejected response both come from the named sources.

    Args:
        rows: Rows in the schema.
        sources: For each row the sources of its chosen response, and of its rejected response.
        names: The sources to select.
    """
    selected = set(names)
    pairs = enumerate(zip(*sources, strict=True))
    return rows.select([i for i, pair in pairs if all(side & selected for side in pair)])

"""Which rows of a set: filters, and smaller sets that lie within larger ones.

The order is seeded and spread over classes and question types, so that its first hundred, thousand
or ten thousand rows are each a fair picture of the whole, and each holds the smaller ones.
"""

import random
from collections import defaultdict
from collections.abc import Sequence

from datasets import Dataset

from spavl_lib.data.schema import column


def subset(rows: Dataset, wanted: int, seed: int = 0, how: str = "stratified") -> Dataset:
    """The first rows of one seeded order, in the set's own order.

    Args:
        rows: In the schema.
        wanted: How many; all if 0 or more than there are.
        seed: Of the order. Sizes of one seed are nested.
        how: `stratified` over (class3, question_type), or `random`.
    """
    if wanted <= 0 or wanted >= len(rows):
        return rows
    if how == "random":
        strata: Sequence[object] = [0] * len(rows)
    else:
        strata = list(zip(column(rows, "class3"), column(rows, "question_type"), strict=True))
    return rows.select(sorted(nested_order(strata, seed)[:wanted]))


def nested_order(strata: Sequence[object], seed: int) -> list[int]:
    """Row numbers so that every beginning holds each stratum in about its share of the whole.

    Each stratum is shuffled and laid out evenly over [0, 1) from a random start; the order is that
    of the places. A beginning of n rows holds a stratum of share s between s n - 1 and s n + 1
    times, but for how the random starts fall.

    Args:
        strata: A stratum a row.
        seed: Of shuffle and starts.
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
    """Rows of these question types; all if none is named."""
    if not question_types:
        return rows
    kept = [i for i, t in enumerate(column(rows, "question_type")) if t in question_types]
    return rows.select(kept)


def of_sources(
    rows: Dataset, sources: tuple[list[set[str]], list[set[str]]], wanted: Sequence[str]
) -> Dataset:
    """Rows both of whose answers were given by one of the wanted sources.

    Args:
        rows: In the schema.
        sources: Who gave each chosen, and each rejected answer.
        wanted: Names.
    """
    names = set(wanted)
    kept = [i for i, pair in enumerate(zip(*sources, strict=True)) if all(s & names for s in pair)]
    return rows.select(kept)

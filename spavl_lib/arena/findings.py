"""What follows from the arena's table and cells: ranks, shifts, transfer, and what mends.

Attacks whose carrier the base does not understand count nowhere here.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from spavl_lib.arena.cells import NONE, SAMPLES
from spavl_lib.arena.table import REFERENCE, outcomes
from spavl_lib.errors import InputError
from spavl_lib.evaluation.metrics import spearman
from spavl_lib.evaluation.statistics import Estimate, paired_difference, seeds_mean

BASE = "base"
SURE = 0.05  # largest p-value, after Holm's adjustment, at which a difference counts
FEWEST = 5  # fewest attacks from which a rank correlation is computed

Cell = Mapping[str, Any]


def understood(table: Mapping[str, Any]) -> list[str]:
    """The attacks of a table whose carrier the base understands, without the plain rows.

    Raises:
        InputError: The base was not measured, so that this is unknown.
    """
    if BASE not in table["metrics"]:
        raise InputError(
            "the table has no method `base`, so which attacks are understood is unknown; run "
            "`spavl arena run --methods base`"
        )
    measured = table["metrics"][BASE]
    return [
        attack
        for attack in table["attacks"]
        if attack != NONE and attack in measured and attack not in table["not_understood"]
    ]


def new_to_all(table: Mapping[str, Any]) -> list[str]:
    """The understood attacks that no method of a table was trained on, to compare all methods."""
    known = {attack for attacks in table["trained_on"].values() for attack in attacks}
    return [attack for attack in understood(table) if attack not in known]


def trained(table: Mapping[str, Any]) -> list[str]:
    """The methods of a table that train a model."""
    return [name for name in table["metrics"] if table["training"][name]["peak_memory_gib"]]


def standings(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The methods, the one with the lowest worst case first.

    All methods are compared on the same attacks, those of `new_to_all`.

    Args:
        table: The table.

    Returns:
        For each method its name, `worst` and `plain` (rates of unsafe answers under the attack that
        breaks it most, and without it on the same rows), that attack's name, the same of the attack
        that breaks it most but one (`second`, `second_attack`; None if there is only one), the mean
        over attacks, and `complete`: whether all attacks were measured. Incomplete methods stand
        last, and have no rank.
    """
    attacks, rows = new_to_all(table), []
    for name, cells in table["metrics"].items():
        rates = {a: cells[a]["unsafe"] for a in attacks if a in cells and cells[a]["unsafe"]}
        if not rates:
            continue
        order = sorted(rates, key=lambda attack: -rates[attack]["value"])
        worst, second = order[0], order[1] if len(order) > 1 else None
        rows.append({
            "method": name, "plain": cells[worst].get("plain"), "worst": rates[worst],
            "attack": worst, "second": second and rates[second], "second_attack": second,
            "mean": sum(rate["value"] for rate in rates.values()) / len(rates),
            "complete": len(rates) == len(attacks),
        })  # fmt: skip
    return sorted(rows, key=lambda row: (not row["complete"], row["worst"]["value"], row["mean"]))


def _by_seed(cells: Iterable[Cell], method: str, attack: str) -> dict[int, Cell]:
    return {c["seed"]: c for c in cells if c["method"] == method and c["attack"] == attack}


def shift(cells: Sequence[Cell], method: str, attack: str, rate: str) -> Estimate | None:
    """How much an attack changes a method's rate, on the same rows and seeds.

    Args:
        cells: All cells.
        method: Name of the method.
        attack: Name of the attack.
        rate: A key of `RATES`, or `twins`.

    Returns:
        The rate under the attack minus the rate without it, over the rows that count for the rate
        both times; None if there are none.
    """
    attacked, plain = (_by_seed(cells, method, name) for name in (attack, NONE))
    seeds = sorted(set(attacked) & set(plain))
    if not seeds:
        return None
    sides = [(_outcome_of(attacked[seed], rate), _outcome_of(plain[seed], rate)) for seed in seeds]
    common = set.intersection(*(set(side) for pair in sides for side in pair))
    ids, all_groups, _ = outcomes(attacked[seeds[0]], rate)
    kept = [(i, group) for i, group in zip(ids, all_groups, strict=True) if i in common]
    if not kept:
        return None
    groups = [group for _, group in kept]
    after, before = ([[pair[side][i] for i, _ in kept] for pair in sides] for side in (0, 1))
    if len(after) == 1:
        return paired_difference(after[0], before[0], groups)
    difference = np.array(after, dtype=float) - np.array(before, dtype=float)
    return seeds_mean(difference, groups, bounds=(-1.0, 1.0))


def _outcome_of(cell: Cell, rate: str) -> dict[str, bool]:
    ids, _, values = outcomes(cell, rate)
    return dict(zip(ids, values, strict=True))


def transfer(cells: Sequence[Cell], attack: str, methods: Sequence[str]) -> dict[str, Any] | None:
    """Whether an attack breaks different methods on the same rows.

    A row is broken if the answer is safe without the attack and unsafe under it. Two methods are
    compared on the rows that both answer safely without the attack.

    Args:
        cells: All cells.
        attack: Name of the attack.
        methods: The methods to compare, two by two, with equal seeds.

    Returns:
        `pairs`: the number of comparisons; `broken`: mean share of broken rows; `overlap`: rows
        that both broke, as a share of those that at least one broke; and `chance`: that share if
        the methods broke independent rows. Sums of rows over all pairs. None if nothing was broken.
    """
    both = either = expected = at_risk = broken = 0.0
    pairs = 0
    rows = {
        (method, seed): _broken(cell, plain)
        for method in methods
        for seed, cell in _by_seed(cells, method, attack).items()
        if (plain := _by_seed(cells, method, NONE).get(seed))
    }
    for (one, seed), (other, second) in combinations(rows, 2):
        if seed != second:
            continue
        first, last = rows[one, seed], rows[other, second]
        common = set(first) & set(last)
        if not common:
            continue
        hits = {row for row in common if first[row]}, {row for row in common if last[row]}
        chance = len(hits[0]) * len(hits[1]) / len(common)
        both += len(hits[0] & hits[1])
        either += len(hits[0] | hits[1])
        expected += chance
        at_risk += 2 * len(common)
        broken += len(hits[0]) + len(hits[1])
        pairs += 1
    if not broken:
        return None
    return {
        "pairs": pairs, "broken": broken / at_risk, "overlap": both / either,
        "chance": expected / (broken - expected),
    }  # fmt: skip


def _broken(attacked: Cell, plain: Cell) -> dict[str, bool]:
    """Id of each row that is safe without the attack -> whether it is unsafe under it."""
    before, after = _outcome_of(plain, "unsafe"), _outcome_of(attacked, "unsafe")
    return {row: unsafe for row, unsafe in after.items() if before.get(row) is False}


def agreements(table: Mapping[str, Any], methods: Sequence[str]) -> dict[str, dict[str, float]]:
    """Rank correlation of two methods' unsafe rates over the attacks: are the same attacks strong?

    Args:
        table: The table.
        methods: The methods to compare.

    Returns:
        Method -> method -> Spearman's correlation, of methods that were measured under all attacks
        and whose rates differ. Empty if there are fewer than `FEWEST` attacks.
    """
    attacks = understood(table)
    rates = {
        name: [table["metrics"][name][attack]["unsafe"]["value"] for attack in attacks]
        for name in methods
        if all(table["metrics"][name].get(attack, {}).get("unsafe") for attack in attacks)
    }
    rates = {name: values for name, values in rates.items() if len(set(values)) > 1}
    if len(attacks) < FEWEST:
        return {}
    found: dict[str, dict[str, float]] = {}
    for one, first in rates.items():
        for other, second in rates.items():
            if (value := spearman(first, second)) is not None:
                found.setdefault(one, {})[other] = value
    return found


def mends(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each attack, the methods that are surely safer than DPO under it.

    Args:
        table: The table.

    Returns:
        For each attack its name, DPO's unsafe rate, and `safer`: the methods whose unsafe rate is
        lower with p at most `SURE` and an interval below 0, the lowest first. A method that was
        trained on the attack is left out.
    """
    rows = []
    for attack in understood(table):
        own = table["metrics"].get(REFERENCE, {}).get(attack)
        if not own:
            continue
        safer = {
            name: cells[attack]["unsafe"]["value"]
            for name, cells in table["metrics"].items()
            if (against := cells.get(attack, {}).get("against"))
            and against["ci_high"] < 0
            and against["p"] <= SURE
            and attack not in table["trained_on"].get(name, ())
        }
        rows.append({
            "attack": attack, "reference": own["unsafe"],
            "safer": [name for _, name in sorted((rate, name) for name, rate in safer.items())],
        })  # fmt: skip
    return rows


def divergences(table: Mapping[str, Any]) -> dict[str, float]:
    """Method -> its KL divergence from the base, in nats per response.

    For the best of n samples it is log n - (n - 1) / n, which the true value cannot pass
    (Beirami et al. 2024, arXiv:2401.01879).
    """
    found = {name: cost["kl"] for name, cost in table["training"].items()}
    found |= {BASE: 0.0, "best_of_n": math.log(SAMPLES) - (SAMPLES - 1) / SAMPLES}
    return {n: kl for n, kl in found.items() if kl is not None and n in table["metrics"]}

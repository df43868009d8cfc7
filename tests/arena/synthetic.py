"""Made-up cells and tables of the arena."""

import random
from collections.abc import Iterable, Sequence
from typing import Any

from spavl_lib.arena.table import build_table
from spavl_lib.evaluation.attacks import ATTACKS

SHARES = {"base": 1.0, "safety_prompt": 0.9, "best_of_n": 0.5, "dpo": 0.1, "ppo": 0.2}
ROWS = 20


def rests_on(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """What a cell rests on.

    Args:
        seed: Seed of the cell.
        changes: Replaces entries.
    """
    return {
        "profile": "demo", "data": "mini", "model": {"weights": "0"}, "versions": {"torch": "2"},
        "method": {}, "settings_sha256": f"of seed {seed}", "attacked_rows": [],
    } | changes  # fmt: skip


def cell(
    method: str, attack: str, seed: int = 0, *, unsafe: float = 0.1, refused: float = 0.0,
    helpful: float = 0.9, rows: int = ROWS,
) -> dict[str, Any]:  # fmt: skip
    """A cell in which shares of the rows went wrong, the first ones of each set.

    Args:
        method: Name of the method.
        attack: Name of the attack.
        seed: Its seed.
        unsafe: Share of unsafe answers to harmful requests.
        refused: Share of refused harmless requests.
        helpful: Share of helpful answers.
        rows: Rows of each set; of the twins, twice as many.
    """
    sets = {}
    for name in ("harm", "help", "look_alikes", "twins"):
        ids = [f"{name}/{i}" for i in range(2 * rows if name == "twins" else rows)]
        harmful = {"harm": ids, "twins": ids[::2]}.get(name, [])
        harmless = [i for i in ids if i not in harmful]
        sets[name] = {
            "rows": ids,
            "groups": [f"thing {i % 7}" for i in range(len(ids))],
            "harmful": harmful,
            "unsafe": harmful[: round(unsafe * len(harmful))],
            "refused": harmless[: round(refused * len(harmless))],
            "unhelpful": harmless[: round((1 - helpful) * len(harmless))],
        }
        if attack in ATTACKS and (samples := int(ATTACKS[attack].budget.get("samples", 0))):
            unsafe_rows = enumerate(sets[name]["unsafe"])
            sets[name]["first_unsafe"] = {row: 1 + i % samples for i, row in unsafe_rows}
    shown = [("unsafe", "harm", "Sure! <b>Details</b>"), ("refused", "help", "I decline.")]
    return {
        "method": method, "attack": attack, "seed": seed, "sets": sets, "calls": 1,
        "examples": [
            {"kind": kind, "set": part, "id": f"{part}/0", "prompt": f"{method} {attack}",
             "response": said}
            for kind, part, said in shown
        ],
        "training": {"cpu_seconds": 60.0, "peak_memory_gib": 1.5}
        if method in ("dpo", "ppo", "rloo", "grpo", "sft", "kto", "simpo") else {},
        "kl": {"value": 2.5, "rows": 40} if method in ("dpo", "ppo") and attack == "none" else None,
        "rests_on": rests_on(seed), "weights": {}, "device": "cpu",
    }  # fmt: skip


def cells(
    methods: Sequence[str] = tuple(SHARES),
    attacks: Iterable[str] = ("none", "one_word", "one_word_prudence", "typographic", "noise"),
    seeds: Iterable[int] = (0,),
) -> list[dict[str, Any]]:
    """Cells of methods and attacks. The base does not understand `typographic`."""
    found = []
    for method in methods:
        for attack in attacks:
            for seed in seeds:
                dice = random.Random(f"{method} {attack} {seed}")
                share = SHARES.get(method, 0.3)
                unsafe = share if attack == "none" else min(1.0, share + dice.random() / 2)
                lost = attack == "typographic"
                refused = 0.3 if attack == "one_word_prudence" else 0.02
                helpful = 0.1 if lost else 0.9 - dice.random() / 5
                rates = {"unsafe": unsafe, "refused": refused, "helpful": helpful}
                found.append(cell(method, attack, seed, **rates))
    return found


def table(*args: Any, **options: Any) -> dict[str, Any]:
    """The table of `cells`."""
    return build_table(cells(*args, **options))

"""Fill the arena's table: one process for each method and seed, several at a time."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from spavl_lib.arena.cells import NONE, make_cells
from spavl_lib.arena.methods import find_method, methods
from spavl_lib.arena.table import build_table, read_cells
from spavl_lib.errors import InputError
from spavl_lib.evaluation.attacks import ATTACKS, find_attack
from spavl_lib.runs.files import write_json
from spavl_lib.runs.paths import repo_root
from spavl_lib.runs.text import say

CELLS = "benchmarks/results/laboratory"
TABLE = "laboratory.json"


def names_of(asked: str, known: Sequence[str]) -> list[str]:
    """Names from a text with commas; all known names for an empty text."""
    return [part.strip() for part in asked.split(",") if part.strip()] or list(known)


def run_arena(
    asked_methods: str,
    asked_attacks: str,
    seeds: Sequence[int],
    *,
    profile: str = "demo",
    output: Path | None = None,
    workers: int = 2,
    minutes: float = 100,
    rows: int = 0,
) -> Path:
    """Make all cells that are missing, then the table.

    After `minutes` no further method and seed is begun, and repeating the call goes on. A cell that
    is complete is kept, and so is a training.

    Args:
        asked_methods: Names with commas; empty for all.
        asked_attacks: Names with commas, with `none` for the plain rows; empty for all.
        seeds: Seeds of the trainings.
        profile: Name of the profile.
        output: Folder of the cells.
        workers: Processes at a time, each with one thread if there are several.
        minutes: See above.
        rows: Rows of each set; 0 for all.

    Returns:
        The table's file.

    Raises:
        InputError: A method or an attack is unknown, or a process failed.
    """
    output = output or repo_root() / CELLS
    names = names_of(asked_methods, list(methods()))
    attacks = names_of(asked_attacks, [NONE, *ATTACKS])
    for name in names:
        find_method(name)
    for name in attacks:
        if name != NONE:
            find_attack(name)
    ends = time.monotonic() + 60 * minutes
    # The reward model of a seed is made by the first method that needs it, before the others.
    waiting = [(name, seed) for seed in seeds for name in names]
    running: dict[tuple[str, int], subprocess.Popen] = {}
    try:
        while waiting or running:
            begun = {seed for name, seed in running if find_method(name).uses_reward}
            for name, seed in list(waiting):
                blocked = find_method(name).uses_reward and seed in begun
                if len(running) < workers and not blocked and time.monotonic() < ends:
                    waiting.remove((name, seed))
                    say(f"{name}, seed {seed}: begun")
                    running[name, seed] = _start(
                        name, seed, attacks, output, profile, rows, workers > 1
                    )
                    begun |= {seed} if find_method(name).uses_reward else set()
            if not running:
                say(f"{len(waiting)} of {len(names) * len(seeds)} left; repeat the command")
                break
            time.sleep(0.5)
            for arm, process in list(running.items()):
                if process.poll() is not None:
                    del running[arm]
                    if process.returncode:
                        raise InputError(
                            f"{arm[0]}, seed {arm[1]}: the process failed; see its message above"
                        )
    finally:
        for process in running.values():
            process.terminate()
            process.wait()
    path = output.parent / TABLE if output.name == Path(CELLS).name else output / TABLE
    write_json(path, build_table(read_cells(output)))
    return path


def _start(
    name: str, seed: int, attacks: Sequence[str], output: Path, profile: str, rows: int, one: bool
) -> subprocess.Popen:
    words = [sys.executable, "-m", __name__, name, str(seed), ",".join(attacks), str(output)]
    env = os.environ | ({"OMP_NUM_THREADS": "1"} if one else {})
    return subprocess.Popen([*words, profile, str(rows)], env=env)


if __name__ == "__main__":
    _name, _seed, _attacks, _output, _profile, _rows = sys.argv[1:]
    make_cells(
        find_method(_name), int(_seed), _attacks.split(","), Path(_output), _profile,
        rows=int(_rows),
    )  # fmt: skip

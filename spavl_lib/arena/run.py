"""Fill the arena's table: a process for each method and seed or trial, several at a time."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spavl_lib.arena import choose
from spavl_lib.arena.cells import NONE, make_cells
from spavl_lib.arena.methods import CHOSEN, chosen_values, find_method, methods, reward_config
from spavl_lib.arena.table import build_table, read_cells
from spavl_lib.config import load_config
from spavl_lib.errors import InputError
from spavl_lib.evaluation.attacks import ATTACKS, find_attack
from spavl_lib.runs import provenance
from spavl_lib.runs.files import read_json, write_json
from spavl_lib.runs.paths import repo_root
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.runs.text import say

CELLS = "benchmarks/results/laboratory"
TABLE, METHODS = "laboratory.json", "methods.json"
TRIAL = "trial"
ROWS = 106  # of each set under an attack


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
    rows: int = ROWS,
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
        rows: Rows of each set under an attack; 0 for all.

    Returns:
        The table's file.

    Raises:
        InputError: A method or an attack is unknown, other cells of the folder were made with other
            packages, or a process failed.
    """
    output = _folder(output, profile)
    names = names_of(asked_methods, list(methods()))
    attacks = names_of(asked_attacks, [NONE, *ATTACKS])
    for name in names:
        find_method(name)
    for name in attacks:
        if name != NONE:
            find_attack(name)
    _check_versions(output, names, attacks, seeds)
    chosen = chosen_values(output)
    for method in map(find_method, names):
        if method.trials and method.name not in chosen:
            say(
                f"{method.name}: no value of {method.setting} is chosen, so {method.trials[0]} is "
                f"used; choose one with `spavl arena choose --methods {method.name}`"
            )
    words = [",".join(attacks), str(output), profile, str(rows)]
    units = [(name, seed) for seed in seeds for name in names]
    _side_by_side(units, words, workers, minutes)
    return make_table(output)


def _folder(output: Path | None, profile: str) -> Path:
    """The folder of the cells.

    Raises:
        InputError: Cells of another profile would come among those of demo. Or the profile's rows
            are not those of mini, whose truth is known.
    """
    if (source := load_config(profile).data.source) != "mini":
        raise InputError(
            f"the arena needs the rows of mini, whose truth is known; the profile {profile} reads "
            f"{source!r}"
        )
    usual = repo_root() / CELLS
    if (output or usual).absolute() == usual.absolute() and profile != "demo":
        raise InputError(
            f"{CELLS} holds cells of the profile demo; name another folder with --out for the "
            f"profile {profile}"
        )
    return output or usual


def _check_versions(
    output: Path, names: Sequence[str], attacks: Sequence[str], seeds: Sequence[int]
) -> None:
    """Before hours of training, check that the folder's other cells can stand in one table.

    Args:
        output: Folder of the cells.
        names: The methods that are made.
        attacks: The attacks, with `none`, that are made.
        seeds: The seeds that are made.

    Raises:
        InputError: Cells that are not made again were made with other versions of packages.
    """
    here = provenance.versions()
    for cell in read_cells(output):
        made = cell["method"] in names and cell["attack"] in attacks and cell["seed"] in seeds
        theirs = cell["rests_on"]["versions"]
        if theirs != here and not made:
            differing = ", ".join(
                f"{name} {theirs.get(name)} (here {here.get(name)})"
                for name in sorted({*theirs, *here})
                if theirs.get(name) != here.get(name)
            )
            raise InputError(
                f"{output}: its cells were made with {differing}, and cells of different packages "
                "do not stand in one table; name a folder of your own with --out, or install these"
            )


def choose_settings(
    asked_methods: str,
    *,
    profile: str = "demo",
    output: Path | None = None,
    workers: int = 2,
    minutes: float = 100,
) -> dict[str, Any]:
    """Make the trials that are missing, and choose the value of each method's setting.

    `run_arena` uses the values that were chosen in its folder of cells.

    Args:
        asked_methods: As for `run_arena`.
        profile: As for `run_arena`.
        output: As for `run_arena`.
        workers: As for `run_arena`.
        minutes: As for `run_arena`.

    Returns:
        Method -> chosen value.
    """
    output = _folder(output, profile)
    names = names_of(asked_methods, list(methods()))
    units = choose.units(names)
    _side_by_side(units, [TRIAL, str(output), profile, "0"], workers, minutes)
    chosen = choose.choose(output, names)
    path = CHOSEN if output == repo_root() / CELLS else output / CHOSEN.name
    write_json(path, (read_json(path) if path.is_file() else {}) | chosen)
    return chosen


def make_table(output: Path) -> Path:
    """Write the table of all cells of a folder beside it, or into it if it is not the usual one.

    A second file, `methods.json`, has the column without an attack: what each method reaches.

    Args:
        output: Folder of the cells.

    Returns:
        The table's file.
    """
    path = output.parent / TABLE if output.name == Path(CELLS).name else output / TABLE
    packages, cells = ("torch", "transformers", "trl"), read_cells(output)
    page = {
        "name": "laboratory",
        "device": f"{', '.join(sorted({cell['device'] for cell in cells}))}, {platform.machine()}",
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }
    table = build_table(cells)
    write_json(path, page | table)
    plain = {
        name: {"settings": table["settings"][name]} | by_attack[NONE] | table["training"][name]
        for name, by_attack in table["metrics"].items()
        if NONE in by_attack
    }
    write_json(path.with_name(METHODS), page | {"name": "methods", "metrics": plain})
    return path


def _side_by_side(
    units: list[tuple[str, int]], words: list[str], workers: int, minutes: float
) -> None:
    """Run a process for each unit, and begin none after `minutes`.

    Args:
        units: Method, and seed or number of the trial.
        words: The other arguments of each process.
        workers: Processes at a time.
        minutes: See above.

    Raises:
        InputError: A process failed.
    """
    ends = time.monotonic() + 60 * minutes
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    rewards = {unit: _reward_stage(unit, words) for unit in units}
    waiting = list(units)
    running: dict[tuple[str, int], subprocess.Popen] = {}
    try:
        while waiting or running:
            for unit in list(waiting):
                if len(running) >= workers or time.monotonic() >= ends:
                    break
                # The first process that needs a reward model makes it, and the others wait for it.
                needed = rewards[unit]
                if (
                    needed
                    and not needed.done
                    and needed.path in (other.path for other in map(rewards.get, running) if other)
                ):
                    continue
                waiting.remove(unit)
                say(f"{unit[0]}, {words[0] if words[0] == TRIAL else 'seed'} {unit[1]}: begun")
                command = [sys.executable, "-m", __name__, unit[0], str(unit[1]), *words]
                running[unit] = subprocess.Popen(command, env=env)
            if not running:
                say(f"{len(waiting)} of {len(units)} left; repeat the command")
                break
            time.sleep(0.5)
            for unit, process in list(running.items()):
                if process.poll() is not None:
                    del running[unit]
                    if process.returncode:
                        raise InputError(
                            f"{unit[0]}, {unit[1]}: the process failed; see its message above"
                        )
    finally:
        for process in running.values():
            process.terminate()
            process.wait()


def _reward_stage(unit: tuple[str, int], words: list[str]) -> Stage | None:
    """The reward model's stage that a unit needs.

    Args:
        unit: As for `_side_by_side`.
        words: As for `_side_by_side`.
    """
    method, profile = find_method(unit[0]), words[2]
    if not method.uses_reward:
        return None
    seed = choose.SEED if words[0] == TRIAL else unit[1]
    return Run(reward_config(method, seed, profile)).stage("reward")


if __name__ == "__main__":
    _name, _number, _attacks, _output, _profile, _rows = sys.argv[1:]
    if _attacks == TRIAL:
        choose.make_trial(find_method(_name), int(_number), Path(_output), _profile)
    else:
        make_cells(
            find_method(_name), int(_number), _attacks.split(","), Path(_output), _profile,
            rows=int(_rows),
        )  # fmt: skip

"""The stage of notebook 08: the published table, or in the profile `smoke` a small one made now."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spavl_lib.arena.cells import NONE, make_cells
from spavl_lib.arena.methods import CHOSEN, FILE, find_method
from spavl_lib.arena.run import CELLS, TABLE
from spavl_lib.arena.table import build_table, read_cells, read_table
from spavl_lib.config import Config, load_config
from spavl_lib.modelling.load import weights_sha256
from spavl_lib.runs.files import sha256_file, write_json
from spavl_lib.runs.maker import stage_maker
from spavl_lib.runs.paths import repo_root
from spavl_lib.runs.stage import Stage

LIVE = "smoke"  # the profile that makes a small table
METHODS = ("base", "dpo")
ATTACKS = (NONE, "one_word", "one_word_prudence")
ROWS = 4  # of each test set


def _inputs(config: Config, stage: Stage) -> dict[str, str]:
    if config.profile == LIVE:
        model = load_config(LIVE).model  # the arena's methods do not read the run's own settings
        files = {path.name: sha256_file(path) for path in (FILE, CHOSEN)}
        return files | {f"model/{name}": sha for name, sha in weights_sha256(model).items()}
    read_table(_published())  # says how to make the table if it is missing
    return {"table": sha256_file(_published())}


def _published() -> Path:
    return repo_root() / Path(CELLS).parent / TABLE


@stage_maker("laboratory", inputs=_inputs, renew=True)
def make_laboratory_stage(config: Config, stage: Stage) -> dict:
    """In the profile `smoke`, make a small table; in all others, use the published one.

    The small table's trainings and cells are in the stage's folder. The methods' settings are those
    of the arena with this profile, so the run's own settings do not change them.

    Args:
        config: Uses `profile`, `model` and `seed`.
        stage: The stage.

    Returns:
        The summary: the numbers of methods, attacks and cells, and whether the table is published.

    Raises:
        InputError: There is no published table.
    """
    inputs, live = _inputs(config, stage), config.profile == LIVE
    if live:
        folder = stage.path / "cells"
        with _runs_in(stage.path / "runs"):
            for name in METHODS:
                make_cells(find_method(name), config.seed, ATTACKS, folder, LIVE, rows=ROWS)
        table = build_table(read_cells(folder))
        write_json(stage.path / TABLE, table)
    else:
        table = read_table(_published())
    return {
        "inputs": inputs,
        "published": not live,
        "methods": len(table["methods"]),
        "attacks": len(table["attacks"]),
        "cells": sum(len(by_attack) for by_attack in table["metrics"].values()),
    }


@contextlib.contextmanager
def _runs_in(folder: Path) -> Iterator[None]:
    """Within the block, runs are in another folder."""
    before = os.environ.get("SPAVL_RUNS")
    os.environ["SPAVL_RUNS"] = str(folder.absolute())
    try:
        yield
    finally:
        if before is None:
            del os.environ["SPAVL_RUNS"]
        else:
            os.environ["SPAVL_RUNS"] = before


def read_laboratory(stage: Stage) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The table of a complete stage, and its cells.

    Args:
        stage: The stage `laboratory`.

    Returns:
        What `build_table` returns, and what `read_cells` returns. The list is empty if the cells
        of the published table are not at hand.
    """
    if stage.summary["published"]:
        return read_table(_published()), read_cells(repo_root() / CELLS)
    return read_table(stage.path / TABLE), read_cells(stage.path / "cells")

"""Run notebooks 01 to 06 in order."""

import time
from pathlib import Path
from typing import Any

from spavl_lib import stages
from spavl_lib.config import Config
from spavl_lib.data.load import load_truth
from spavl_lib.errors import InputError
from spavl_lib.evaluation.judges import check_judge
from spavl_lib.notebook.execute import (
    check_parameters,
    list_notebooks,
    notebooks_folder,
    run_notebook,
    stage_of,
)
from spavl_lib.runs.stage import Run
from spavl_lib.runs.text import say

FIRST_SIX = ("data", "reward", "ppo", "dpo", "inference", "evaluation")


def run_all(
    config: Config,
    overrides: dict[str, Any] | None = None,
    *,
    profile: str | None = None,
    folder: Path | None = None,
) -> Path:
    """Execute notebooks 01 to 06 in order.

    A notebook is skipped if its stage is complete, its executed notebook exists, and no stage that
    it builds on was made again. An interrupted stage resumes from its checkpoint. Every notebook,
    every existing stage and the judge are checked before the first notebook runs.

    Args:
        config: As for `run_notebook`.
        overrides: As for `run_notebook`.
        profile: As for `run_notebook`.
        folder: As for `run_notebook`.

    Returns:
        The run's folder.

    Raises:
        SpavlError: A notebook failed or was stopped, as in `run_notebook`; or a check failed.
    """
    run = Run(config)
    folder = folder or notebooks_folder()
    sequence = {path: run.stage(stage_of(path)) for path in list_notebooks(folder)}
    sequence = {path: stage for path, stage in sequence.items() if stage.name in FIRST_SIX}
    if not sequence:
        raise InputError(f"no notebooks in {folder}; run this from a checkout of the workbook")
    check_judge(config.evaluation, load_truth(config.data))
    for path, stage in sequence.items():
        check_parameters(path)
        stage.check_config()
    made_now: set[str] = set()
    for path, stage in sequence.items():
        # If an earlier stage was made now, this notebook runs; the stage's maker decides what to
        # do again.
        stale = made_now & set(stages.find(stage.name).upstream)
        if stage.done and (stage.path / "executed.ipynb").is_file() and not stale:
            say(f"{stage.name}: done, kept")
            continue
        made_now.add(stage.name)
        say(f"{stage.name}: running {path.name}")
        started = time.perf_counter()
        run_notebook(path.stem, config, overrides, run, profile=profile, folder=folder)
        say(f"{stage.name}: done in {time.perf_counter() - started:.0f} s")
    return run.path

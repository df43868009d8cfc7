"""Run notebooks 01 to 06, in order or side by side."""

import time
from pathlib import Path
from typing import Any

from spavl_lib import stages
from spavl_lib.config import Config
from spavl_lib.data.load import check_own_prompts, load_truth
from spavl_lib.errors import InputError
from spavl_lib.evaluation.judges import check_judge
from spavl_lib.notebook.execute import (
    check_parameters,
    list_notebooks,
    notebooks_folder,
    run_notebook,
    stage_of,
)
from spavl_lib.notebook.lanes import MOST, lanes_here, run_in_lanes
from spavl_lib.runs.maker import is_current
from spavl_lib.runs.stage import Run
from spavl_lib.runs.text import say

FIRST_SIX = ("data", "reward", "ppo", "dpo", "inference", "evaluation")


def run_all(
    config: Config,
    overrides: dict[str, Any] | None = None,
    *,
    profile: str | None = None,
    folder: Path | None = None,
    lanes: int = MOST,
) -> Path:
    """Execute notebooks 01 to 06, those that do not need each other side by side.

    A notebook is skipped if its stage is complete and has the same inputs, the executed notebook
    exists, and no upstream stage was made again. The evaluation must also have the same settings.
    If the data or the model of a complete stage have changed, inference and evaluation are made
    again, but any other stage raises an error. An interrupted stage resumes from its checkpoint.
    Before the first notebook runs, the notebooks' parameters, the configs of existing stages, the
    prompts and the judge are checked.

    Args:
        config: As for `run_notebook`.
        overrides: As for `run_notebook`.
        profile: As for `run_notebook`.
        folder: As for `run_notebook`.
        lanes: Largest number of notebooks that run at a time.

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
        raise InputError(
            f"no notebooks in {folder}; run this in a checkout, or set SPAVL_NOTEBOOKS"
        )
    check_own_prompts(config.data)
    check_judge(config.evaluation, load_truth(config.data))
    for path, stage in sequence.items():
        check_parameters(path)
        stage.check_all()
    made_now: set[str] = set()

    def is_kept(name: str) -> bool:
        # If an upstream stage was made now, this notebook runs, and the stage's maker decides what
        # to do again. Another judge makes only the evaluation outdated.
        stage = run.stage(name)
        stale = made_now & set(stages.find(name).builds_on(config))
        judged_otherwise = name == "evaluation" and stage.differs_in("evaluation")
        outdated = stale or judged_otherwise
        kept = stage.done and (stage.path / "executed.ipynb").is_file() and not outdated
        if kept and is_current(name, config, stage):
            say(f"{name}: done, kept")
            return True
        made_now.add(name)
        return False

    options: dict[str, Any] = {"config": config, "overrides": overrides, "run": run}
    options |= {"profile": profile, "folder": folder}
    count, reason = lanes_here(config, lanes)
    if count > 1:
        notebooks = {stage.name: path for path, stage in sequence.items()}
        run_in_lanes(notebooks, count, is_kept, **options)
        return run.path
    say(f"one notebook at a time: {reason}")
    for path, stage in sequence.items():
        if not is_kept(stage.name):
            say(f"{stage.name}: running {path.name}")
            started = time.perf_counter()
            run_notebook(path.stem, **options)
            say(f"{stage.name}: done in {time.perf_counter() - started:.0f} s")
    return run.path

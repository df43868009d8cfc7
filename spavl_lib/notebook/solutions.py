"""The setup cell of the notebooks in `notebooks/solutions/`."""

import dataclasses

from spavl_lib.config import Config
from spavl_lib.notebook.session import open_stage
from spavl_lib.runs.stage import Run, Stage

FOLDER = "solutions"  # in a run's folder; no stage has this name


def open_solutions(
    name: str, profile: str, *, seed: int = -1, run_name: str = "", overrides: dict | None = None
) -> tuple[Config, Stage]:
    """Resolve a notebook's parameters, and choose the folder of its own trainings.

    The trainings of solutions go into `runs/<run>/solutions/<stage>/`. The run's own stages stay as
    they are.

    Args:
        name: The lesson's stage, such as `dpo`.
        profile: As for `open_stage`.
        seed: As for `open_stage`.
        run_name: The run whose stages are used, as for `open_stage`.
        overrides: As for `open_stage`.

    Returns:
        The run's config, and a stage in the run's folder `solutions`, for `train_variant`.

    Raises:
        InputError: As for `open_stage`.
    """
    config, stage = open_stage(name, profile, seed=seed, run_name=run_name, overrides=overrides)
    inside = dataclasses.replace(config, run_name=FOLDER)
    return config, Run(inside, root=stage.run.path).stage(name)

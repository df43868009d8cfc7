"""The scaling stage: train arms that differ in one setting, measure each arm, and compare them.

    make scaling        # spavl run 07_scaling_and_ablations --profile demo

Every arm makes one pass over its rows, or `scaling.min_steps` updates if that is more. All arms are
measured on the same prompts. Each arm is a run under `scaling/arms/`. A complete arm is kept, an
interrupted arm continues, and several workers share the remaining arms. Arms with equal settings
are trained once.
"""

import dataclasses

from spavl_lib.config import Config
from spavl_lib.data.load import prompt_origin
from spavl_lib.errors import Preempted
from spavl_lib.modelling.load import quiet_libraries, weights_sha256
from spavl_lib.runs.bar import Bar
from spavl_lib.runs.files import read_json, write_json
from spavl_lib.runs.maker import stage_maker
from spavl_lib.runs.signals import RESUME, StopFlag
from spavl_lib.runs.stage import Stage
from spavl_lib.scaling.arms import Arm, arm_stage, distinct, plan
from spavl_lib.scaling.findings import gather
from spavl_lib.scaling.training import measure, run_arm
from spavl_lib.scaling.workers import default_workers, run_in_workers


def _inputs(config: Config, stage: Stage) -> dict[str, str]:
    return {f"model/{name}": digest for name, digest in weights_sha256(config.model).items()}


@stage_maker("scaling", inputs=_inputs, polls_stop=True)
def run_scaling(config: Config, stage: Stage, flag: StopFlag) -> dict:
    """Train and measure every arm, and gather the results.

    Args:
        config: The run's config.
        stage: The scaling stage.
        flag: Becomes true when a stop is requested.

    Returns:
        The summary: the base model's rates, one row per arm with its rates over all seeds, the
        paper's numbers, and the findings.

    Raises:
        InputError: The config names no arms, or names an arm that cannot be made.
        Preempted: A stop was requested. Complete arms are kept.
    """
    quiet_libraries()
    arms = plan(config)
    base = _base(config, stage, flag)
    unique = distinct(arms)
    incomplete = sum(not arm_stage(stage, arm).done for arm in unique)
    workers = min(config.scaling.workers or default_workers(), max(1, incomplete))
    if workers == 1:
        _run_here(stage, unique, flag)
    else:
        run_in_workers(stage, unique, workers, flag)
    results = {arm.key: arm_stage(stage, arm).summary for arm in unique}
    return gather(config, arms, results, base) | {"prompts": prompt_origin(config.data)}


def _base(config: Config, stage: Stage, flag: StopFlag) -> dict:
    """The base model's rates on the prompts of the arms."""
    path = stage.path / "base.json"
    if not path.is_file():
        data = dataclasses.replace(config.data, test_rows=config.scaling.eval_rows)
        rates = measure(dataclasses.replace(config, data=data), None, stage.path / "base", flag)
        write_json(path, rates)
    return read_json(path)


def _run_here(stage: Stage, arms: list[Arm], flag: StopFlag) -> None:
    with Bar(total=len(arms), desc="arms", unit="arm") as bar:
        for arm in arms:
            if flag:
                raise Preempted(f"stopped between two arms; {RESUME}")
            run_arm(stage, arm, flag)
            bar.update(1)

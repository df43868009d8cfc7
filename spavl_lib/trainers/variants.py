"""Short trainings with changed settings, which show the effect of one setting on a stage."""

import dataclasses
from typing import Any

from spavl_lib.config import Config, LaunchConfig
from spavl_lib.runs.files import write_json
from spavl_lib.runs.maker import maker_of
from spavl_lib.runs.stage import VARIANT_FILE, VARIANT_FOLDERS, Run, Stage
from spavl_lib.trainers.inputs import reward_folder

WARMUP_STEPS = 5


def train_variant(
    kind: str, config: Config, stage: Stage, name: str, *, steps: int = 40, **changes: Any
) -> Stage:
    """Train a short variant of a stage in this process, in the stage's `variants/<name>/`.

    Args:
        kind: Trainer: `reward`, `dpo`, `ppo`, `rloo` or `grpo`. A variant of the last three uses
            the same reward model as `stage`, unless `changes` names another one.
        config: Config of the run.
        stage: Stage that the variant is compared with.
        name: Name of the variant and of its folder.
        steps: Largest number of steps. If the trainer's `max_steps` is smaller, that is the limit.
        changes: Name -> value of the settings to change in the trainer's section.

    Returns:
        The complete stage of the variant.

    Raises:
        InputError: A setting is invalid, or the trainer raises this error.
    """
    settings = getattr(config, kind)
    steps = min(steps, settings.max_steps or steps)
    changes = {"max_steps": steps, "warmup_steps": min(WARMUP_STEPS, steps)} | changes
    if getattr(settings, "uses_run_reward", False) and "reward_model" not in changes:
        changes["reward_model"] = str(reward_folder("", stage))
    settings = dataclasses.replace(settings, **changes)
    here = LaunchConfig(num_threads=config.launch.num_threads)  # in this process
    varied = dataclasses.replace(config, **{kind: settings}, run_name=name, launch=here)
    variant = Run(varied, root=stage.path / VARIANT_FOLDERS[0]).stage(kind)
    changed = sorted(f"{kind}.{setting}" for setting in changes)
    write_json(variant.run.path / VARIANT_FILE, {"stage": kind, "changes": changed})
    maker_of(kind)(varied, variant)
    return variant

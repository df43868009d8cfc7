"""Short trainings with other settings, beside the real one: what does a setting do?"""

import dataclasses
from typing import Any

from spavl_lib.config import Config, LaunchConfig
from spavl_lib.runs.maker import maker_of
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.trainers.inputs import reward_folder


def train_contrast(
    kind: str, config: Config, stage: Stage, name: str, *, steps: int = 40, **changes: Any
) -> Stage:
    """A short training with other settings, in this process, under `contrast/<name>/` of a stage.

    Args:
        kind: `dpo`, `ppo` or `rloo`. The latter two use the run's own reward model.
        config: Of the run.
        stage: The stage it is held against.
        name: Folder of the contrast.
        steps: At most so many are trained, and never more than the run's own.
        changes: Fields of that kind's config.

    Returns:
        The contrast's own stage.

    Raises:
        InputError: As the trainer; a setting that cannot be.
    """
    settings = getattr(config, kind)
    short = min(steps, settings.max_steps or steps)
    changes = {"max_steps": short, "warmup_steps": min(5, short)} | changes
    if hasattr(settings, "reward_model"):
        changes.setdefault("reward_model", str(reward_folder(settings.reward_model, stage)))
    settings = dataclasses.replace(settings, **changes)
    other = dataclasses.replace(config, **{kind: settings}, run_name=name, launch=LaunchConfig())
    contrast = Run(other, root=stage.path / "contrast").stage(kind)
    maker_of(kind)(other, contrast)
    return contrast

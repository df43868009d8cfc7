"""The stage of notebook 03b: short trainings of PPO and RLOO, each with other settings."""

import dataclasses
from typing import Any

from spavl_lib.config import Config
from spavl_lib.config.presets import original_preset
from spavl_lib.data.load import load_preferences
from spavl_lib.runs.maker import stage_maker
from spavl_lib.runs.stage import Stage
from spavl_lib.trainers.inputs import check_images, reward_inputs, training_inputs
from spavl_lib.trainers.variants import train_variant

STEPS = {"ppo": 6, "rloo": 8}
LARGEST_RLOO_BATCH = 32


def _inputs(config: Config, stage: Stage) -> dict[str, str]:
    inputs = training_inputs(config, stage)
    for section in (config.ppo, config.rloo):
        inputs |= reward_inputs(section, stage)
    return inputs


@stage_maker("practice", inputs=_inputs)
def make_practice_stage(config: Config, stage: Stage) -> dict:
    """Train every variant of `variants_of` for a few steps, from the base model.

    RLOO takes only prompts with one image, so it trains without the pairs of `data.extra_path`.

    Args:
        config: Uses `data`, `model`, `ppo`, `rloo` and `seed`.
        stage: The stage. Each variant is in `variants/<name>/`.

    Returns:
        The summary: the trainer, the number of steps and the changed settings of each variant.

    Raises:
        InputError: A row of the source has no image or several, or a trainer raises this error.
    """
    own = dataclasses.replace(config, data=dataclasses.replace(config.data, extra_path=""))
    check_images("rloo", own.data, load_preferences(own.data, "train"))
    summary = {}
    for name, (trainer, changes) in variants_of(config).items():
        run = own if trainer == "rloo" else config
        variant = train_variant(trainer, run, stage, name, steps=STEPS[trainer], **changes)
        summary[name] = {
            "trainer": trainer,
            "steps": variant.summary["steps"],
            "changes": {key: str(value) for key, value in changes.items()},
        }
    return {"variants": summary}


def variants_of(config: Config) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name of a variant -> its trainer, and the settings that differ from the run's.

    Args:
        config: The run's config.
    """
    group = config.rloo.num_generations
    batch = min(LARGEST_RLOO_BATCH, config.rloo.per_device_batch_size)
    return {
        "free_kl": ("ppo", {"kl_coef": 0.0, "sft_coef": 0.0}),
        "high_kl": ("ppo", {"kl_coef": 100.0, "sft_coef": 0.0}),
        "original": ("ppo", original_settings(config)),
        "rloo": ("rloo", {"per_device_batch_size": batch // group * group or group}),
    }


def original_settings(config: Config) -> dict[str, Any]:
    """PPO's method settings in which the original code differs from this run: name -> value."""
    values = {"preset": "original"} | original_preset("ppo", config.model.adapter)
    return {k: v for k, v in values.items() if v != getattr(config.ppo, k)}

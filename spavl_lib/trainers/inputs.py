"""The inputs of a training besides its settings: data, model, precision, reward model."""

from pathlib import Path

from datasets import Dataset

from spavl_lib.config import Config
from spavl_lib.data.fingerprint import row_digests, source_hashes
from spavl_lib.data.load import load_preferences
from spavl_lib.distributed import group
from spavl_lib.errors import InputError
from spavl_lib.modelling.load import model_hashes
from spavl_lib.runs.files import sha256_file
from spavl_lib.runs.stage import Stage


def training_inputs(config: Config, stage: Stage) -> dict[str, str]:
    """Name -> hash or value of all that a training depends on besides its settings.

    A run is resumed, and a complete one reused, only if all of them are unchanged.

    Args:
        config: Uses `model` and `data`.
        stage: Not used; every `inputs` function of `@stage_maker` takes it.
    """
    return {
        **{f"model/{name}": digest for name, digest in model_hashes(config.model).items()},
        **source_hashes(config.data, ("train", "validation")),
    }


def policy_inputs(config: Config, stage: Stage) -> dict[str, str]:
    """`training_inputs` and the hash of the reward model that the policy is trained against.

    Args:
        config: Uses `model`, `data` and the section of the stage, for its `reward_model`.
        stage: The stage that is trained, such as `ppo`.

    Raises:
        InputError: There is no reward model yet.
    """
    folder = reward_folder(config.section(stage.name).reward_model, stage)
    weights = {f"reward/{p.name}": sha256_file(p) for p in folder.glob("*.safetensors")}
    return training_inputs(config, stage) | weights


def reward_folder(named: str, stage: Stage) -> Path:
    """The folder of the reward model that a stage trains against.

    Args:
        named: The setting `reward_model`; empty for this run's own reward model.
        stage: Stage that is trained.

    Raises:
        InputError: This run's reward model is not complete.
    """
    if named:
        return Path(named).expanduser()
    reward, run = stage.run.stage("reward"), stage.run
    if not reward.done:
        raise InputError(
            f"{stage.name} needs a reward model, and {reward.path} is not complete; run "
            f"spavl train reward --profile {run.config.profile} --run-name {run.name}, or set "
            f"{stage.name}.reward_model to a folder"
        )
    return reward.path / "model"


def load_rows(config: Config, stage: Stage, *splits: str) -> list[Dataset]:
    """The preferences of some splits; their digests are written into the stage's manifest.

    Args:
        config: Uses `data`.
        stage: The stage that is trained.
        splits: Such as `train` and `validation`.

    Raises:
        InputError: The data cannot be read.
    """
    with group.main_first():  # which may download or build the data set
        rows = {split: load_preferences(config.data, split) for split in splits}
    stage.note(data={split: row_digests(table) for split, table in rows.items()})
    return list(rows.values())

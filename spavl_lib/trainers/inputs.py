"""What a training depends on besides its settings: data, model, precision, reward model."""

from pathlib import Path

from datasets import Dataset

from spavl_lib.config import Config
from spavl_lib.data.fingerprint import row_digests, source_hashes
from spavl_lib.data.load import load_preferences
from spavl_lib.distributed import group
from spavl_lib.errors import InputError
from spavl_lib.modelling.load import compute_dtype, model_hashes
from spavl_lib.runs.files import sha256_file
from spavl_lib.runs.stage import Stage


def training_inputs(config: Config, stage: Stage) -> dict[str, str]:
    """Name -> hash or value of each input that a training depends on besides its settings.

    An incomplete stage is resumed, and a complete stage is reused, only if no input has changed.

    Args:
        config: Uses `model` and `data`.
        stage: Not used. `@stage_maker` passes it to every `inputs` function.
    """
    return {
        **{f"model/{name}": digest for name, digest in model_hashes(config.model).items()},
        **source_hashes(config.data, ("train", "validation")),
        "dtype": str(compute_dtype()).removeprefix("torch."),
    }


def policy_inputs(config: Config, stage: Stage) -> dict[str, str]:
    """`training_inputs`, and the hashes of the reward model that the policy is trained against.

    Args:
        config: Uses `model`, `data`, and `reward_model` of the stage's section.
        stage: The stage that is trained, such as `ppo`.

    Raises:
        InputError: The run's reward model is not complete.
    """
    folder = reward_folder(config.section(stage.name).reward_model, stage)
    weights = {f"reward/{p.name}": sha256_file(p) for p in folder.glob("*.safetensors")}
    return training_inputs(config, stage) | weights


def reward_folder(named: str, stage: Stage) -> Path:
    """The folder of the reward model that a stage trains against.

    Args:
        named: The setting `reward_model`. Empty uses this run's reward model.
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
    """Load the preference rows of some splits, and write their digests into the manifest.

    Args:
        config: Uses `data`.
        stage: The stage that is trained, whose manifest gets the digests.
        splits: Names of splits, such as `train` and `validation`.

    Raises:
        InputError: The data cannot be read.
    """
    with group.main_first():  # the main process may have to download or build the data set
        rows = {split: load_preferences(config.data, split) for split in splits}
    stage.note(data={split: row_digests(table) for split, table in rows.items()})
    return list(rows.values())

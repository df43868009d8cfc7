"""The inputs of a training besides its settings: preference rows, base model and reward model."""

from pathlib import Path

from datasets import Dataset
from transformers import ProcessorMixin

from spavl_lib.config import Config, DataConfig, GroupConfig, PPOConfig
from spavl_lib.data.fingerprint import row_digests, source_hashes
from spavl_lib.data.lengths import Limit, without_unfit_rows
from spavl_lib.data.load import load_preferences
from spavl_lib.data.schema import more_images
from spavl_lib.data.sources import laptop_pairs
from spavl_lib.data.sources.base import open_source
from spavl_lib.data.sources.extra import ExtraPairs
from spavl_lib.distributed import group
from spavl_lib.errors import InputError
from spavl_lib.modelling.load import context_length, model_hashes
from spavl_lib.modelling.processors import describe
from spavl_lib.runs.files import sha256_file
from spavl_lib.runs.stage import Stage


def training_inputs(config: Config, stage: Stage) -> dict[str, str]:
    """Hash each input that a training depends on besides its settings.

    An incomplete stage is resumed, and a complete stage is reused, only if no input has changed.

    Args:
        config: Uses `model` and `data`.
        stage: Not used. `@stage_maker` passes the stage to every `inputs` function.

    Returns:
        Name of each input -> its hash, such as the sha256 of a file.

    Raises:
        InputError: There are no data; or the pairs of the profile `laptop` hold the replies of
            another version of the model `laptop`, if that is the model.
    """
    hashes = model_hashes(config.model)
    if config.data.extra_path == laptop_pairs.NAME and config.model.name == "laptop":
        laptop_pairs.check_model(hashes)
    return {
        **{f"model/{name}": digest for name, digest in hashes.items()},
        **source_hashes(config.data, ("train", "validation")),
    }


def policy_inputs(config: Config, stage: Stage) -> dict[str, str]:
    """Hash the inputs of a policy: `training_inputs`, the reward model, and files with rules.

    Args:
        config: Uses `model`, `data`, and the settings of rewards in the stage's section.
        stage: The stage that is trained, such as `ppo`.

    Raises:
        InputError: The run's reward model is not complete.
    """
    return training_inputs(config, stage) | reward_inputs(config.section(stage.name), stage)


def reward_inputs(section: PPOConfig | GroupConfig, stage: Stage) -> dict[str, str]:
    """Hash what a method's rewards depend on: weights of the reward model, files with rules.

    Args:
        section: Settings of the method.
        stage: The stage that is trained.

    Raises:
        InputError: The run's reward model is needed and not complete.
    """
    rewards = getattr(section, "rewards", ("model",))
    rules = [Path(name.rpartition(":")[0]).expanduser() for name in rewards]
    files = [path for path in rules if path.suffix == ".py" and path.is_file()]
    if "model" in rewards:
        files += reward_folder(section.reward_model, stage).glob("*.safetensors")
    return {f"reward/{path.name}": sha256_file(path) for path in files}


def reward_folder(named: str, stage: Stage) -> Path:
    """Find the folder of the reward model that a stage trains against.

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
            f"{stage.name}.reward_model to the folder of a reward model"
        )
    return reward.path / "model"


def limit_of(config: Config, name: str) -> Limit:
    """Return how long the rows of a trainer may be.

    Args:
        config: Uses `model` and the trainer's section.
        name: Name of the trainer's section: reward, dpo, ppo, rloo, grpo, kto or
            online_dpo.
    """
    if name == "online_dpo":  # its own responses are shorter than `dpo.max_length` needs to be
        sampling = config.online_dpo.max_new_tokens
        return Limit(name, context_length(config.model), 0, (), sampling)
    section, context = config.section(name), context_length(config.model)
    if name not in ("ppo", "rloo", "grpo"):
        return Limit(name, context, section.max_length)
    sides = ("chosen",) if getattr(section, "sft_coef", 0) else ()
    longest = getattr(section, "max_length", 0)
    return Limit(name, context, longest, sides, section.max_new_tokens)


def load_rows(
    config: Config, stage: Stage, processor: ProcessorMixin, *splits: str
) -> list[Dataset]:
    """Load the preference rows of some splits, and write their digests into the manifest.

    Rows that are too long for the model cause an error, or are left out, before the model is
    loaded. The manifest also describes the processor. If the data have no split of held-out rows,
    these rows are drawn from the training rows, and the manifest says how.

    Args:
        config: Uses `data`, `model` and the section of the stage.
        stage: The stage that is trained, whose manifest gets the digests.
        processor: The model's processor.
        splits: Names of splits, such as `train` and `validation`.

    Raises:
        InputError: The data cannot be read, or a row is too long. With `data.on_bad_rows` = skip a
            row that is too long is left out instead.
    """
    with group.main_first():  # the main process may have to download or build the data set
        loaded = {split: load_preferences(config.data, split) for split in splits}
    limit = limit_of(config, stage.name)
    rows = {
        split: without_unfit_rows(processor, table, limit, config.data.on_bad_rows)
        for split, table in loaded.items()
    }
    stage.note(
        data={split: row_digests(table) for split, table in rows.items()},
        held_out=open_source(config.data).held_out(),
        processor=describe(processor),
    )
    return list(rows.values())


def check_images(name: str, data: DataConfig, rows: Dataset) -> None:
    """Raise if a row has no image or several, which trl does not take here.

    Args:
        name: Name of the method's section.
        data: Where the rows come from.
        rows: Training rows.

    Raises:
        InputError: A row has no image, or several. The message names the rows.
    """
    without = [i for i, cell in zip(rows["id"], rows["image"], strict=True) if cell is None]
    if without:
        leave = "leave these rows out"
        if data.extra_path and not {*without} - ExtraPairs(data).ids:
            leave = "set data.extra_path to an empty text, because they all come from its file"
        raise InputError(
            f"trl's {name.upper()} needs an image with every prompt, and {len(without)} rows have "
            f"none: {', '.join(without[:20])}; {leave}, or use `spavl train ppo`, "
            "which also takes prompts without an image"
        )
    several = [i for i, more in zip(rows["id"], more_images(rows), strict=True) if more]
    if several:
        raise InputError(
            f"trl's {name.upper()} needs one image with every prompt, and {len(several)} rows have "
            f"several: {', '.join(several[:20])}; leave these rows out, or use `spavl train ppo`, "
            "which also takes prompts with several images"
        )

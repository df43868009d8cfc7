"""The methods of the arena: what each is, how it is trained, and how it answers."""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from spavl_lib import stages
from spavl_lib.arena.attacked_rows import TRAINED_ON, attacked_folder
from spavl_lib.config import Config, load_config
from spavl_lib.errors import InputError, nearest
from spavl_lib.runs.files import read_json
from spavl_lib.runs.stage import Run

FILE = Path(__file__).with_name("methods.yaml")
CHOSEN = Path(__file__).with_name("chosen.json")  # method -> value, of the published table
SENTENCE = "sentence"  # the setting of the safety prompt; all others are settings of a run


@dataclass(frozen=True)
class Method:
    """A row of `methods.yaml`."""

    name: str
    title: str
    source: str
    """Paper or model that it comes from."""
    stage: str = ""
    """Stage that trains it; empty if the base model answers."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Dotted name -> value of the settings that differ from the profile's."""
    reward_settings: dict[str, Any] = field(default_factory=dict)
    """As `settings`, for the reward model; empty if it uses the one that methods share."""
    answers: str = "plain"
    """plain: greedy decoding; safety_prompt: a sentence about safety stands before the question;
    best_of_n: of several samples, the one with the best score of the reward model."""
    attacked_rows: bool = False
    """Whether a part of its training rows is attacked."""
    setting: str = ""
    """Name of the setting that is chosen on mini's development rows."""
    trials: tuple[Any, ...] = ()
    """Values of that setting that were tried."""

    @property
    def trained_on(self) -> tuple[str, ...]:
        """The attacks that its training rows were changed by."""
        return TRAINED_ON if self.attacked_rows else ()

    @property
    def uses_reward(self) -> bool:
        """Whether it needs a reward model."""
        return self.answers == "best_of_n" or (
            bool(self.stage) and "reward" in stages.find(self.stage).upstream
        )

    def chosen(self, folder: Path | None = None) -> Any:
        """The chosen value of its setting; the first of `trials` as long as none is chosen.

        Args:
            folder: Folder of cells. The values that were chosen there go before those of the
                published table. None for the latter alone.

        Raises:
            InputError: The chosen value is none of `trials`.
        """
        known = chosen_values(folder)
        value = known.get(self.name, self.trials[0] if self.trials else None)
        if self.trials and value not in self.trials:
            raise InputError(
                f"{CHOSEN.name}: {self.name} has {value!r}, which is none of its trials in "
                f"{FILE.name}; run `spavl arena choose --methods {self.name}`"
            )
        return value


def chosen_values(folder: Path | None = None) -> dict[str, Any]:
    """Method -> chosen value; see `Method.chosen`."""
    files = [CHOSEN, *([folder / CHOSEN.name] if folder else [])]
    known: dict[str, Any] = {}
    for path in filter(Path.is_file, files):
        known |= read_json(path)
    return known


@functools.cache
def methods() -> dict[str, Method]:
    """Name -> method, in the order of the file."""
    rows = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return {name: Method(name, **row) for name, row in rows.items()}


def find_method(name: str) -> Method:
    """The method of a name.

    Raises:
        InputError: There is no such method. The message names the most similar one.
    """
    known = methods()
    if name not in known:
        raise InputError(
            f"there is no method {name!r} (known: {', '.join(known)}){nearest(name, known)}"
        )
    return known[name]


def config_of(method: Method, value: Any, seed: int, profile: str) -> Config:
    """The config of a method's run, `arena-METHOD-VALUE-SEED` in the profile demo.

    Args:
        method: The method.
        value: Value of the setting that is chosen; None for a method without one.
        seed: Seed of the training.
        profile: Name of the profile. In `smoke`, a training is as short as the profile says.

    Raises:
        InputError: The method's settings do not fit the profile.
    """
    settings = dict(method.settings)
    if profile == "smoke":
        lengths = ("_steps", "rounds", "prompts", "batch_size")
        settings = {key: old for key, old in settings.items() if not key.endswith(lengths)}
    name = f"{_prefix(profile)}-{method.name}"
    if method.stage and method.setting:
        settings[method.setting] = value
        name += f"-{value:g}"
    if method.uses_reward and method.stage:
        settings[f"{method.stage}.reward_model"] = str(reward_folder(method, seed, profile))
    if method.attacked_rows:
        rows = attacked_folder(load_config(profile).data)
        settings |= {"data.source": "hub_layout", "data.path": str(rows)}
    try:
        return load_config(profile, settings, seed=seed, run_name=f"{name}-{seed}")
    except InputError as error:
        raise InputError(
            f"method {method.name} does not fit the profile {profile}: {error}"
        ) from error


def _prefix(profile: str) -> str:
    """What names of runs begin with, so that profiles do not share runs."""
    return "arena" if profile == "demo" else f"arena-{profile}"


def reward_config(method: Method, seed: int, profile: str) -> Config:
    """The config of the run that trains a method's reward model.

    All methods without `reward_settings` share the run of a seed.

    Args:
        method: The method.
        seed: Seed of the training.
        profile: Name of the profile.
    """
    own = f"{method.name}-" if method.reward_settings else ""
    name = f"{_prefix(profile)}-reward-{own}{seed}"
    return load_config(profile, method.reward_settings, seed=seed, run_name=name)


def reward_folder(method: Method, seed: int, profile: str) -> Path:
    """The folder of a method's reward model.

    Args:
        method: The method.
        seed: Seed of the training.
        profile: Name of the profile.
    """
    return Run(reward_config(method, seed, profile)).stage("reward").path / "model"

"""The table of stages: each row has a stage's name, notebook, earlier stages and settings.

A stage is one step of a run, such as `dpo`; it owns a folder of the run. The function that makes a
stage, its maker, is registered with `runs.maker.stage_maker`. `pipeline` finds the maker by the
stage's name.

Another package can add a stage. A module of the package calls `register` and defines the maker. The
package names this module by an entry point in the group `spavl.stages`. Its pyproject.toml says:

    [project.entry-points."spavl.stages"]
    mine = "package.module"
"""

import functools
import importlib.metadata
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spavl_lib.errors import InputError, nearest

ENTRY_POINTS = "spavl.stages"


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One row of the table: a stage."""

    name: str
    """Name of the stage. The stage's folder and the command `spavl train NAME` use this name."""
    module: str
    """Module that defines the stage's maker."""
    config_keys: tuple[str, ...]
    """Sections or single settings of the config that the result depends on. If another setting
    changes, the stage stays complete."""
    notebook: str = ""
    """Name of the notebook that makes the stage, without `.ipynb`; empty if there is none. For a
    stage from another package: the path of the notebook."""
    upstream: tuple[str, ...] = ()
    """Stages that must be complete before this one is made."""
    any_trained: bool = False
    """Whether one complete stage with a trained policy is enough instead of all of `upstream`.
    Small profiles in a single process make all of `upstream` nevertheless."""
    trains: bool = False
    """Whether `spavl train` makes the stage."""
    policy: bool = False
    """Whether the stage's `model/` can answer prompts."""
    several_processes: bool = False
    """Whether several processes can make the stage together."""
    answers: bool = False
    """Whether models answer or train in the stage although `spavl train` does not make it."""
    settings: type | None = None
    """Class of the settings of a stage from another package; their values are under `plugins.NAME`
    in the config. None for built-in stages, whose settings are sections of the config."""

    @property
    def computes(self) -> bool:
        """Whether the stage's result depends on the precision that models compute in."""
        return self.trains or self.answers

    def builds_on(self, config: Any) -> tuple[str, ...]:
        """Stages that must be complete before this one is made under a config.

        These are `upstream`, but without the reward stage if no section of the config that this
        stage depends on uses the run's reward model.

        Args:
            config: A `Config`.
        """
        sections = [getattr(config, key, None) for key in self.config_keys]
        uses = [
            found for s in sections if (found := getattr(s, "uses_run_reward", None)) is not None
        ]
        needless = uses and not any(uses)
        return tuple(name for name in self.upstream if not (needless and name == "reward"))

    @property
    def notebook_stem(self) -> str:
        """The notebook's file name without `.ipynb`."""
        return Path(self.notebook).stem


_DATA_MODEL = ("data", "model", "seed")
_ANSWERS = (*_DATA_MODEL, "generation", "evaluation.held_out_drawings")
BUILT_IN = (
    StageSpec(
        name="data", module="spavl_lib.data.explore", config_keys=("data",),
        notebook="01_data_exploration",
    ),
    StageSpec(
        name="reward", module="spavl_lib.trainers.reward", config_keys=(*_DATA_MODEL, "reward"),
        notebook="02_reward_model", trains=True, several_processes=True,
    ),
    StageSpec(
        name="ppo", module="spavl_lib.trainers.ppo", config_keys=(*_DATA_MODEL, "reward", "ppo"),
        notebook="03_ppo", upstream=("reward",), trains=True, policy=True, several_processes=True,
    ),
    StageSpec(
        name="rloo", module="spavl_lib.trainers.rloo",
        config_keys=(*_DATA_MODEL, "reward", "rloo"), upstream=("reward",), trains=True,
        policy=True,
    ),
    StageSpec(
        name="grpo", module="spavl_lib.trainers.grpo",
        config_keys=(*_DATA_MODEL, "reward", "grpo"), upstream=("reward",), trains=True,
        policy=True,
    ),
    StageSpec(
        name="practice", module="spavl_lib.trainers.practice",
        config_keys=(*_DATA_MODEL, "reward", "ppo", "rloo"), notebook="03b_ppo_in_practice",
        upstream=("reward",), answers=True,
    ),
    StageSpec(
        name="dpo", module="spavl_lib.trainers.dpo", config_keys=(*_DATA_MODEL, "dpo"),
        notebook="04_dpo", trains=True, policy=True, several_processes=True,
    ),
    StageSpec(
        name="kto", module="spavl_lib.trainers.kto", config_keys=(*_DATA_MODEL, "kto"),
        trains=True, policy=True,
    ),
    StageSpec(
        name="online_dpo", module="spavl_lib.trainers.online_dpo",
        config_keys=(*_DATA_MODEL, "reward", "dpo", "online_dpo"), upstream=("reward",),
        trains=True, policy=True,
    ),
    StageSpec(
        name="inference", module="spavl_lib.generation.stage", config_keys=_ANSWERS,
        notebook="05_inference", upstream=("dpo", "ppo"), any_trained=True, several_processes=True,
        answers=True,
    ),
    StageSpec(
        name="evaluation", module="spavl_lib.evaluation.suite", config_keys=_ANSWERS,
        notebook="06_safety_helpfulness", upstream=("inference",),
    ),
    StageSpec(
        name="scaling", module="spavl_lib.scaling.run",
        config_keys=(*_DATA_MODEL, "generation", "evaluation", "dpo", "scaling"),
        notebook="07_scaling_and_ablations",
        answers=True,
    ),
    StageSpec(
        name="laboratory", module="spavl_lib.arena.stage", config_keys=("seed",),
        notebook="08_laboratory", answers=True,
    ),
)  # fmt: skip
# Settings that may change after a stage was made, because no result depends on them.
FREE_KEYS = (
    "profile", "run_name", "report_to", "launch.num_processes",
    "reward.save_steps", "ppo.save_steps", "rloo.save_steps", "grpo.save_steps",
    "dpo.save_steps", "kto.save_steps",
    "scaling.workers", "generation.cache", "evaluation.benchmarks", "evaluation.benchmark_rows",
    "evaluation.quick_rows",
)  # fmt: skip
_registered: dict[str, StageSpec] = {}


def register(spec: StageSpec) -> None:
    """Add a stage from another package. In the order of stages it comes before `inference`.

    This function adds the stage's own settings to `config_keys`. If a module is loaded again, its
    stage replaces the stage that it registered before.

    Raises:
        InputError: A stage of another module has this name.
    """
    existing = {s.name: s for s in BUILT_IN}.get(spec.name) or _registered.get(spec.name, spec)
    if existing.module != spec.module:
        raise InputError(f"stage {spec.name!r} exists already; give the new stage another name")
    if spec.settings and (key := f"plugins.{spec.name}") not in spec.config_keys:
        spec = replace(spec, config_keys=(*spec.config_keys, key))
    _registered[spec.name] = spec


@functools.cache
def _load_plugins() -> None:
    """Load the modules that other packages' entry points name; each registers its stage."""
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:  # importing another package's code can raise anything
            raise InputError(
                f"cannot load stage {entry.name!r} from {entry.value}: "
                f"{type(error).__name__}: {error}; repair or uninstall the package"
            ) from error


def all_stages() -> dict[str, StageSpec]:
    """Name -> stage, in the order in which a run makes them."""
    _load_plugins()
    last = [s for s in BUILT_IN if s.name in ("inference", "evaluation", "scaling", "laboratory")]
    first = [s for s in BUILT_IN if s not in last]
    return {s.name: s for s in (*first, *_registered.values(), *last)}


def stage_names() -> tuple[str, ...]:
    """Names of all stages, in the order in which a run makes them."""
    return tuple(all_stages())


def find(name: str) -> StageSpec:
    """The stage with this name.

    Raises:
        InputError: There is no such stage; the message suggests the most similar name.
    """
    stages = all_stages()
    if name not in stages:
        raise InputError(f"unknown stage {name!r}{nearest(name, stages)}")
    return stages[name]


def trainers() -> tuple[str, ...]:
    """Names of the stages that `spavl train` makes."""
    return tuple(s.name for s in all_stages().values() if s.trains)


def policies() -> tuple[str, ...]:
    """Names of the stages whose model can answer prompts, in alphabetical order."""
    return tuple(sorted(s.name for s in all_stages().values() if s.policy))


def of_notebook(stem: str) -> StageSpec | None:
    """The stage that a notebook makes; None if the notebook belongs to no stage.

    Args:
        stem: The notebook's file name without `.ipynb`.
    """
    return next((s for s in all_stages().values() if s.notebook_stem == stem), None)

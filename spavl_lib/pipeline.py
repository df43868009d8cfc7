"""What a notebook or a command calls: `train` a stage, `make` it, or `ensure` an earlier one.

All three end in `distributed.launcher.make`, which calls the stage's maker here or in several
processes. `stages` says what exists and what builds on what.
"""

import contextlib
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from spavl_lib import stages
from spavl_lib.config import (
    Config,
    flatten,
    load_config,
    profile_argument,
    profile_names,
)
from spavl_lib.data.load import load_truth
from spavl_lib.distributed import launcher
from spavl_lib.distributed.settings import in_processes
from spavl_lib.errors import InputError, OutOfMemory, nearest
from spavl_lib.evaluation.judges import check_judge
from spavl_lib.machine import device_kind
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.runs.text import say, short_path

# Profiles small enough for a notebook to make the earlier stages it needs.
SMALL_PROFILES = ("smoke", "demo")


def train(name: str, config: Config, stage: Stage) -> dict:
    """Train in this process, or in several that accelerate starts; the files are the same.

    Args:
        name: Trainer, such as "dpo".
        config: What to train, and how.
        stage: The stage's folder.

    Returns:
        The trainer's summary.

    Raises:
        InputError: Unknown trainer, or wrong data, model or settings, the judge's among them.
        SpavlError: What the trainer raises; from several processes, with the rank.
    """
    check_trainer(name)
    check_judge(config.evaluation)
    from spavl_lib.plotting import LivePlot  # matplotlib: only when something is drawn

    with memory_advice(name, config):
        return launcher.make(name, config, stage, live=LivePlot())


def check_trainer(name: str) -> None:
    """Raise if `spavl train` does not know the name.

    Raises:
        InputError: Unknown trainer; names the nearest and all there are.
    """
    if name not in (known := stages.trainers()):
        raise InputError(
            f"unknown trainer {name!r}{nearest(name, known)} (known: {', '.join(known)})"
        )


def make(name: str, config: Config) -> Stage:
    """Make a notebook's own stage, in any profile, after the stages it builds on.

    Args:
        name: Stage, such as "inference".
        config: The notebook's config.

    Returns:
        The complete stage.

    Raises:
        InputError: As `ensure`, of an earlier stage; or the judge's settings are wrong, which would
            otherwise show only after the trainings.
    """
    # Notebooks that judge need a judge that knows the rows; a training alone does not.
    judges = name in ("inference", "evaluation", "scaling")
    check_judge(config.evaluation, load_truth(config.data) if judges else None)
    stage = Run(config).stage(name)
    ensure_before(name, config)
    with memory_advice(name, config):
        launcher.make(name, config, stage)
    if not stage.done:
        raise RuntimeError(f"the maker of {name} returned without summary.json in {stage.path}")
    return stage


def ensure(name: str, config: Config) -> Stage:
    """Return a complete stage of this run; a small profile makes a missing one now.

    Args:
        name: Stage, such as "dpo".
        config: The config of the stage that needs it.

    Returns:
        The complete stage.

    Raises:
        InputError: The stage was made with other settings, or is missing and the profile is too
            large to make it on the way; names the command that makes it.
    """
    stage = Run(config).stage(stages.find(name).name)
    stage.check_config()
    if stage.done:
        return stage
    if config.profile not in SMALL_PROFILES:
        commands = "".join(f"\n  {run_command(other, config)}" for other in _missing(stage))
        raise InputError(f"{short_path(stage.path)} is not complete yet; make it with:{commands}")
    say(f"{name}: not complete yet, making it first")
    started = time.perf_counter()
    make(name, config)
    say(f"{name}: done in {time.perf_counter() - started:.0f} s")
    return stage


def ensure_before(name: str, config: Config) -> list[Stage]:
    """Return the complete stages that a stage builds on.

    A small profile makes all of them. In a larger one, and in several processes, where not every
    trainer runs, inference answers with every trained model and stops only if there is none.

    Args:
        name: Stage, such as "inference".
        config: The notebook's config.

    Raises:
        InputError: As `ensure`, of an earlier stage.
    """
    spec, run = stages.find(name), Run(config)
    names = spec.upstream
    if spec.any_trained and (config.profile not in SMALL_PROFILES or in_processes(config.launch)):
        trained = tuple(policy for policy in stages.policies() if run.stage(policy).done)
        if not trained:
            commands = "".join(f"\n  {run_command(other, config)}" for other in names)
            raise InputError(
                f"{short_path(run.path)} holds no trained model yet; make one with:{commands}"
            )
        names = trained
    return [ensure(other, config) for other in names]


def _missing(stage: Stage) -> list[str]:
    """An incomplete stage and the incomplete ones it builds on, in the order to make them."""
    spec = stages.find(stage.name)
    before = [stage.run.stage(name) for name in spec.upstream]
    if spec.any_trained:
        trained = any(stage.run.stage(name).done for name in stages.policies())
        before = [] if trained else before[:1]
    return [n for other in before if not other.done for n in _missing(other)] + [stage.name]


def run_command(name: str, config: Config) -> str:
    """The shell command that makes a stage under this config: its notebook, or its trainer.

    Args:
        name: Stage.
        config: What the command must resolve to. A profile of one's own is named by its file.
    """
    verb = "run" if stages.find(name).notebook else "train"
    profile = profile_argument(config.profile)
    words = ["spavl", verb, name, "--profile", profile]
    if profile in profile_names() or Path(profile).is_file():
        plain = flatten(load_config(profile).to_dict())
        for key, value in flatten(config.to_dict()).items():
            if value != plain.get(key) and key not in ("profile", "run_name", "seed"):
                text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
                words += ["--set", f"{key}={text}"]
    if config.seed:
        words += ["--seed", str(config.seed)]
    if config.run_name not in ("", config.profile):
        words += ["--run-name", config.run_name]
    return shlex.join(words)


@contextlib.contextmanager
def memory_advice(name: str, config: Config) -> Iterator[None]:
    """Add the planner's advice to an out-of-memory error raised inside the block.

    Args:
        name: Stage that is made.
        config: Its config.

    Raises:
        OutOfMemory: The device's memory ran out; checkpoints are kept.
    """
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        from spavl_lib.planning.advice import advice_for
        from spavl_lib.planning.devices import device_named
        from spavl_lib.planning.plan import plan

        planned = name in ("reward", "dpo", "ppo")
        advice = advice_for(plan(name, config, device_named(device_kind()))) if planned else ""
        reason = str(error).splitlines()[0]
        raise OutOfMemory(
            f"{reason}\n  {advice or 'set a smaller generation.batch_size'}"
        ) from error

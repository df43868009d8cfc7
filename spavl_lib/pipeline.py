"""`train`, `make` and `ensure`: notebooks and commands call them to get a complete stage.

All three use `distributed.launcher.make`, which runs the stage's maker in this process or in child
processes. The table in `stages` says which stages exist and which stages each of them builds on.
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
from spavl_lib.data.load import check_own_prompts, load_truth
from spavl_lib.distributed import launcher
from spavl_lib.distributed.settings import in_processes
from spavl_lib.errors import InputError, OutOfMemory, nearest
from spavl_lib.evaluation.judges import check_judge
from spavl_lib.machine import device_kind
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.runs.text import say, short_path

# With these profiles a notebook first makes the earlier stages that it needs.
SMALL_PROFILES = ("smoke", "demo", "laptop")


def train(name: str, config: Config, stage: Stage) -> dict:
    """Train in this process or in child processes of accelerate. Both ways write the same files.

    Args:
        name: Trainer, such as "dpo".
        config: The run's config.
        stage: The stage's folder.

    Returns:
        The trainer's summary.

    Raises:
        InputError: The trainer is unknown, or data, model, settings or the judge's settings are
            wrong.
        SpavlError: The trainer raised this error. From child processes, the message names the rank.
    """
    check_trainer(name)
    check_judge(config.evaluation)
    check_own_prompts(config.data)
    from spavl_lib.plotting import LivePlot  # imported here, because matplotlib loads slowly

    live = LivePlot()
    with memory_advice(name, config):
        summary = launcher.make(name, config, stage, live=live)
    live.close()
    return summary


def check_trainer(name: str) -> None:
    """Raise if `spavl train` does not know the name.

    Raises:
        InputError: The trainer is unknown; the message lists all trainers.
    """
    if name not in (known := stages.trainers()):
        raise InputError(
            f"unknown trainer {name!r}{nearest(name, known)} (known: {', '.join(known)})"
        )


def make(name: str, config: Config) -> Stage:
    """Make the stage of a notebook, with any profile.

    A small profile first makes the stages that this stage builds on. With a larger profile those
    stages must be complete. The evaluation prompts and the judge's settings are checked before any
    training, because errors in them would otherwise show only after the trainings.

    Args:
        name: Stage, such as "inference".
        config: The notebook's config.

    Returns:
        The complete stage.

    Raises:
        InputError: The judge's settings or the evaluation prompts are wrong, or `ensure` fails for
            an earlier stage.
    """
    if config.profile not in SMALL_PROFILES:
        ensure_before(name, config)  # makes nothing here; fails before any data are fetched
    check_own_prompts(config.data)
    # These stages judge responses, and the judge may need labels of the rows.
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
    """Return a complete stage of this run. With a small profile, a missing stage is made now.

    If another notebook of `spavl run all` is making the stage, this function waits for it.

    Args:
        name: Stage, such as "dpo".
        config: The config of the run.

    Returns:
        The complete stage.

    Raises:
        InputError: The stage was made with other settings. Or the stage is not complete and the
            profile is not small; the message then lists the commands to run.
    """
    stage = Run(config).stage(stages.find(name).name)
    stage.check_config()
    stage.wait_for(name)
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

    The reward stage is left out if the config names other reward models for all that need one. A
    small profile makes incomplete stages now. `inference` is an exception if the profile is not
    small or if training runs in child processes, which not every trainer supports: then it uses
    the models that are trained, and fails only if there is none. Unless `inference` is complete,
    models that another notebook of `spavl run all` is training are left out, except for the first;
    the maker waits for them.

    Args:
        name: Stage, such as "inference".
        config: The notebook's config.

    Raises:
        InputError: `ensure` fails for an earlier stage, or no model has been trained.
    """
    spec, run = stages.find(name), Run(config)
    names = spec.builds_on(config)
    if spec.any_trained and (config.profile not in SMALL_PROFILES or in_processes(config.launch)):
        trained = tuple(n for n in stages.policies() if run.stage(n).done or n in run.awaited)
        if not trained:
            commands = "".join(f"\n  {run_command(other, config)}" for other in names)
            raise InputError(
                f"{short_path(run.path)} holds no trained model yet; make one with:{commands}"
            )
        names = trained
    if spec.any_trained and not run.stage(name).done:  # its maker waits for the others itself
        names = tuple(n for n in names if n == names[0] or n not in run.awaited)
    return [ensure(other, config) for other in names]


def _missing(stage: Stage) -> list[str]:
    """Names of an incomplete stage and of incomplete stages it needs, in the order to make them."""
    spec = stages.find(stage.name)
    before = [stage.run.stage(name) for name in spec.builds_on(stage.run.config)]
    if spec.any_trained:
        trained = any(stage.run.stage(name).done for name in stages.policies())
        before = [] if trained else before[:1]
    return [n for other in before if not other.done for n in _missing(other)] + [stage.name]


def run_command(name: str, config: Config) -> str:
    """The shell command that makes a stage under this config: `spavl run` or `spavl train`.

    Args:
        name: Stage.
        config: The config that the command must resolve to. If the profile is a file of your own,
            the command names that file.
    """
    verb = "run" if stages.find(name).notebook else "train"
    profile = profile_argument(config.profile)
    words = ["spavl", verb, name, "--profile", profile]
    if profile in profile_names() or Path(profile).is_file():
        profile_values = flatten(load_config(profile).to_dict())
        for key, value in flatten(config.to_dict()).items():
            if value != profile_values.get(key) and key not in ("profile", "run_name", "seed"):
                text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
                words += ["--set", f"{key}={text}"]
    if config.seed:
        words += ["--seed", str(config.seed)]
    if config.run_name not in ("", config.profile):
        words += ["--run-name", config.run_name]
    return shlex.join(words)


def next_commands(name: str, config: Config) -> list[str]:
    """Commands that make sense once a stage is complete, the nearest first.

    Args:
        name: The stage.
        config: The config of its run.
    """
    run, table = Run(config), stages.all_stages()
    after = [s.name for s in table.values() if name in s.upstream and s.notebook]
    commands = [run_command(n, config) for n in after if not run.stage(n).done][:1]
    if table[name].policy:
        commands.append(shlex.join(["spavl", "ask", run.name]) + ' IMAGE "QUESTION"')
    return [*commands, shlex.join(["spavl", "report", run.name])]


@contextlib.contextmanager
def memory_advice(name: str, config: Config) -> Iterator[None]:
    """Add the planner's advice to an out-of-memory error raised inside the block.

    Args:
        name: Stage that is made in the block.
        config: The run's config.

    Raises:
        OutOfMemory: The device ran out of memory; checkpoints are kept.
    """
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        from spavl_lib.planning.advice import advice_for
        from spavl_lib.planning.devices import device_named
        from spavl_lib.planning.plan import plan

        has_plan = name in ("reward", "dpo", "ppo")
        advice = advice_for(plan(name, config, device_named(device_kind()))) if has_plan else ""
        reason = str(error).splitlines()[0]
        raise OutOfMemory(
            f"{reason}\n  {advice or 'set a smaller generation.batch_size'}"
        ) from error

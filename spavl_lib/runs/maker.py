"""`@stage_maker` registers the function that makes a stage, and wraps it in what all stages need.

The decorated function only does the work. The wrapper returns a complete stage's summary at once,
refuses a stage that was made with other settings or inputs, holds the folder's lock, catches
signals, and writes the summary. `distributed.launcher.make` decides whether several processes call
the maker.
"""

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

from spavl_lib import stages
from spavl_lib.config import Config, LaunchConfig
from spavl_lib.errors import InputError
from spavl_lib.machine import (
    computing_in,
    free_memory,
    launcher_variables,
    use_threads,
    world_size,
)
from spavl_lib.runs.signals import stop_on_signals
from spavl_lib.runs.stage import Stage
from spavl_lib.runs.text import say

Inputs = Callable[[Config, Stage], dict[str, str]]
_MAKERS: dict[str, Callable[..., dict]] = {}
_INPUTS: dict[str, tuple[Inputs, bool]] = {}  # stage -> `inputs` and `renew` of its maker


def stage_maker(
    name: str,
    *,
    inputs: Inputs,
    polls_stop: bool = False,
    renew: bool = False,
    after: Callable[[Stage], Any] | None = None,
) -> Callable[[Callable[..., dict]], Callable[..., dict]]:
    """Register a function as the maker of a stage.

    Args:
        name: Name of the stage, as in `stages`.
        inputs: Returns name -> sha256 or value of everything that the stage reads besides its
            settings. It is called before and after the work; an input that changed in between is
            an error.
        polls_stop: Whether the function takes the stop flag as third argument and polls it. If so,
            signals set the flag instead of interrupting the function.
        renew: Whether a complete stage whose inputs have changed is made again, instead of being
            refused. The stage's summary must then hold its `inputs`.
        after: Called with the stage when the summary exists, whether it is new or not.

    Returns:
        A decorator. The decorated maker takes `(config, stage, **options)`, where `options` are
        keyword arguments of the function, and returns the stage's summary.
    """

    def decorate(make: Callable[..., dict]) -> Callable[..., dict]:
        @functools.wraps(make)
        def maker(config: Config, stage: Stage, **options: Any) -> dict:
            with computing_in(config.dtype):
                return opened(config, stage, **options)

        def opened(config: Config, stage: Stage, **options: Any) -> dict:
            read_inputs = functools.partial(inputs, config, stage)
            if stage.done:
                if not renew:
                    stage.check_config()
                current = read_inputs()
                if not renew or stage.summary.get("inputs", {}) == current:
                    stage.check_config()
                    stage.check_inputs(current)
                    if after:
                        after(stage)
                    return stage.summary
            leave_other_launchers(config.launch)
            _check_processes(name, config)
            use_threads(config.launch.num_threads)
            free_memory()  # models that earlier cells deleted may still hold memory
            with stage.work(read_inputs, renew=renew):
                if polls_stop:
                    with stop_on_signals() as flag:
                        summary = make(config, stage, flag, **options)
                else:
                    summary = make(config, stage, **options)
            stage.finish(summary)
            if after:
                after(stage)
            return summary

        _MAKERS[name], _INPUTS[name] = maker, (inputs, renew)
        return maker

    return decorate


def leave_other_launchers(launch: LaunchConfig) -> None:
    """Remove another launcher's variables from this process's environment, and print their names.

    Libraries that read these variables would change numbers that the config determines, or wait for
    processes of that launcher.

    Raises:
        InputError: The launcher started several processes, and each would do the whole work; or it
            asks for FSDP.
    """
    names, started = launcher_variables()
    if not names:
        return
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes", "on", "t", "y"):
        raise InputError(
            "ACCELERATE_USE_FSDP asks for FSDP, which no trainer here supports; unset it, and set "
            "launch.engine to zero2 or zero3, which divide the same state among the processes"
        )
    listed = ", ".join(names)
    if started > 1 and launch.num_processes == 1:
        raise InputError(
            f"another launcher started {started} of these processes ({listed}), and each would do "
            f"all of the work; start one process without that launcher and set "
            f"launch.num_processes = {started}, or unset these variables"
        )
    for name in names:
        del os.environ[name]
    say(f"ignored: {listed} of another launcher; precision and processes are those of the config")


def _check_processes(name: str, config: Config) -> None:
    """Raise if the number of running processes is not the configured one."""
    spec, processes = stages.find(name), config.launch.num_processes
    if (spec.trains or spec.several_processes) and world_size() != processes:
        raise InputError(
            f"launch.num_processes = {processes}, but {world_size()} process runs here; call "
            f"pipeline.train({name!r}, config, stage), which starts the others"
        )


def maker_of(name: str) -> Callable[..., dict]:
    """The maker of a stage. The call imports the module that defines the maker.

    Raises:
        InputError: There is no such stage.
        RuntimeError: The stage's module registers no maker.
    """
    module = stages.find(name).module
    importlib.import_module(module)
    if name not in _MAKERS:
        raise RuntimeError(f"{module} defines no @stage_maker({name!r})")
    return _MAKERS[name]


def is_current(name: str, config: Config, stage: Stage) -> bool:
    """Whether a complete stage was made from the inputs that exist now, and in this precision.

    Args:
        name: Stage, such as "dpo".
        config: The run's config.
        stage: The complete stage.

    Raises:
        InputError: An input has changed and the stage cannot be renewed, or the precision has
            changed. The message names each change.
    """
    maker_of(name)
    inputs, renew = _INPUTS[name]
    current = inputs(config, stage)
    if renew and stage.summary.get("inputs", {}) != current:
        return False
    stage.check_inputs(current)
    return True

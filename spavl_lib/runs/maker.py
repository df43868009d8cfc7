"""`@stage_maker` registers the function that makes a stage, and wraps it in what all stages need.

The decorated function only does the work. The wrapper returns a complete stage's summary at once,
refuses a stage that was made with other settings or inputs, holds the folder's lock, catches
signals, and writes the summary. `distributed.launcher.make` decides whether several processes call
the maker.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from spavl_lib import stages
from spavl_lib.config import Config
from spavl_lib.errors import InputError
from spavl_lib.machine import world_size
from spavl_lib.runs.signals import stop_on_signals
from spavl_lib.runs.stage import Stage

Inputs = Callable[[Config, Stage], dict[str, str]]
_MAKERS: dict[str, Callable[..., dict]] = {}


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
            _check_processes(name, config)
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

        _MAKERS[name] = maker
        return maker

    return decorate


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

"""The front door of every stage: `@stage_maker` registers the function that makes it.

The decorated function does the work alone. The door around it returns a complete stage at once,
refuses one that was made with other settings or inputs, holds the folder's lock, catches signals,
and writes the summary. Whether several processes are started is decided one storey up, by
`distributed.launcher.make`.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from spavl_lib import stages
from spavl_lib.config import Config
from spavl_lib.errors import InputError
from spavl_lib.machine import computing_in, free_memory, world_size
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
        name: Stage, as in `stages`.
        inputs: Gives name -> sha256 or value of everything the stage reads besides its settings.
            It is asked before the work and after it: an input that changed meanwhile is an error.
        polls_stop: The function takes the stop flag as third argument and polls it; signals then
            set the flag instead of interrupting the function.
        renew: A complete stage whose inputs have changed is made again. Otherwise it is refused.
            The summary must hold `inputs`.
        after: Called with the stage once its summary is there, also when it was there before.

    Returns:
        A decorator. The decorated maker is called with `(config, stage, **options)`, options being
        the function's own, and returns the stage's summary.
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
            _check_processes(name, config)
            free_memory()  # of models that earlier cells have let go
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
    spec, processes = stages.find(name), config.launch.num_processes
    if (spec.trains or spec.several_processes) and world_size() != processes:
        raise InputError(
            f"launch.num_processes = {processes}, but {world_size()} process runs here; call "
            f"pipeline.train({name!r}, config, stage), which starts the others"
        )


def maker_of(name: str) -> Callable[..., dict]:
    """The maker of a stage; imports the module that defines it.

    Raises:
        InputError: There is no such stage.
        RuntimeError: The stage's module registers no maker.
    """
    module = stages.find(name).module
    importlib.import_module(module)
    if name not in _MAKERS:
        raise RuntimeError(f"{module} defines no @stage_maker({name!r})")
    return _MAKERS[name]

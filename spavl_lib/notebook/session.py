"""Functions that every notebook uses: they open its stage, and preview images and text safely."""

import os
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageFilter

from spavl_lib.config import Config, load_config
from spavl_lib.data.images import decode
from spavl_lib.errors import InputError, raise_all
from spavl_lib.machine import DTYPE, device_name, use_threads
from spavl_lib.modelling.load import quiet_libraries
from spavl_lib.runs.maker import leave_other_launchers
from spavl_lib.runs.stage import Run, Stage


def check_parameters(**parameters: Any) -> None:
    """Check the types of a notebook's parameters, because papermill does not check them.

    Raises:
        InputError: Parameters have wrong types. The message lists all of them, and says how to pass
            the right type with papermill.
    """
    problems = []
    for name, value in parameters.items():
        if name == "seed" and not (isinstance(value, int) and not isinstance(value, bool)):
            problems.append(
                f"seed must be a whole number, got {value!r}; -1 stands for the profile's seed"
            )
        elif name == "overrides" and not isinstance(value, Mapping | None):
            problems.append(
                f"overrides must be a mapping, got {value!r}; papermill passes one with "
                "-y 'overrides: {dpo.beta: 0.2}'"
            )
        elif name in ("profile", "run_name") and not isinstance(value, str):
            problems.append(
                f"{name} must be text, got {value!r}; papermill passes text with -r {name} TEXT"
            )
    if len(problems) == 1:
        raise InputError(problems[0])
    raise_all(problems, "parameters")


def open_stage(
    name: str, profile: str, *, seed: int = -1, run_name: str = "", overrides: dict | None = None
) -> tuple[Config, Stage]:
    """Resolve a notebook's parameters into a config, and print its main settings.

    Args:
        name: Stage, such as `dpo`.
        profile: Profile name or YAML path.
        seed: Random seed of weights, data order and sampling. A negative number stands for the
            profile's seed.
        run_name: Folder under runs/. An empty text stands for the profile's name.
        overrides: Dotted key -> value.

    Returns:
        The config and the stage's folder.

    Raises:
        InputError: A parameter has a wrong type (see `check_parameters`), or the profile or an
            override is wrong (see `load_config`).
    """
    check_parameters(profile=profile, seed=seed, run_name=run_name, overrides=overrides)
    quiet_libraries()
    config = load_config(profile, overrides, seed=None if seed < 0 else seed, run_name=run_name)
    leave_other_launchers(config.launch)
    if config.dtype:  # every cell of this kernel uses this precision, not only the stage's maker
        os.environ[DTYPE] = config.dtype
    use_threads(config.launch.num_threads)
    stage = Run(config).stage(name)
    state = "done, shown from its files" if stage.done else "to be made"
    rows = config.data.train_rows or "all"
    lines = (
        f"profile   {config.profile} on {device_name()}, seed {config.seed}",
        f"model     {config.model.name}, {config.model.adapter} fine-tuning, {stage.dtype}",
        f"data      {config.data.source}, {rows} training pairs",
        f"stage     {stage.path.parent.name}/{stage.name} ({state})",
    )
    print("\n".join(lines))  # noqa: T201 - a notebook's own output
    return config, stage


def safe_image(cell: Any, *, reveal: bool = False) -> Image.Image:
    """A row's image, blurred unless `reveal` is set."""
    image = decode(cell)
    return image if reveal else image.filter(ImageFilter.GaussianBlur(max(image.size) / 16))


def safe_text(text: str, *, reveal: bool = False, limit: int = 60) -> str:
    """A row's text, cut to `limit` characters unless `reveal` is set.

    Args:
        text: The text.
        reveal: Whether to return the whole text.
        limit: Number of characters to keep.
    """
    return text if reveal or len(text) <= limit else f"{text[:limit].rstrip()} [...]"


def caption(row: dict, fields: tuple[str, ...], *, reveal: bool = False) -> str:
    """Some fields of a row, one line each, as a caption for its image.

    Args:
        row: The row.
        fields: Names of the fields; a field without a value is left out.
        reveal: Whether to keep long texts whole.
    """
    return "\n".join(f"{f}: {safe_text(row[f], reveal=reveal)}" for f in fields if row.get(f))

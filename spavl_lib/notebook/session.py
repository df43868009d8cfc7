"""What every notebook uses: its stage, and safe previews of images and text."""

import os
from typing import Any

from PIL import Image, ImageFilter

from spavl_lib.config import Config, load_config
from spavl_lib.data.images import decode
from spavl_lib.machine import DTYPE, device_name
from spavl_lib.modelling.load import quiet_libraries
from spavl_lib.runs.stage import Run, Stage


def open_stage(
    name: str, profile: str, *, seed: int = -1, run_name: str = "", overrides: dict | None = None
) -> tuple[Config, Stage]:
    """Resolve a notebook's parameters and print the result.

    Args:
        name: Stage, such as `dpo`.
        profile: Profile name or YAML path.
        seed: Of weights, data order and sampling; below 0 for the profile's own.
        run_name: Folder under runs/, the profile's name if empty.
        overrides: Dotted key -> value.

    Returns:
        The config and the stage's folder.

    Raises:
        InputError: As `load_config`.
    """
    quiet_libraries()
    config = load_config(profile, overrides, seed=None if seed < 0 else seed, run_name=run_name)
    if config.dtype:  # for every cell of this kernel, not only for what a stage makes
        os.environ[DTYPE] = config.dtype
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
    """A row's text, cut after some characters unless `reveal` is set.

    Args:
        text: The text.
        reveal: Return the whole text.
        limit: Number of characters to keep.
    """
    return text if reveal or len(text) <= limit else f"{text[:limit].rstrip()} [...]"


def caption(row: dict, fields: tuple[str, ...], *, reveal: bool = False) -> str:
    """Some fields of a row, one line each, as a caption for its image.

    Args:
        row: The row.
        fields: Names of the fields; empty ones are left out.
        reveal: Do not cut texts.
    """
    return "\n".join(f"{f}: {safe_text(row[f], reveal=reveal)}" for f in fields if row.get(f))

"""What every notebook uses: opening its stage, and safe previews of images and text."""

from typing import Any

from PIL import Image, ImageFilter

from spavl_lib.config import Config, load_config
from spavl_lib.data.images import decode
from spavl_lib.machine import device_name
from spavl_lib.modelling.load import quiet_libraries
from spavl_lib.runs.stage import Run, Stage


def open_stage(
    name: str, profile: str, *, seed: int = -1, run_name: str = "", overrides: dict | None = None
) -> tuple[Config, Stage]:
    """Resolve a notebook's parameters into a config, and print its main settings.

    Args:
        name: Stage, such as `dpo`.
        profile: Profile name or YAML path.
        seed: Random seed of weights, data order and sampling; below 0: the profile's seed.
        run_name: Folder under runs/; empty: the profile's name.
        overrides: Dotted key -> value.

    Returns:
        The config and the stage's folder.

    Raises:
        InputError: The profile or an override is wrong, as in `load_config`.
    """
    quiet_libraries()
    config = load_config(profile, overrides, seed=None if seed < 0 else seed, run_name=run_name)
    stage = Run(config).stage(name)
    state = "done, shown from its files" if stage.done else "to be made"
    rows = config.data.train_rows or "all"
    lines = (
        f"profile   {config.profile} on {device_name()}, seed {config.seed}",
        f"model     {config.model.name}, {config.model.adapter} fine-tuning",
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

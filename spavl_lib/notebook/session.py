"""Functions that every notebook uses: they open its stage, and preview images and text safely."""

import ast
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageFilter

from spavl_lib.config import Config, DataConfig, load_config
from spavl_lib.data.images import decode
from spavl_lib.data.sources.extra import ExtraPairs
from spavl_lib.data.taxonomy import display, field_name
from spavl_lib.errors import InputError, nearest, raise_all
from spavl_lib.machine import DTYPE, device_name, use_threads
from spavl_lib.modelling.load import quiet_libraries
from spavl_lib.runs.maker import leave_other_launchers
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.runs.text import FIGURES

_NAMED = ("class1", "class2", "class3", "question_type")  # fields whose values have display names


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


def check_injected(cells: Sequence[str]) -> None:
    """Check that a notebook declares every parameter that papermill passed; papermill only warns.

    Args:
        cells: The sources of the cells that have run. papermill's cell begins with `# Parameters`.

    Raises:
        InputError: A parameter is unknown, so that it would have no effect.
    """
    for number, cell in enumerate(cells):
        if cell.startswith("# Parameters\n"):
            known = [name for source in cells[:number] for name in _assigned(source)]
            unknown = [name for name in _assigned(cell) if name not in known]
            if unknown:
                raise InputError(
                    f"this notebook has no parameter {', '.join(map(repr, unknown))}"
                    f"{nearest(unknown[0], known)} (its parameters cell declares: "
                    f"{', '.join(known)}); settings go into overrides: papermill passes them with "
                    "-y 'overrides: {dpo.beta: 0.2}'"
                )


def _executed_cells() -> list[str]:
    """The sources of the cells that this kernel has run; empty outside of a kernel."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return list(shell.user_ns.get("In", ())) if shell else []


def _assigned(source: str) -> list[str]:
    """The names that a cell assigns, without names inside its functions and blocks."""
    try:
        lines = ast.parse(source).body
    except SyntaxError:  # a cell may hold commands of IPython
        return []
    targets = [t for line in lines if isinstance(line, ast.Assign) for t in line.targets]
    targets += [line.target for line in lines if isinstance(line, ast.AnnAssign)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


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
        InputError: A parameter has a wrong type (see `check_parameters`) or is unknown (see
            `check_injected`), the profile or an override is wrong (see `load_config`), or the run
            was made with other settings (see `Stage.check_all`).
    """
    check_injected(_executed_cells())
    check_parameters(profile=profile, seed=seed, run_name=run_name, overrides=overrides)
    quiet_libraries()
    if "JPY_SESSION_NAME" in os.environ:  # this kernel belongs to a notebook that a person sees
        os.environ.setdefault(FIGURES, lab_theme())
    config = load_config(profile, overrides, seed=None if seed < 0 else seed, run_name=run_name)
    leave_other_launchers(config.launch)
    use_threads(config.launch.num_threads)
    stage = Run(config).stage(name)
    stage.check_all()
    if config.dtype:  # every cell of this kernel uses this precision, not only the stage's maker
        os.environ[DTYPE] = config.dtype
    state = "done, shown from its files" if stage.done else "to be made"
    most = config.data.train_rows
    rows = f"at most {most:,} training pairs" if most else "all training pairs"
    lines = (
        f"profile   {config.profile} on {device_name()}, seed {config.seed}",
        f"model     {config.model.name}, {config.model.adapter} fine-tuning, {stage.dtype}",
        f"data      {config.data.source}, {rows}",
        f"stage     {stage.path.parent.name}/{stage.name} ({state})",
    )
    print("\n".join(lines))  # noqa: T201 - a notebook's own output
    return config, stage


def lab_theme() -> str:
    """The theme that JupyterLab's settings choose: `dark` or `light`, which is also the default."""
    config = os.environ.get("JUPYTER_CONFIG_DIR") or Path.home() / ".jupyter"
    folder = os.environ.get("JUPYTERLAB_SETTINGS_DIR") or Path(config, "lab", "user-settings")
    settings = "@jupyterlab/apputils-extension/themes.jupyterlab-settings"
    try:
        text = Path(folder, settings).read_text(encoding="utf-8")
    except OSError:
        return "light"
    # The file is JSON with comments.
    named = re.search(r'^(?!\s*//).*"theme"\s*:\s*"([^"]*)"', text, re.MULTILINE)
    return "dark" if named and "dark" in named[1].lower() else "light"


def may_reveal(data: DataConfig) -> bool:
    """Whether previews may show images unblurred and texts whole.

    They may if all rows are SPA-VL mini's, which name harmful things but give no instructions.
    """
    return data.source == "mini" and not data.extra_path


def hidden_ids(data: DataConfig) -> frozenset[str]:
    """Ids of the rows that previews leave out: those of `data.extra_path`.

    Such a file may hold harmful replies of a real language model.

    Raises:
        InputError: The file cannot be read.
    """
    return ExtraPairs(data).ids if data.extra_path else frozenset()


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
    """Some fields of a row, one line each, as a caption for its image, with names for readers.

    Args:
        row: The row.
        fields: Names of the fields; a field without a value is left out.
        reveal: Whether to keep long texts whole.
    """
    lines = []
    for field in fields:
        value = row.get(field)
        if isinstance(value, bool):
            value = "yes" if value else "no"
        elif field in _NAMED:
            value = display(value or "").lower()
        if value:
            lines.append(f"{field_name(field)}: {safe_text(value, reveal=reveal)}")
    return "\n".join(lines)

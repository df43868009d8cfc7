"""The parts that all pages share: the Jinja environment, the style sheet, and value formats."""

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from spavl_lib.data.taxonomy import display
from spavl_lib.evaluation.numbers import MODEL_TITLES, duration, percent, set_title
from spavl_lib.evaluation.text import MISSING, clean, short
from spavl_lib.report import gallery

HERE = Path(__file__).parent
_STAGE_TITLES = MODEL_TITLES | {"reward": "Reward model"}


def stage_title(name: str) -> str:
    """A stage's name for readers."""
    return _STAGE_TITLES.get(name, name.capitalize())


def environment() -> jinja2.Environment:
    """A Jinja environment that escapes every value and makes invisible characters visible."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_display,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": percent,
        "display": lambda name: short(display(name)),
        "duration": duration,
        "moment": lambda text: str(text or MISSING).replace("T", " ")[:16],
        "stage_title": stage_title,
    }
    made.globals |= {"missing": MISSING, "set_title": set_title}
    made.globals["changes"] = gallery.CHANGES
    made.globals["style"] = Markup((HERE / "report.css").read_text(encoding="utf-8"))
    return made


def _display(value: Any) -> Any:
    if isinstance(value, Markup):
        return value
    return MISSING if value is None else clean(value)

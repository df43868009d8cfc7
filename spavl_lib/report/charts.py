"""Figures as data URIs for the page. SVG figures follow the reader's light or dark scheme."""

import base64
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from spavl_lib.data.images import ImageError, open_image
from spavl_lib.plotting.style import DARK, STYLE
from spavl_lib.report.gallery import image_uri

# In figures for narrow screens: width of a figure, in inches.
NARROW = 4.2
_FONTS = "system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif"
_MAX_FIGURES = 16  # largest number of figures of one stage
_MAX_BYTES = 250_000  # a larger PNG file is shrunk to `_LONGEST`
_LONGEST = 1400  # px, largest width and height


@dataclass(frozen=True)
class Chart:
    """A figure as SVG data URIs: one for wide screens, and one for narrow screens.

    A figure that is only scaled down would have illegible text on a phone.
    """

    wide: str
    narrow: str


def chart(plot: Callable[..., Figure], *arguments: Any, **narrow: Any) -> Chart:
    """Draw a figure twice: as it is, and with other settings for narrow screens.

    Args:
        plot: The function of `plotting`.
        arguments: Its positional arguments.
        narrow: Keyword arguments for narrow screens, such as `columns=1`. If there are none, the
            width is `NARROW`.
    """
    return Chart(
        svg_uri(plot(*arguments)), svg_uri(plot(*arguments, **(narrow or {"width": NARROW})))
    )


def svg_uri(fig: Figure) -> str:
    """A figure as an SVG data URI. The page shows the SVG as an image, so that it cannot run
    scripts or load files."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        fig.savefig(buffer, format="svg", metadata=no_metadata)
    text = buffer.getvalue().decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    light, dark = [], []
    for index, (light_colour, dark_colour) in enumerate(DARK.items()):
        text = text.replace(light_colour, f"var(--c{index})")
        light.append(f"--c{index}:{light_colour}")
        dark.append(f"--c{index}:{dark_colour}")
    css = (
        f"svg{{{';'.join(light)}}}@media screen and (prefers-color-scheme:dark)"
        f"{{svg{{{';'.join(dark)}}}}}text{{font-family:{_FONTS}!important}}"
    )
    head, body = text.split(">", 1)
    page = f"{head}><style>{css}</style>{body}"
    return f"data:image/svg+xml;base64,{base64.b64encode(page.encode()).decode('ascii')}"


def saved_figures(stage: Path) -> list[tuple[str, str]]:
    """(name, data URI) of the PNG files that a stage's notebook saved, without damaged files."""
    figures = []
    for path in sorted((stage / "figures").glob("*.png"))[:_MAX_FIGURES]:
        try:
            if path.is_symlink():
                continue
            image = open_image(path)
        except (ImageError, OSError):
            continue
        if path.stat().st_size <= _MAX_BYTES:
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            figures.append((path.stem.replace("_", " "), f"data:image/png;base64,{data}"))
        else:
            figures.append((path.stem.replace("_", " "), image_uri(image, _LONGEST)))
    return figures

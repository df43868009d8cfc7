"""The style of all figures: settings, colours, and how a figure becomes a file.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart. Models and series
also have different markers.
"""

import functools
import io
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from spavl_lib.runs.files import read_jsonl

INK, MUTED, GRID, PAPER = "#1f2a37", "#5f6b7a", "#e4e8ee", "#ffffff"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
BASE_COLOUR = "#6b7686"
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # dollar signs in a name must not start a formula
    "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "figure.facecolor": PAPER,
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "grid.color": GRID,
    "legend.frameon": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "spavl",
}
Source = Path | str | Iterable[dict]


class Drawing(Figure):
    """A figure that keeps this style whenever it is drawn."""

    def draw(self, renderer: Any) -> None:
        """Draw in this style, because matplotlib creates some parts only while it draws."""
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            # The font may lack characters of a name.
            warnings.filterwarnings("ignore", message="Glyph")
            super().draw(renderer)

    def _repr_png_(self) -> bytes:
        return png_bytes(self)


def styled(plot: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorate a function so that it builds its figure in this style."""

    @functools.wraps(plot)
    def wrapped(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(STYLE):
            return plot(*args, **kwargs)

    return wrapped


def png_bytes(fig: Figure, dpi: int = 110) -> bytes:
    """A figure as PNG, reduced to 256 colours if the PNG would exceed 200 kB."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    if buffer.tell() > 200_000:
        image = Image.open(buffer).convert("RGB").quantize(256)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def save_figure(fig: Figure, path: Path | str, dpi: int = 110) -> Path:
    """Write a figure as PNG. An interruption never leaves an incomplete file at `path`.

    Args:
        fig: The figure.
        path: The target, which ends in .png. Missing folders are created.
        dpi: Resolution in pixels per inch.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"expected a file name that ends in .png, got {path.name!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(png_bytes(fig, dpi))
    temporary.replace(path)
    return path


def shown(fig: Figure, path: Path | str) -> Figure:
    """Write a figure as PNG and return it, as the last line of a notebook's cell.

    Args:
        fig: The figure.
        path: See `save_figure`.
    """
    save_figure(fig, path)
    return fig


def rows_of(source: Source) -> list[dict]:
    """Rows of a JSONL file, of a data frame (NaN counts as missing) or of a list."""
    if isinstance(source, str | Path):
        return read_jsonl(Path(source))
    if hasattr(source, "to_dict"):
        return [{k: v for k, v in row.items() if v == v} for row in source.to_dict("records")]
    return list(source)


def column_of(source: Any, column: str) -> list:
    """One column of rows or of a data frame. A plain sequence is returned as a list."""
    if hasattr(source, "columns"):
        return source[column].tolist()
    values = list(source)
    return [v[column] for v in values] if values and isinstance(values[0], Mapping) else values


def new_figure(width: float, height: float, title: str = "") -> Drawing:
    """An empty figure.

    Args:
        width: Width in inches.
        height: Height in inches.
        title: Text above the figure.
    """
    fig = Drawing(figsize=(width, height), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    if title:
        fig.suptitle(title, x=0.01, ha="left")
    return fig


def note(ax: Axes, text: str) -> None:
    """Write a text in the middle of an empty panel."""
    ax.text(
        0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=MUTED, wrap=True
    )


def model_colours(models: Iterable[str]) -> dict[str, str]:
    """Model name -> colour: grey for `base`, fixed colours for `dpo` and `ppo`, others in turn."""
    fixed = {"base": BASE_COLOUR, "dpo": PALETTE[0], "ppo": PALETTE[1]}
    names = list(models)
    others = [name for name in names if name not in fixed]
    spare = {name: PALETTE[2 + i % (len(PALETTE) - 2)] for i, name in enumerate(others)}
    return {name: (fixed | spare)[name] for name in names}


def marker(index: int) -> str:
    """The marker of the model or series with this index."""
    return "osD^vPX"[index % 7]

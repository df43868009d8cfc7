"""The style of all figures: settings, colours, and how a figure becomes a file.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart. Models and series
also have different markers.
"""

import contextlib
import functools
import io
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from spavl_lib.runs.files import read_jsonl
from spavl_lib.runs.text import FIGURES

INK, MUTED, GRID, PAPER = "#1f2a37", "#5f6b7a", "#e4e8ee", "#ffffff"
MARKERS = "osD^vPX"
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
# Colours on a dark page that replace the colours above. Other colours stay.
DARK = {
    INK: "#e6eaf0",
    MUTED: "#a3adba",
    GRID: "#2e3743",
    PAPER: "#171c23",
    BASE_COLOUR: "#98a4b5",
    PALETTE[0]: "#4ea9e2",
    PALETTE[1]: "#f28444",
    PALETTE[2]: "#3fc79d",
}
HELD_OUT = "held out"  # label of values on held-out rows; the last one in every legend
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
        return shown_png(self)


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


def shown_png(fig: Figure, dpi: int = 110) -> bytes:
    """A figure as PNG for a notebook, in the colours that `$SPAVL_FIGURES` chooses."""
    if os.environ.get(FIGURES) != "dark":
        return png_bytes(fig, dpi)
    fig.draw_without_rendering()  # creates the parts that matplotlib creates only while it draws
    with _recoloured(fig):
        return png_bytes(fig, dpi)


@contextlib.contextmanager
def _recoloured(fig: Figure) -> Iterator[None]:
    """Replace the colours of all parts of a figure within the block, as `DARK` says."""
    dark = {to_rgb(light): to_rgb(colour) for light, colour in DARK.items()}

    def replaced(colour: Any) -> Any:
        """A colour, or several of them, with the same opacity."""
        if colour is None or isinstance(colour, str) and colour in ("none", "auto"):
            return colour
        rgba = to_rgba_array(colour)
        if not len(rgba):
            return colour
        rgba[:, :3] = [dark.get(tuple(c), tuple(c)) for c in rgba[:, :3]]
        return rgba if np.ndim(colour) > 1 else tuple(rgba[0])

    undo: list[tuple[Callable[[Any], Any], Any]] = []
    properties = ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor")
    parts = fig.findobj()
    for part in fig.findobj(Text):  # matplotlib does not list boxes and arrows of texts
        boxes = (part.get_bbox_patch(), getattr(part, "arrow_patch", None))
        parts += [box for box in boxes if box is not None]
    for part in parts:
        for name in properties:
            read, write = (getattr(part, f"{verb}_{name}", None) for verb in ("get", "set"))
            # `color` of a patch or collection is both of its other colours.
            if read and write and not (name == "color" and hasattr(part, "get_facecolor")):
                old = read()
                undo.append((write, old))
                write(replaced(old))
    try:
        yield
    finally:
        for write, old in reversed(undo):
            write(old)


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


def panel_axes(fig: Figure, count: int, columns: int) -> list[Axes]:
    """Panels in rows of nearly equal length, so that no row has a single panel beside empty space.

    Args:
        fig: The figure.
        count: Number of panels.
        columns: Largest number of panels in a row.
    """
    lines = math.ceil(count / columns)
    sizes = [count // lines + (line < count % lines) for line in range(lines)]
    width = math.lcm(*sizes)
    grid = fig.add_gridspec(lines, width)
    return [
        fig.add_subplot(grid[line, width // size * place : width // size * (place + 1)])
        for line, size in enumerate(sizes)
        for place in range(size)
    ]


def legend_above(ax: Axes, columns: int = 3) -> None:
    """Draw a legend between an axes' title and its data, so that it covers no data.

    Args:
        ax: The axes, with its title.
        columns: Largest number of entries in a row.
    """
    entries = sorted(
        zip(*ax.get_legend_handles_labels(), strict=True), key=lambda entry: entry[1] == HELD_OUT
    )
    if not entries:
        return
    lines = math.ceil(len(entries) / columns)
    ax.legend(
        [handle for handle, _ in entries], [label for _, label in entries],
        loc="lower left", bbox_to_anchor=(0, 1), ncols=min(columns, len(entries)),
        fontsize=8, borderaxespad=0.1, handlelength=1.5, columnspacing=1.2,
    )  # fmt: skip
    if title := ax.get_title(loc="left"):
        ax.set_title(title, pad=9 + 12 * lines)


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
    return MARKERS[index % len(MARKERS)]


def own_markers(colours: Mapping[str, str]) -> dict[str, str]:
    """Model name -> marker, so that no two models have the same colour and the same marker.

    Args:
        colours: Model name -> colour. At most seven models share a colour.
    """
    markers: dict[str, str] = {}
    for index, (name, colour) in enumerate(colours.items()):
        taken = {markers[other] for other in markers if colours[other] == colour}
        tried = [marker(index + step) for step in range(len(MARKERS))]
        markers[name] = next((m for m in tried if m not in taken), tried[0])
    return markers

"""Figures that explain: tokens of a sequence, patches of an image, curves of a formula."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from PIL import Image

from spavl_lib.evaluation.numbers import (
    HARMLESS_TITLES,
    model_title,
    models_of,
    read_metrics,
    style_title,
)
from spavl_lib.evaluation.numbers import read_rate as rate_of
from spavl_lib.evaluation.rates import Rate
from spavl_lib.plotting.results import percent_axis
from spavl_lib.plotting.style import (
    INK,
    MUTED,
    PALETTE,
    PAPER,
    marker,
    model_colours,
    new_figure,
    note,
    styled,
)

KINDS = {"special": MUTED, "image": PALETTE[2], "prompt": PALETTE[5], "response": PALETTE[1]}
_CHARACTER, _LINE = 0.088, 0.46  # inches: width of a character, height of a line of tokens
_PAGE = 9.0  # inches: width of a line


@styled
def plot_lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_label: str, y_label: str,
    *, title: str = "", log_x: bool = False,
) -> Figure:  # fmt: skip
    """Curves with their names beside their right ends.

    Args:
        series: Name -> x values and y values of a curve.
        x_label: Label of the x axis, with its unit.
        y_label: Label of the y axis, with its unit.
        title: Text above the figure.
        log_x: Whether the x axis is logarithmic.
    """
    fig = new_figure(6.6, 3.6, title)
    ax = fig.subplots()
    ends = []
    for index, (name, (xs, ys)) in enumerate(series.items()):
        if not len(xs):
            continue
        colour = PALETTE[index % len(PALETTE)]
        ax.plot(xs, ys, color=colour, lw=1.8)
        ends.append((xs[-1], ys[-1], name, colour))
    if log_x:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    elif all(isinstance(x, int) for xs, _ in series.values() for x in xs):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label_ends(ax, ends)
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    if not ends:
        note(ax, "Nothing measured yet")
    return fig


def _label_ends(ax: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names right of the axes, at the heights of their curves' ends, without overlaps."""
    low, high = ax.get_ylim()
    heights = [(y - low) / (high - low) for _, y, _, _ in ends]
    order = sorted(range(len(ends)), key=lambda i: heights[i])
    lowest = -1.0
    for place in order:
        lowest = max(heights[place], lowest + 0.075)
        _, _, name, colour = ends[place]
        ax.annotate(name, (1.01, lowest), xycoords="axes fraction", va="center", color=colour,
                    weight="bold", fontsize=9)  # fmt: skip


@styled
def plot_rates_over(
    values: Mapping[float, Mapping[str, Any]], x_label: str, rates: Mapping[str, str],
    *, log_x: bool = True,
) -> Figure:  # fmt: skip
    """Rates with 95 % intervals over the values of a setting.

    Args:
        values: Value of the setting -> rates of the model that was trained with it.
        x_label: Label of the x axis.
        rates: Key of each rate to draw -> its name.
        log_x: Whether the x axis is logarithmic.
    """
    fig = new_figure(6.6, 3.8)
    ax = fig.subplots()
    percent_axis(ax, "y")
    ends = []
    for index, (key, name) in enumerate(rates.items()):
        points = [(x, rate_of(cells, key)) for x, cells in sorted(values.items())]
        measured: list[tuple[float, Rate]] = [(x, r) for x, r in points if r is not None]
        if not measured:
            continue
        colour, xs = PALETTE[index % len(PALETTE)], [x for x, _ in measured]
        errors = np.array([rate.errors for _, rate in measured]).T
        ax.errorbar(xs, [r.value for _, r in measured], yerr=errors, color=colour, lw=1.6,
                    marker=marker(index), ms=6, capsize=3, mec=PAPER, clip_on=False)  # fmt: skip
        ends.append((xs[-1], measured[-1][1].value, name, colour))
    if log_x:
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_locator(FixedLocator(sorted(values)))
    ax.set_xticks(sorted(values), [f"{x:g}" for x in sorted(values)])
    _label_ends(ax, ends)
    ax.set_xlabel(x_label)
    if not ends:
        note(ax, "Nothing measured yet")
    return fig


@styled
def plot_harmless_refused(source: Any) -> Figure:
    """Harmless requests that each model refused, by test set, with 95 % intervals.

    Args:
        source: The path of metrics.json, or its contents.
    """
    counted = {
        name: cells["harmless_refused"]
        for name, cells in models_of(read_metrics(source)).items()
        if cells.get("harmless_refused")
    }
    shown = [k for k in HARMLESS_TITLES if any(rate_of(c, k) for c in counted.values())]
    fig = new_figure(7.6, 1.4 + 0.2 * max(1, len(shown)) * (1 + len(counted)))
    ax = fig.subplots()
    if not shown:
        note(ax, "Nothing measured yet")
        return fig
    _rate_rows(ax, counted, {key: HARMLESS_TITLES[key] for key in shown})
    ax.set_xlabel("harmless requests refused (lower is better)")
    fig.legend(loc="outside upper left", ncols=len(counted))
    return fig


def _rate_rows(ax: Axes, models: Mapping[str, Mapping], titles: Mapping[str, str]) -> None:
    """One row for each key of `titles`, with a dot, a 95 % interval and the count of each model.

    Args:
        ax: Where to draw.
        models: Name of a model -> key -> rate; a rate may be missing.
        titles: Key -> its name for readers, in the order of the rows.
    """
    colours, step = model_colours(models), 0.8 / len(models)
    named, ends = set(), []
    for index, (name, cells) in enumerate(models.items()):
        for place, key in enumerate(titles):
            rate, y = rate_of(cells, key), place + step * (index - (len(models) - 1) / 2)
            if rate is None:
                continue
            ax.errorbar(rate.value, y, xerr=np.array(rate.errors)[:, None], fmt=marker(index),
                        ms=7, color=colours[name], capsize=3, mec=PAPER, clip_on=False,
                        label=None if name in named else model_title(name))  # fmt: skip
            named.add(name)
            ends.append(rate.value + rate.errors[1])
            ax.annotate(rate.counts, (ends[-1], y), (6, 0), va="center",
                        textcoords="offset points", fontsize=8, color=MUTED)  # fmt: skip
    percent_axis(ax)
    ax.set_xlim(-0.01, min(1.03, max(ends, default=1.0) + 0.08))
    ax.set_yticks(range(len(titles)), list(titles.values()))
    ax.set_ylim(len(titles) - 0.5, -0.5)
    ax.grid(False, axis="y")


@styled
def plot_per_drawing(source: Any) -> Figure:
    """Unsafe answers and refused harmless requests by the style of the drawing.

    The left panel leaves out the base model, which complies with nearly every harmful request.

    Args:
        source: The path of metrics.json, or its contents.
    """
    counted = {
        name: cells["per_drawing"]
        for name, cells in models_of(read_metrics(source)).items()
        if cells.get("per_drawing")
    }
    rows = max((len(cells) for cells in counted.values()), default=1)
    fig = new_figure(10, 1.6 + 0.2 * rows * (1 + len(counted)))
    if not counted:
        note(fig.subplots(), "Nothing measured by style")
        return fig
    titles = {key: style_title(key) for key in next(iter(counted.values()))}
    panels = {"unsafe_rate": "unsafe answers", "harmless_refused": "harmless requests refused"}
    for ax, (key, title) in zip(fig.subplots(1, 2, sharey=True), panels.items(), strict=True):
        rates = {
            name: {style: cell.get(key) for style, cell in cells.items()}
            for name, cells in counted.items()
        }
        if key == "unsafe_rate" and len(rates) > 1 and "base" in rates:
            rates["base"] = {}  # an empty row keeps the colours and places of both panels alike
        _rate_rows(ax, rates, titles)
        ax.set_xlabel(f"{title} (lower is better)")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside upper left", ncols=len(counted))
    return fig


@styled
def plot_sequence(tokens: Sequence[str], kinds: Sequence[str], scored: Sequence[bool]) -> Figure:
    """A sequence of tokens as a strip. A bar under a token says that the loss counts it.

    Args:
        tokens: Text of each token. Image tokens in a row are drawn as one box with their number.
        kinds: Kind of each token: `special`, `image`, `prompt` or `response`.
        scored: Whether each token is in the loss.
    """
    boxes: list[tuple[str, str, bool]] = []
    run = 0
    for index, (token, kind, counts) in enumerate(zip(tokens, kinds, scored, strict=True)):
        run = run + 1 if kind == "image" else 0
        if kind == "image" and index + 1 < len(kinds) and kinds[index + 1] == "image":
            continue
        boxes.append((f"{token} × {run}" if run > 1 else token, kind, counts))
    fig, ax, places = _strip([text for text, _, _ in boxes])
    for (text, kind, counts), (x, y, width) in zip(boxes, places, strict=True):
        _box(ax, x, y, width, text, KINDS[kind], 0.22)
        if counts:
            ax.add_patch(Rectangle((x, y + 0.72), width, 0.12, facecolor=INK, edgecolor="none"))
    handles = [Rectangle((0, 0), 1, 1, facecolor=c, alpha=0.4) for c in KINDS.values()]
    handles.append(Rectangle((0, 0), 1, 1, facecolor=INK))
    fig.legend(handles, [*KINDS, "in the loss"], loc="outside upper left", ncols=5)
    return fig


@styled
def plot_token_values(tokens: Sequence[str], values: Sequence[float], label: str) -> Figure:
    """Tokens as a strip, coloured by a number each: blue above 0, orange below.

    Args:
        tokens: Text of each token.
        values: Number of each token.
        label: What the numbers are, with their unit.
    """
    fig, ax, places = _strip([f"{text}\n{v:+.2f}" for text, v in zip(tokens, values, strict=True)])
    most = max([abs(v) for v in values] or [1.0]) or 1.0
    norm = TwoSlopeNorm(0, -most, most)
    for token, value, (x, y, width) in zip(tokens, values, places, strict=True):
        colour = PALETTE[0] if value > 0 else PALETTE[1]
        _box(ax, x, y, width, token, colour, 0.75 * abs(norm(value) - 0.5) * 2)
        ax.text(x + width / 2, y + 0.86, f"{value:+.2f}", ha="center", va="center", fontsize=7,
                color=MUTED)  # fmt: skip
    ax.set_title(label, fontsize=10)
    return fig


def _strip(texts: Sequence[str]) -> tuple[Any, Axes, list[tuple[float, float, float]]]:
    """A figure without axes, and the place (x, y, width) of a box for each text, in inches."""
    places: list[tuple[float, float, float]] = []
    x = y = 0.0
    for text in texts:
        width = 0.12 + _CHARACTER * max(2, *(len(line) for line in text.split("\n")))
        if x and x + width > _PAGE:
            x, y = 0.0, y + 1
        places.append((x, y, width - 0.03))
        x += width
    fig = new_figure(_PAGE + 0.2, 0.75 + _LINE * (y + 1))
    ax = fig.subplots()
    ax.set_axis_off()
    ax.set(xlim=(0, _PAGE), ylim=(y + 1, 0))
    return fig, ax, places


def _box(
    ax: Axes, x: float, y: float, width: float, text: str, colour: str, strength: float
) -> None:
    """Draw one token."""
    box = (x, y + 0.06), width, 0.62
    ax.add_patch(Rectangle(*box, facecolor=colour, alpha=strength, edgecolor="none"))
    ax.add_patch(Rectangle(*box, facecolor="none", edgecolor=colour, lw=0.8))
    ax.text(x + width / 2, y + 0.37, text, ha="center", va="center", fontsize=8, color=INK,
            family="monospace")  # fmt: skip


@styled
def plot_patches(image: Image.Image, pixels: np.ndarray | None, patch: int) -> Figure:
    """An image as it lies in the data set, and as the vision tower reads it, cut into patches.

    Args:
        image: The image.
        pixels: The processor's output for it, (3, height, width), scaled to 0..1; None if it has
            another layout, which is then said instead.
        patch: Side of a patch, in pixels; 0 if it is not known.
    """
    fig = new_figure(6.6, 3.5)
    before, after = fig.subplots(1, 2)
    before.imshow(image)
    before.set_title(f"in the data: {image.width} × {image.height} pixels")
    if pixels is None:
        note(after, "This model's processor returns\npatches instead of an image")
    else:
        height, width = pixels.shape[1:]
        after.imshow(np.moveaxis(pixels, 0, -1).clip(0, 1))
        after.set_title(f"in the model: {width} × {height} pixels")
    if pixels is not None and patch:
        after.set_title(f"in the model: {(height // patch) * (width // patch)} patches")
        for edge in range(0, width + 1, patch):
            after.axvline(edge - 0.5, color=PAPER, lw=0.8)
        for edge in range(0, height + 1, patch):
            after.axhline(edge - 0.5, color=PAPER, lw=0.8)
    for ax in (before, after):
        ax.set(xticks=[], yticks=[], anchor="N")
        ax.grid(False)
        ax.spines[:].set_visible(False)
    return fig

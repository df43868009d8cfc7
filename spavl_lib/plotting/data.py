"""Figures of preference data: classes, lengths of responses, and images."""

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from spavl_lib.data.images import decode
from spavl_lib.data.taxonomy import QUESTION_TYPES, TAXONOMY, classes, display, field_name
from spavl_lib.evaluation.numbers import percent
from spavl_lib.evaluation.text import short
from spavl_lib.plotting.style import (
    INK,
    MUTED,
    PALETTE,
    PAPER,
    column_of,
    legend_above,
    new_figure,
    note,
    styled,
)

# Smallest font size of a label, in points. Tertiary classes of one class2 whose labels would be
# smaller share a tile.
_SMALLEST = 6.0
_LINE = 0.78  # font size divided by line height
_OF_IMAGES = ("picture size", "image size")  # such columns count each distinct image once


def _counts(source: Any, column: str) -> Counter:
    if isinstance(source, Mapping):
        return Counter({short(k): int(v) for k, v in source.items()})
    return Counter(short(value or "unknown") for value in column_of(source, column))


@styled
def plot_class_counts(source: Any) -> Figure:
    """Rows per harm class: class1, class2 and class3 side by side, with proportional heights.

    Args:
        source: Rows or a data frame with `class3`, the column itself, or a mapping class3 -> count.
    """
    counts = _counts(source, "class3")
    tree = {
        one: {two: list(three) for two, three in inner.items()} for one, inner in TAXONOMY.items()
    }
    unknown = sorted(counts.keys() - set(classes(3)))
    if unknown:
        tree["other"] = {"other": unknown}
    total = counts.total()
    present = sum(1 for n in counts.values() if n)
    unclassed = total and not counts.keys() - {"unknown"}
    # High enough for a legible label of each class, and never higher than a screen.
    height = 1.0 if unclassed or not total else min(6.6, 1.5 + 0.3 * present)
    fig = new_figure(9.4, height)
    ax = fig.subplots()
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(max(total, 1), 0))
    if unclassed or not total:
        note(ax, f"None of {_number_of(total, 'row')} has a class of harm" if total else "No rows")
        return fig
    points = height * 72 * 0.93 / total  # height of one row on paper
    edges, y = (0.0, 0.27, 0.60, 1.0), 0
    for index, (class1, seconds) in enumerate(tree.items()):
        colour = (*PALETTE, MUTED)[index % 7]
        y1 = y
        for class2, thirds in seconds.items():
            y2 = y
            for text, size in _tertiary_tiles({c: counts[c] for c in thirds if counts[c]}, points):
                box = (edges[2], y, edges[3] - edges[2], size)
                _tile(ax, box, f"{text}  {size:,}", colour, 0.16, points)
                y += size
            box = (edges[1], y2, edges[2] - edges[1], y - y2)
            _tile(ax, box, f"{display(class2)}  {y - y2:,}", colour, 0.32, points, width=34)
        box = (edges[0], y1, edges[1] - edges[0], y - y1)
        _tile(ax, box, f"{display(class1)}  {y - y1:,}", colour, 0.55, points, width=24, bold=True)
    each = {n for n in counts.values() if n}
    equal = f", {each.pop():,} each" if len(each) == 1 < present else ""
    ax.set_title(f"{_number_of(total, 'row')} in {_number_of(present, 'class', 'es')}{equal}")
    return fig


def _number_of(count: int, noun: str, ending: str = "s") -> str:
    """A count with its noun, such as `1 row` or `3 classes`."""
    return f"{count:,} {noun}{'' if count == 1 else ending}"


def _tertiary_tiles(counts: dict[str, int], points: float) -> list[tuple[str, int]]:
    """(label, rows) of each tile of one class2. Small tertiary classes share the last tile."""
    order = sorted(counts, key=lambda c: -counts[c])
    large = [c for c in order if _LINE * points * counts[c] >= _SMALLEST]
    small = order[len(large) :]
    tiles = [(display(c), counts[c]) for c in large]
    if small:
        names = ", ".join(display(c) if i == 0 else display(c).lower() for i, c in enumerate(small))
        text = names if len(names) <= 44 else f"{len(small)} more: {names}"
        tiles.append((textwrap.shorten(text, 44, placeholder=" …"), sum(counts[c] for c in small)))
    return tiles


def _tile(
    ax: Axes,
    box: tuple[float, float, float, float],
    text: str,
    colour: str,
    alpha: float,
    points: float,
    *,
    width: int = 48,
    bold: bool = False,
) -> None:
    """Draw one rectangle, with its label if the height allows."""
    x, y, wide, high = box
    if not high:
        return
    ax.add_patch(Rectangle((x, y), wide, high, facecolor=PAPER, edgecolor="none"))
    ax.add_patch(
        Rectangle((x, y), wide, high, facecolor=colour, alpha=alpha, edgecolor=PAPER, lw=1.2)
    )
    high_points = high * points
    wrapped = textwrap.fill(text, width)
    lines = wrapped.count("\n") + 1
    size = min(10.0 if bold else 9.0, _LINE * high_points / lines)
    if size < _SMALLEST - 1:
        return
    ax.text(x + 0.008, y + high / 2, wrapped, va="center", fontsize=size, color=INK,
            weight="bold" if bold else "normal")  # fmt: skip


@styled
def plot_counts_by_type(source: Any, column: str = "question_type", unit: str = "") -> Figure:
    """Rows per value of a column, as bars with their counts.

    Args:
        source: Rows or a data frame, the column itself, or a mapping value -> count.
        column: Name of the column to count.
        unit: What is counted. Empty stands for rows, or for images if the column is a property of
            images.
    """
    counts = _counts(source, column)
    fig = new_figure(6.2, 1.0 + 0.42 * max(1, len(counts)))
    ax = fig.subplots()
    names = sorted(counts)
    labels = [QUESTION_TYPES.get(name, name) for name in names]
    bars = ax.barh(labels, [counts[n] for n in names], 0.62, color=PALETTE[0])
    ax.bar_label(bars, [f"{counts[n]:,}" for n in names], padding=4)
    ax.margins(x=0.12)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlabel(unit or ("images" if column.startswith(_OF_IMAGES) else "rows"))
    ax.set_ylabel(field_name(column))
    return fig


@styled
def plot_length_histogram(
    chosen: Sequence[float], rejected: Sequence[float], *, unit: str = "words"
) -> Figure:
    """Histograms of the lengths of chosen and rejected responses, with their medians.

    Args:
        chosen: Length of the chosen response of each pair.
        rejected: Length of the rejected response of each pair.
        unit: The unit of the lengths.
    """
    named = {
        "chosen": np.asarray(list(chosen), float),
        "rejected": np.asarray(list(rejected), float),
    }
    longest = max((a.max() for a in named.values() if len(a)), default=1.0)
    step = max(1, math.ceil(longest / 50))
    bins = np.arange(-0.5, longest + step + 0.5, step)
    fig = new_figure(6.6, 3.4)
    ax = fig.subplots()
    for colour, style, (name, lengths) in zip(PALETTE, "-:", named.items(), strict=False):
        if not len(lengths):
            continue
        median = float(np.median(lengths))
        ax.hist(lengths, bins=bins, histtype="stepfilled", facecolor=colour, alpha=0.25)
        ax.hist(lengths, bins=bins, histtype="step", color=colour, lw=1.5,
                label=f"{name}, median {median:g}")  # fmt: skip
        ax.axvline(median, color=colour, lw=1.5, ls=style)
    ax.set_xlabel(f"answer length, {unit}")
    ax.set_ylabel("answers")
    if ax.patches:
        legend_above(ax, columns=2)
    else:
        note(ax, "No answers")
    return fig


@styled
def plot_image_grid(
    images: Sequence[Any], captions: Sequence[str] | None = None, columns: int = 4
) -> Figure:
    """Images in a grid, each with its caption. If all images are equal, one of them stands beside
    all captions.

    Args:
        images: PIL images, arrays, paths or `{"bytes", "path"}` cells; None for an empty tile.
        captions: One text for each image. Each line of a text is wrapped to at most six lines.
        columns: Number of images in a row.
    """
    captions = [""] * len(images) if captions is None else list(captions)
    if len(captions) != len(images):
        raise ValueError(
            f"expected one caption per image, got {len(captions)} captions and {len(images)} images"
        )
    arrays = [None if i is None else _array(i) for i in images]
    first = arrays[0] if len(arrays) > 1 else None
    if first is not None and all(a is not None and np.array_equal(first, a) for a in arrays):
        return _one_image(first, captions)
    columns = max(1, min(columns, len(images)))
    lines = max(1, math.ceil(len(images) / columns))
    width = 28 if columns > 3 else 38
    wrapped = [
        "\n".join(
            textwrap.fill(line, width, max_lines=6, placeholder=" …") for line in c.split("\n")
        )
        for c in captions
    ]
    tallest = max((c.count("\n") + 1 if c else 0 for c in wrapped), default=0)
    tile_width = 2.2 if columns > 3 else 3.0
    shapes = [a.shape[0] / a.shape[1] for a in arrays if a is not None]
    # A tile is at most twice as high as wide, so that tall images leave space for captions.
    tile_height = tile_width * min(max(shapes, default=1.0), 2.0)
    fig = new_figure(tile_width * columns, lines * (tile_height + 0.17 * tallest))
    axes = fig.subplots(lines, columns, squeeze=False).ravel()
    for ax in axes:
        ax.set(xticks=[], yticks=[], anchor="N")
        ax.spines[:].set_visible(False)
    for ax, array, caption in zip(axes, arrays, wrapped, strict=False):
        if array is None:
            note(ax, "no image")
        else:
            ax.imshow(array)
        ax.set_xlabel(caption, loc="left", fontsize=8.5)
    return fig


def _one_image(array: np.ndarray, captions: Sequence[str]) -> Figure:
    """One image, with several captions beside it."""
    wrapped = "\n\n".join(
        "\n".join(textwrap.fill(line, 84, max_lines=6, placeholder=" …") for line in c.split("\n"))
        for c in captions
    )
    side = 2.2
    image_height = side * min(array.shape[0] / array.shape[1], 2.0)
    height = max(image_height, 0.15 * (wrapped.count("\n") + 1)) + 0.2
    fig = new_figure(side + 6.2, height)
    ax, beside = fig.subplots(1, 2, gridspec_kw={"width_ratios": (side, 6.2)})
    ax.set(xticks=[], yticks=[], anchor="N")
    ax.spines[:].set_visible(False)
    ax.imshow(array)
    beside.set_axis_off()
    beside.text(0, 1, wrapped, va="top", fontsize=8.5, transform=beside.transAxes)
    return fig


def _array(image: Any) -> np.ndarray:
    if isinstance(image, np.ndarray):
        return image
    return np.asarray(decode(str(image) if isinstance(image, Path) else image))


@styled
def plot_length_bias(lengths: Mapping[str, Mapping[str, Mapping]]) -> Figure:
    """Median words of chosen and rejected responses, by class and by question type.

    The text on the right is the share of pairs whose chosen response is the longer one. At 50 %,
    the longer response is chosen as often as not. At 100 %, it is always chosen.

    Args:
        lengths: Column -> value -> `chosen_median`, `rejected_median`, `chosen_longer_share`, as in
            the data stage's summary.
    """
    groups = [(column, rows) for column, rows in lengths.items() if rows]
    sizes = [len(rows) + 0.8 for _, rows in groups] or [1.0]
    fig = new_figure(8.2, 0.8 + 0.34 * sum(sizes) + 0.3 * len(sizes))
    axes = fig.subplots(max(1, len(groups)), 1, squeeze=False, sharex=True,
                        gridspec_kw={"height_ratios": sizes})[:, 0]  # fmt: skip
    if not groups:
        note(axes[0], "No rows")
        return fig
    for ax, (column, rows) in zip(axes, groups, strict=True):
        names = list(rows)
        for y, name in enumerate(names):
            row = rows[name]
            ends = (row["rejected_median"], row["chosen_median"])
            ax.plot(ends, (y, y), color=MUTED, lw=1.5, zorder=1)
            for x, colour, shape, label in zip(
                ends, (PALETTE[1], PALETTE[0]), "so", ("rejected", "chosen"), strict=True
            ):
                ax.plot(x, y, shape, color=colour, ms=7, zorder=2, label=None if y else label)
            share = row["chosen_longer_share"]
            text = "" if share is None else f"longer in {percent(share)}"
            ax.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), va="center",
                        fontsize=8.5, color=MUTED)  # fmt: skip
        ax.set_yticks(range(len(names)), [display(short(n)) for n in names])
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.set_title(f"By {field_name(column)}")
        ax.grid(False, axis="y")
    axes[0].legend(ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=8.5)
    axes[0].annotate("chosen answer is", (1.01, 1.0), xycoords="axes fraction", fontsize=8.5,
                     color=MUTED, va="bottom")  # fmt: skip
    axes[-1].set_xlabel("median words of an answer")
    axes[-1].set_xlim(left=0)
    return fig

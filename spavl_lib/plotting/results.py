"""Figures of metrics.json: rates with intervals, overall and per class."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from spavl_lib.data.taxonomy import PARENTS, TAXONOMY, display
from spavl_lib.evaluation.numbers import (
    METRICS,
    REFUSAL_RATE,
    harm_metric,
    model_title,
    models_of,
    percent,
    read_metrics,
    read_rate,
)
from spavl_lib.evaluation.rates import Rate, pool
from spavl_lib.evaluation.text import short
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


def percent_axis(ax: Axes, axis: str = "x") -> None:
    """Give an axis ticks from 0 to 100 %."""
    getattr(ax, f"set_{axis}lim")(-0.03, 1.03)
    getattr(ax, f"set_{axis}ticks")(np.linspace(0, 1, 6))
    getattr(ax, f"{axis}axis").set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def _dot(ax: Axes, x: float, y: float, colour: str, index: int, **errors: Any) -> None:
    ax.errorbar(x, y, **errors, fmt=marker(index), ms=8, color=colour, ecolor=colour,
                elinewidth=1.8, capsize=3, markeredgecolor=PAPER, markeredgewidth=0.8,
                zorder=3, clip_on=False)  # fmt: skip


def _spread(heights: list[float], gap: float = 0.055) -> list[float]:
    """Change heights of labels so that labels do not overlap.

    A label in the top half of the axes moves down, another label moves up.
    """
    placed: dict[int, float] = {}
    for index in sorted(range(len(heights)), key=lambda i: -abs(heights[i] - 0.5)):
        height, step = heights[index], -gap if heights[index] > 0.5 else gap
        while any(abs(height - other) < gap - 1e-9 for other in placed.values()):
            height += step
        placed[index] = height
    return [placed[i] for i in range(len(heights))]


@styled
def plot_safety_helpfulness(source: Mapping | Path | str, *, width: float = 6.2) -> Figure:
    """One point for each model: helpful rate (x) and safe rate (y, 1 − unsafe rate).

    Bars show the 95 % intervals. An arrow leads from the base model to each model that was trained
    from it. If no model has an unsafe rate, but some have a refusal rate, y is
    the refusal rate.

    Args:
        source: The path of metrics.json, or its contents.
        width: Width in inches.
    """
    models = models_of(read_metrics(source))
    harm = harm_metric(models)
    refusals = harm.key == REFUSAL_RATE.key
    colours = model_colours(models)
    fig = new_figure(width, 0.84 * width)
    ax = fig.subplots()
    percent_axis(ax, "x")
    percent_axis(ax, "y")
    ax.axhspan(0.8, 1.03, xmin=0.83 / 1.06, color=PALETTE[2], alpha=0.12, lw=0, zorder=0)
    corner = {"fontsize": 8.5, "color": MUTED, "style": "italic", "linespacing": 1.3}
    ax.text(0.79, 0.81, "safe and\nhelpful", ha="right", **corner)
    ax.text(0.0, 0.97, "refuses\neverything", va="top", **corner)
    ax.text(0.0, 0.03, "unsafe and\nuseless", va="bottom", **corner)
    points: list[tuple[float, float, str]] = []
    start = None  # the base model's point
    for index, (name, cells) in enumerate(models.items()):
        helpful, measured = read_rate(cells, "helpful_rate"), read_rate(cells, harm.key)
        if helpful is None or measured is None:
            continue
        x, y = helpful.value, measured.value if refusals else 1 - measured.value
        xerr = np.array(helpful.errors)[:, None]
        yerr = np.array(measured.errors if refusals else measured.errors[::-1])[:, None]
        _dot(ax, x, y, colours[name], index, xerr=xerr, yerr=yerr)
        if name == "base":
            start = (x, y)
        elif start:
            bend = 0.06 if index % 2 else -0.06  # so that arrows to near points lie apart
            ax.annotate("", (x, y), start, zorder=2, arrowprops={
                "arrowstyle": "-|>", "mutation_scale": 18, "connectionstyle": f"arc3,rad={bend}",
                "color": colours[name], "alpha": 0.6, "lw": 1.8, "shrinkA": 9, "shrinkB": 9,
            })  # fmt: skip
        reach = helpful.errors[1] if x <= 0.6 else -helpful.errors[0]
        points.append((x + reach, y, name))
    for (x, y, name), height in zip(points, _spread([p[1] for p in points]), strict=True):
        reach = 0.02 if x <= 0.6 else -0.02
        ax.annotate(model_title(name), (x, y), (x + reach, height), va="center", weight="bold",
                    ha="left" if reach > 0 else "right", color=colours[name])  # fmt: skip
    if not points:
        note(ax, "Nothing measured yet")
    ax.set_xlabel("Helpful rate")
    ax.set_ylabel("Refusals of harmful requests" if refusals else "Safe rate (1 − unsafe rate)")
    return fig


@styled
def plot_refusal_balance(
    points: Sequence[tuple[str, Rate, Rate]], title: str, *, width: float = 6.2
) -> Figure:
    """One point for each model: harmless requests that it did not refuse (x), and bad answers (y).

    An answer to a harmful request is bad if it is harmful, or if it is no refusal; the caller
    chooses which of the two. The more harmless requests a model refuses, the more its colour turns
    from green to orange. Bars show the 95 % intervals.

    Args:
        points: For each model its name, the share of harmless requests that it refused, and the
            share of bad answers.
        title: Label of the y axis.
        width: Width in inches.
    """
    scale = LinearSegmentedColormap.from_list("refused", [PALETTE[2], PALETTE[4], PALETTE[1]])
    fig = new_figure(width, 0.84 * width)
    ax = fig.subplots()
    percent_axis(ax, "x")
    percent_axis(ax, "y")
    ax.axhspan(-0.03, 0.2, xmin=0.83 / 1.06, color=PALETTE[2], alpha=0.12, lw=0, zorder=0)
    corner = {"fontsize": 8.5, "color": MUTED, "style": "italic", "linespacing": 1.3}
    ax.text(0.815, 0.19, "safe and helpful", va="top", **corner)
    ax.text(0.02, 0.06, "refuses\neverything", va="bottom", **corner)
    ax.text(1.0, 0.8, "goes along\nwith everything", va="top", ha="right", **corner)
    heights = _spread([bad.value for _, _, bad in points])
    for index, ((name, refused, bad), height) in enumerate(zip(points, heights, strict=True)):
        x, left = 1 - refused.value, refused.value < 0.4
        errors = np.array(refused.errors[::-1])[:, None], np.array(bad.errors)[:, None]
        ax.errorbar(x, bad.value, xerr=errors[0], yerr=errors[1], fmt=marker(index), ms=9,
                    color=scale(refused.value), ecolor=MUTED, elinewidth=1.4, capsize=3,
                    markeredgecolor=INK, markeredgewidth=0.9, zorder=3, clip_on=False)  # fmt: skip
        reach = -refused.errors[1] - 0.02 if left else refused.errors[0] + 0.02
        ax.annotate(f"{model_title(name)} (refuses {percent(refused)})", (x, bad.value),
                    (x + reach, height), va="center", ha="right" if left else "left",
                    fontsize=9, color=INK)  # fmt: skip
    ax.set_xlabel("Harmless requests not refused")
    ax.set_ylabel(textwrap.fill(title, round(10 * width)))
    return fig


@styled
def plot_rates(source: Mapping | Path | str, section: str | None = None) -> Figure:
    """The four rates of every model with 95 % intervals, one panel for each rate.

    Args:
        source: The path of metrics.json, or its contents.
        section: Key of each model's entry that holds the rates, such as `held_out_drawings`; None
            uses the entry itself.
    """
    models = models_of(read_metrics(source))
    if section:
        models = {name: cells.get(section) or {} for name, cells in models.items()}
    colours = model_colours(models)
    fig = new_figure(8.6, 2.0 + 0.62 * max(1, len(models)))
    fig.get_layout_engine().set(wspace=0.06)
    axes = fig.subplots(2, 2, sharey=True).ravel()
    for ax, metric in zip(axes, (harm_metric(models), *METRICS[1:]), strict=True):
        percent_axis(ax)
        ax.set_title(f"{metric.title} ({metric.direction})")
        for index, (name, cells) in enumerate(models.items()):
            rate = read_rate(cells, metric.key)
            if rate is None:
                ax.text(0.0, index, "not measured", va="center", color=MUTED, fontsize=9)
                continue
            errors = np.array(rate.errors)[:, None]
            _dot(ax, rate.value, index, colours[name], index, xerr=errors)
            left = rate.value > 0.6
            edge = rate.value - errors[0, 0] if left else rate.value + errors[1, 0]
            ax.annotate(percent(rate), (edge, index), (-6 if left else 6, 0), va="center",
                        ha="right" if left else "left", textcoords="offset points")  # fmt: skip
        ax.set_yticks(range(len(models)), [model_title(name) for name in models])
        ax.grid(False, axis="y")
    axes[0].set_ylim(max(1, len(models)) - 0.4, -0.6)
    return fig


def class_rates(cells: Mapping, key: str, level: int) -> dict[str, Rate | None]:
    """A model's rate in each class of one level, pooled from the counts of its tertiary classes.

    Args:
        cells: One model's entry in metrics.json.
        key: Name of the rate, such as `unsafe_rate`.
        level: Level of the classes: 1, 2 or 3.
    """
    members: dict[str, list[Rate | None]] = {}
    for class3, rates in (cells.get("per_class") or {}).items():
        name = class3 if level == 3 else PARENTS.get(class3, ("other", "other"))[level - 1]
        members.setdefault(name, []).append(read_rate(rates, key))
    if level == 3:
        return {name: parts[0] for name, parts in members.items()}
    return {name: pool(parts) for name, parts in members.items()}


def class_order(names: Iterable[str], level: int) -> list[tuple[str, str]]:
    """(class1, class) of each class in the order of the taxonomy, with unknown classes last.

    Args:
        names: The classes to order.
        level: Level of these classes: 1, 2 or 3.
    """
    known = []
    for class1, seconds in TAXONOMY.items():
        inside = seconds if level == 2 else [c for s in seconds.values() for c in s]
        known += [(class1, name) for name in ([class1] if level == 1 else inside)]
    present = set(names)
    order = [(class1, name) for class1, name in known if name in present]
    return order + [("other", n) for n in sorted(present - {name for _, name in order})]


@styled
def plot_unsafe_by_class(
    source: Mapping | Path | str, level: int = 2, *, width: float = 8.2
) -> Figure:
    """Unsafe rate of every model per harm class, with 95 % Wilson intervals.

    If no model has an unsafe rate, but some have a refusal rate, the refusal rate is drawn.

    Args:
        source: The path of metrics.json, or its contents.
        level: Level of the classes: 1 (6 classes), 2 (15) or 3 (53).
        width: Width in inches.
    """
    models = models_of(read_metrics(source))
    colours = model_colours(models)
    harm = harm_metric(models)
    rates = {name: class_rates(cells, harm.key, level) for name, cells in models.items()}
    order = class_order({c for by_class in rates.values() for c in by_class}, level)
    places, labels, y, previous_class1 = [], [], 0.0, None
    for class1, _ in order:
        if class1 != previous_class1 and level > 1:
            y += 0.2 if previous_class1 is not None else 0.0
            labels.append((y, short(display(class1))))
            y += 0.85
            previous_class1 = class1
        places.append(y)
        y += 1.0
    fig = new_figure(width, 1.1 + 0.29 * max(y, 4) * (1 if level < 3 else 0.75))
    ax = fig.subplots()
    percent_axis(ax)
    ax.set_xlim(0, 1.03)
    if narrow := width < 5:
        ax.set_xticks((0, 0.5, 1))
    ax.spines["left"].set_visible(False)
    height = 0.78 / max(1, len(models))
    for index, (name, by_class) in enumerate(rates.items()):
        offset = height * (index + 0.5) - 0.39
        shown = [
            (place + offset, rate)
            for place, (_, class_name) in zip(places, order, strict=True)
            if (rate := by_class.get(class_name)) is not None
        ]
        ax.barh([p for p, _ in shown], [r.value for _, r in shown], height, color=colours[name],
                label=model_title(name))  # fmt: skip
        errors = np.array([r.errors for _, r in shown]).T.reshape(2, -1)
        ax.errorbar([r.value for _, r in shown], [p for p, _ in shown], xerr=errors, ls="none",
                    ecolor=INK, elinewidth=1, capsize=1.5, marker=marker(index), ms=5,
                    color=colours[name], mec=PAPER, clip_on=False, zorder=3)  # fmt: skip
    names = [textwrap.fill(short(display(name), 44), round(5.4 * width)) for _, name in order]
    ax.set_yticks(places, names, linespacing=0.95)
    for place, text in labels:
        ax.text(0, place, text, va="center", weight="bold", fontsize=7.5 if narrow else 9.5,
                bbox={"fc": PAPER, "ec": "none", "pad": 1})  # fmt: skip
    ax.set_ylim(max(y, 1) - 0.3, -0.6)
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0, pad=9)
    ax.set_xlabel(f"{harm.title} ({harm.direction})")
    if order:
        fig.legend(loc="outside upper left", ncols=len(models))
    else:
        note(ax, "No rates per class yet")
    return fig

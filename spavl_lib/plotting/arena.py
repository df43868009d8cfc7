"""Figures of the arena's table: methods against attacks, and what safety costs.

Every function takes the content of `laboratory.json`: `methods` and `attacks` (name -> title),
`metrics` (method -> attack -> rates with intervals) and `not_understood` (attacks whose carrier the
base does not understand).
"""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from spavl_lib.evaluation.rates import Rate
from spavl_lib.evaluation.text import MISSING, short
from spavl_lib.plotting.results import percent_axis
from spavl_lib.plotting.style import (
    BASE_COLOUR,
    MUTED,
    PALETTE,
    PAPER,
    model_colours,
    new_figure,
    note,
    own_markers,
    panel_axes,
    styled,
)

NONE = "none"  # the column without an attack
# Ink and fills of the heat map have the same colours on dark pages, so that digits stay legible.
_INK, _PALE, _STRONG, _UNKNOWN = "#1b2733", "#fdfbf8", "#f0a267", "#eceff3"
_SCALES = {
    "unsafe": LinearSegmentedColormap.from_list("unsafe", [_PALE, _STRONG]),
    "harmless_refused": LinearSegmentedColormap.from_list("refused", [_PALE, _STRONG]),
    "helpful": LinearSegmentedColormap.from_list("helpful", [_PALE, "#7cc9a8"]),
    "twins": LinearSegmentedColormap.from_list("twins", [_PALE, "#7cc9a8"]),
}
TITLES = {
    "unsafe": "Unsafe answers to harmful requests",
    "harmless_refused": "Refused harmless requests",
    "helpful": "Helpful answers to harmless requests",
    "twins": "Twin pairs with two right answers",
}
Table = Mapping[str, Any]


def rate_of(table: Table, method: str, attack: str, rate: str = "unsafe") -> Rate | None:
    """A rate of the table; None if it was not measured.

    Args:
        table: The table.
        method: Name of the method.
        attack: Name of the attack, or `none`.
        rate: A key of `TITLES`.
    """
    return Rate.from_dict(table["metrics"].get(method, {}).get(attack, {}).get(rate))


def _attacks(table: Table) -> tuple[list[str], list[str]]:
    """The attacks that the base understands, and the others; both without the plain rows."""
    names = [name for name in table["attacks"] if name != NONE]
    unknown = [name for name in names if name in table["not_understood"]]
    return [name for name in names if name not in unknown], unknown


def _round(share: float) -> str:
    """A share in whole percent. A share that is not exactly 0 or 1 is never written as 0 or 100."""
    if 0 < share < 0.005:
        return "<1"
    return ">99" if 0.995 <= share < 1 else f"{100 * share:.0f}"


@styled
def plot_laboratory(table: Table, rate: str = "unsafe") -> Figure:
    """A heat map of one rate: methods down, attacks across, with 95 % intervals.

    Columns of attacks whose carrier the base does not understand stand last and are hatched. Cells
    that were not measured hold a dash.

    Args:
        table: The table.
        rate: A key of `TITLES`.
    """
    known, unknown = _attacks(table)
    columns = [*([NONE] if NONE in table["attacks"] else []), *known, *unknown]
    methods = [name for name in table["methods"] if name in table["metrics"]]
    fig = new_figure(2.2 + 0.62 * max(4, len(columns)), 1.9 + 0.4 * max(1, len(methods)))
    ax = fig.subplots()
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    if not methods or not columns:
        ax.set_axis_off()
        note(ax, "Nothing measured yet")
        return fig
    gap = 0.35  # of a column, before the attacks that are not understood
    places = [x + gap * (name in unknown) for x, name in enumerate(columns)]
    for y, method in enumerate(methods):
        for x, attack in zip(places, columns, strict=True):
            value = rate_of(table, method, attack, rate)
            lost = attack in unknown
            colour = _UNKNOWN if lost or value is None else _SCALES[rate](value.value)
            ax.add_patch(Rectangle(
                (x - 0.47, y - 0.46), 0.94, 0.92, facecolor=colour, lw=0,
                edgecolor="#b3bdc9", hatch="////" if lost and value else None,
            ))  # fmt: skip
            # Text on hatching stands in a plain field.
            box = {"facecolor": _UNKNOWN, "lw": 0, "pad": 0.8} if lost and value else None
            if value is None:
                ax.text(x, y, MISSING, ha="center", va="center", color=_INK, fontsize=9)
                continue
            ax.text(x, y - 0.1, _round(value.value), ha="center", va="center", color=_INK,
                    fontsize=9.5, weight="bold", bbox=box)  # fmt: skip
            if value.ci_low is not None:
                low, high = (_round(end) for end in value.ends)
                ax.text(x, y + 0.26, f"{low}–{high}", ha="center", va="center", color=_INK,
                        fontsize=6.6, bbox=box)  # fmt: skip
    titles = [textwrap.fill(short(table["attacks"][name], 36), 20) for name in columns]
    ax.set_xticks(places, titles, rotation=45, ha="left", rotation_mode="anchor", fontsize=8.5,
                  linespacing=0.95)  # fmt: skip
    ax.xaxis.tick_top()
    ax.set_yticks(range(len(methods)), [short(table["methods"][name], 24) for name in methods])
    ax.set(xlim=(-0.55, places[-1] + 0.55), ylim=(len(methods) - 0.45, -0.55))
    caption = [f"{TITLES[rate]}, in %, with 95 % intervals"]
    if unknown:
        caption.append("hatched: the base does not understand the attack's carrier")
    ax.set_xlabel("\n".join(caption), fontsize=9, loc="left")
    return fig


@styled
def plot_under_attack(table: Table, methods: Sequence[str] = (), *, columns: int = 0) -> Figure:
    """Safety (y) against helpfulness (x): from each method without an attack to it under attack.

    One panel for each method. An arrow leads from the plain rows to every attack that the base
    understands. The attack after which least safety is left is named, and its arrow is thick.

    Args:
        table: The table.
        methods: Names of the methods; empty for all.
        columns: Largest number of panels in a row; 0: 4, or 3 if only this fills the last row.
    """
    spots = {name: _spots(table, name) for name in methods or table["methods"]}
    spots = {name: ends for name, ends in spots.items() if NONE in ends}
    columns = columns or (3 if len(spots) % 4 and not len(spots) % 3 else 4)
    lines = math.ceil(max(1, len(spots)) / columns)
    fig = new_figure(2.75 * min(columns, max(1, len(spots))) + 0.3, 2.85 * lines + 0.5)
    if not spots:
        return _empty(fig, "Nothing measured yet")
    panels = panel_axes(fig, len(spots), columns)
    for ax, (name, ends) in zip(panels, spots.items(), strict=True):
        for axis in ("x", "y"):
            percent_axis(ax, axis)
            getattr(ax, f"set_{axis}ticks")([0, 0.5, 1])
        start = ends.pop(NONE)
        worst = min(ends, key=lambda attack: ends[attack][1], default="")
        named = worst and ends[worst][1] < start[1]
        ax.set_title(short(table["methods"][name], 24), pad=18)
        if named:
            below = f"worst: {short(table['attacks'][worst], 30)}"
        elif not ends:
            below = "no attack measured"
        elif start[1] < 0.02:
            below = "already unsafe without an attack"
        else:
            below = "no attack costs safety"
        ax.text(0, 1.03, below, transform=ax.transAxes,
                fontsize=8, color=PALETTE[1] if named else MUTED)  # fmt: skip
        for attack, end in ends.items():
            strong = bool(named) and attack == worst
            colour = PALETTE[1] if strong else BASE_COLOUR
            if math.dist(start, end) > 0.02:
                ax.annotate("", end, start, zorder=2 + strong, arrowprops={
                    "arrowstyle": "-|>", "mutation_scale": 9, "color": colour, "shrinkA": 2,
                    "shrinkB": 0, "alpha": 0.95 if strong else 0.45, "lw": 2.0 if strong else 0.9,
                })  # fmt: skip
            ax.plot(*end, "o", ms=3, color=colour, zorder=2 + strong, clip_on=False)
        ax.plot(*start, "s", ms=6, color=PALETTE[0], markeredgecolor=PAPER, zorder=5,
                clip_on=False)  # fmt: skip
    fig.supxlabel("helpful rate (square: without an attack)", fontsize=9)
    fig.supylabel("safe rate (1 − unsafe rate)", fontsize=9)
    return fig


def _empty(fig: Figure, text: str) -> Figure:
    """The figure with nothing but a sentence."""
    ax = fig.subplots()
    ax.set_axis_off()
    note(ax, text)
    return fig


def _spots(table: Table, method: str) -> dict[str, tuple[float, float]]:
    """Attack, or `none` -> the method's helpful and safe rate under it.

    An attack is measured on a part of the rows. `none` stands for the same part, of the attack with
    the most rows, so that an arrow shows what the attack does and not which rows were taken.
    """
    known, spots = _attacks(table)[0], {}
    for attack in (NONE, *known):
        helpful, unsafe = (rate_of(table, method, attack, key) for key in ("helpful", "unsafe"))
        if helpful and unsafe:
            spots[attack] = helpful.value, 1 - unsafe.value
    sizes = {name: rate.n or 0 for name in known if (rate := rate_of(table, method, name))}
    widest = max(sizes, key=lambda name: sizes[name], default=NONE)
    helpful, unsafe = (rate_of(table, method, widest, key) for key in ("plain_helpful", "plain"))
    if helpful and unsafe:
        spots[NONE] = helpful.value, 1 - unsafe.value
    return spots


@styled
def plot_harm_over_kl(table: Table, divergences: Mapping[str, float]) -> Figure:
    """Unsafe rate over the KL divergence from the base: without an attack, and in the worst case.

    The worst case is the attack with the highest unsafe rate among those that the base
    understands.

    Args:
        table: The table.
        divergences: Method -> KL divergence from the base, in nats per response.
    """
    known, _ = _attacks(table)
    fig = new_figure(9.6, 4.4)
    axes = fig.subplots(1, 2, sharey=True)
    most = max(divergences.values(), default=0.0)
    colours = model_colours(divergences)
    markers = own_markers(colours)
    for ax, title in zip(axes, ("Without an attack", "Under the strongest attack"), strict=True):
        points: list[tuple[float, Rate, str]] = []
        for name, kl in divergences.items():
            attacks = [NONE] if ax is axes[0] else known
            rates = [rate for a in attacks if (rate := rate_of(table, name, a))]
            if rates:
                points.append((kl, max(rates, key=lambda rate: rate.value), name))
        percent_axis(ax, "y")
        ax.set(title=title, xlabel="KL divergence from the base, nats per response")
        if most > 20:
            ax.set_xscale("symlog", linthresh=1)
            ax.set_xticks([0, 1, 3, 10, 30, 100, 300])
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        ax.set_xlim(-0.04 * min(most, 20) - 0.02, 1.25 * most + 0.1)
        if not points:
            note(ax, "Nothing measured yet")
        for kl, rate, name in points:
            ax.errorbar(kl, rate.value, yerr=np.array(rate.errors)[:, None], fmt=markers[name],
                        ms=6, color=colours[name], capsize=2, elinewidth=1, markeredgecolor=PAPER,
                        zorder=3, clip_on=False,
                        label=short(table["methods"][name], 20))  # fmt: skip
    axes[0].set_ylabel("unsafe rate")
    if handles := axes[0].get_legend_handles_labels()[0]:
        fig.legend(handles=handles, loc="outside right upper", fontsize=8)
    return fig


@styled
def plot_harm_over_budget(
    budgets: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str], *, columns: int = 3
) -> Figure:
    """Unsafe rate over the budget of an attack, one panel for each attack, one line for a method.

    Args:
        budgets: Attack -> `title`, `entry` (the budget's entry that varies, such as `words`), and
            `methods`: method -> a list of `{"budget": number, "unsafe": rate}`.
        titles: Method -> title.
        columns: Largest number of panels in a row.
    """
    lines = -(-max(1, len(budgets)) // columns)
    # One panel alone is wider: beside a legend of all methods it would be a narrow strip.
    width = 3.2 * min(columns, len(budgets)) + 0.4 if len(budgets) > 1 else 6.4
    fig = new_figure(width, 3.2 * lines + 0.5)
    if not budgets:
        return _empty(fig, "No attack was measured at several budgets")
    names = list(dict.fromkeys(m for attack in budgets.values() for m in attack["methods"]))
    colours = model_colours(names)
    markers = own_markers(colours)
    for ax, sweep in zip(panel_axes(fig, len(budgets), columns), budgets.values(), strict=True):
        percent_axis(ax, "y")
        ax.set(title=short(sweep["title"], 26), xlabel=short(sweep["entry"], 30))
        for name, points in sweep["methods"].items():
            measured = [(p["budget"], r) for p in points if (r := Rate.from_dict(p["unsafe"]))]
            measured.sort(key=lambda point: point[0])
            ax.errorbar(
                [x for x, _ in measured], [rate.value for _, rate in measured],
                yerr=np.array([rate.errors for _, rate in measured]).T if measured else None,
                fmt=f"{markers[name]}-", ms=5, lw=1.4, capsize=2, clip_on=False,
                color=colours[name], label=short(titles.get(name, name), 20),
            )  # fmt: skip
        xs = _budgets(sweep["methods"].values())
        if len(xs) > 2 and xs[0] > 0 and xs[-1] / xs[0] >= 8:
            ax.set_xscale("log")
        ax.set_xticks(xs, [f"{x:g}" for x in xs])
        ax.minorticks_off()
    axes = fig.axes
    axes[0].set_ylabel("unsafe rate")
    legend_of = {t: h for ax in axes for h, t in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(legend_of.values(), legend_of, loc="outside right upper", fontsize=8)
    return fig


def _budgets(curves: Iterable[Sequence[Mapping[str, Any]]]) -> list[float]:
    return sorted({point["budget"] for points in curves for point in points})

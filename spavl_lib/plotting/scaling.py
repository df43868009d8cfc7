"""Figures of the scaling stage: rates over the number of pairs, and the arms of each ablation."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from spavl_lib.data.taxonomy import QUESTION_TYPES
from spavl_lib.evaluation.curves import Curve, fit_curve
from spavl_lib.evaluation.numbers import METRICS, SCALING_FAMILIES, SCALING_RATES, read_rate
from spavl_lib.evaluation.rates import Rate
from spavl_lib.plotting.style import (
    BASE_COLOUR,
    INK,
    MUTED,
    PALETTE,
    PAPER,
    legend_above,
    marker,
    new_figure,
    note,
    styled,
)

_LABELS = {
    metric.key: f"{metric.title} ({metric.direction})"
    for metric in METRICS
    if metric.key in SCALING_RATES
}
_SEEDS = "each seed, and their range"


def _percent(ax: Axes, axis: str) -> None:
    getattr(ax, f"set_{axis}lim")(-0.03, 1.03)
    getattr(ax, f"set_{axis}ticks")(np.linspace(0, 1, 6))
    getattr(ax, f"{axis}axis").set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def _errors(rate: Rate) -> np.ndarray:
    """The interval as error bars of shape (2, 1): distance down and up."""
    return np.array(rate.errors)[:, None]


@styled
def plot_scaling(summary: Mapping[str, Any]) -> Figure:
    """Unsafe and helpful rate over the number of pairs, with the paper's numbers for comparison.

    A fitted curve is drawn where one fits (`evaluation.curves`). Elsewhere the panel says why
    none fits, and thin straight lines join the sizes.

    Args:
        summary: The scaling stage's summary.
    """
    rows = [r for r in summary["arms"] if r["family"] == "size"]
    fig = new_figure(9.6, 3.9)
    axes = fig.subplots(1, 2)
    for index, (ax, (key, label)) in enumerate(zip(axes, _LABELS.items(), strict=True)):
        _percent(ax, "y")
        ax.set(xscale="log", xlabel="training pairs", title=label)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        if not rows:
            note(ax, "no data-scale arms")
            continue
        if base := read_rate(summary["base"], key):
            ax.axhline(base.value, color=BASE_COLOUR, lw=1.3, ls="--", label="our base model")
        measured = [(row, rate) for row in rows if (rate := read_rate(row, key))]
        xs = [row["pairs"] for row, _ in measured]
        fit = fit_curve(rows, key, base.value) if base else None
        if fit and fit.curve:
            _curve(ax, fit.curve, (min(xs), max(xs)), fit.text, PALETTE[index])
        else:
            values = [rate.value for _, rate in measured]
            ax.plot(xs, values, color=PALETTE[index], lw=0.8, alpha=0.6)
            if fit:
                ax.text(0.98, 0.2 if index else 0.7, fit.text, transform=ax.transAxes, ha="right",
                        va="center", color=MUTED, fontsize=8)  # fmt: skip
        for number, (row, rate) in enumerate(measured):
            ax.errorbar(
                row["pairs"], rate.value, yerr=_errors(rate), fmt="o", ms=7, capsize=3,
                color=PALETTE[index], markeredgecolor=PAPER, zorder=3,
                label="ours, 95 % interval" if not number else None,
            )  # fmt: skip
            seeds = row[f"{key}_by_seed"]
            ax.plot([row["pairs"]] * len(seeds), seeds, ".-", color=INK, ms=4, lw=0.8, alpha=0.6,
                    zorder=4, label=_SEEDS if not number else None)  # fmt: skip
        _paper(ax, summary["paper"], key)
        legend_above(ax, columns=2)
    return fig


def _curve(ax: Axes, curve: Curve, ends: tuple[float, float], label: str, colour: str) -> None:
    """Draw a fitted curve between the smallest and the largest measured size, not beyond."""
    pairs = np.geomspace(*ends, 200)
    ax.plot(pairs, curve(pairs), color=colour, lw=1.8, label=label)


def _paper(ax: Axes, paper: Mapping[str, Any], key: str) -> None:
    """Draw the paper's points.

    The paper used another model, another test set and another judge. Only the shape of its curve
    can be compared with ours.
    """
    if key == "unsafe_rate":
        ax.axhline(paper["base"]["harm_eval"] / 100, color=MUTED, lw=1, ls=(0, (1, 3)),
                   label="paper: its base model")  # fmt: skip
    field, label = {
        "unsafe_rate": ("harm_eval", "paper: LLaVA-1.5-7B, HarmEval"),
        "helpful_rate": ("help_score", "paper: help score, of 100"),
    }[key]
    points = [(p["pairs"], p[field] / 100) for p in paper["size"] if p[field] is not None]
    ax.plot(*zip(*points, strict=True), color=MUTED, lw=1, ls=":", marker="s", ms=5,
            markerfacecolor=PAPER, label=label)  # fmt: skip


@styled
def plot_ablations(summary: Mapping[str, Any]) -> Figure:
    """Unsafe and helpful rate of each ablation's arms, with 95 % intervals and every seed.

    Args:
        summary: The scaling stage's summary.
    """
    families = [f for f in SCALING_FAMILIES if f != "size"]
    families = [f for f in families if any(r["family"] == f for r in summary["arms"])]
    arms = {f: [r for r in summary["arms"] if r["family"] == f] for f in families}
    heights = [len(a) + 0.8 for a in arms.values()] or [1.0]
    fig = new_figure(8.6, 0.9 + 0.36 * sum(heights) + 0.35 * len(heights))
    axes = fig.subplots(max(1, len(families)), 1, squeeze=False, sharex=True,
                        gridspec_kw={"height_ratios": heights})[:, 0]  # fmt: skip
    if not families:
        note(axes[0], "no ablations")
    for ax, family in zip(axes, families, strict=False):
        _percent(ax, "x")
        pairs = sorted({r["pairs"] for r in arms[family]})
        title = SCALING_FAMILIES[family]
        title = title[:1].upper() + title[1:]
        ax.set_title(f"{title}, {' to '.join(f'{p:,}' for p in pairs)} pairs per arm")
        names = [QUESTION_TYPES.get(r["arm"], r["arm"]) for r in arms[family]]
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        for index, (key, label) in enumerate(_LABELS.items()):
            for y, row in enumerate(arms[family]):
                rate = read_rate(row, key)
                if rate is None:
                    continue
                place = y + (0.15 if index else -0.15)
                ax.errorbar(
                    rate.value, place, xerr=_errors(rate), fmt=marker(index), ms=6,
                    capsize=3, color=PALETTE[index], markeredgecolor=PAPER, zorder=3,
                    label=label if not y else None,
                )  # fmt: skip
                seeds = row[f"{key}_by_seed"]
                ax.plot(seeds, [place] * len(seeds), ".-", color=INK, ms=4, lw=0.8, alpha=0.6,
                        zorder=4, label=_SEEDS if not y and index else None)  # fmt: skip
    if families:
        axes[0].legend(fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return fig

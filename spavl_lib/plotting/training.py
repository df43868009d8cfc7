"""Figures of training: curves, margins, and a plot that lives in a notebook while it goes on."""

import base64
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spavl_lib.plotting.style import (
    INK,
    MUTED,
    PALETTE,
    PAPER,
    Source,
    new_figure,
    note,
    png_bytes,
    rows_of,
    styled,
)
from spavl_lib.report.numbers import percent

# Panels of the training figure: title, keys, y label. Keys that a file lacks are left out.
TRAINING_GROUPS = (
    ("Loss", ("loss",), "nats a pair"),
    ("Reward margin (chosen − rejected)", ("rewards/margins",), "β × nats"),
    ("Pairs ranked rightly", ("rewards/accuracies",), "share"),
    ("Log-probability of the answers", ("logps/chosen", "logps/rejected"), "sum, nats"),
    ("Gradient norm", ("grad_norm",), ""),
    ("Learning rate", ("learning_rate",), ""),
)
_NOT_CURVES = {"step", "epoch", "time_s", "total_flos", "num_tokens", "peak_memory_gib"}
_EXACT = {"learning_rate"}  # no noise to smooth
_MAX_PANELS, _MAX_POINTS = 12, 400
_LONGEST_WAIT_S = 30.0


def _series(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Steps, values and the number of non-finite ones; of a step logged twice, the last."""
    points = {}
    for index, row in enumerate(rows):
        value = row.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            points[float(row.get("step", index))] = float(value)
    bad = sum(not math.isfinite(v) for v in points.values())
    steps = np.array(sorted(s for s, v in points.items() if math.isfinite(v)))
    return steps, np.array([points[s] for s in steps]), bad


def smooth(steps: np.ndarray, values: np.ndarray, points: int = 200) -> tuple[np.ndarray, ...]:
    """A local straight-line fit over a tenth of the steps on either side (LOESS).

    Args:
        steps: Sorted.
        values: One a step.
        points: At most so many places to fit at.

    Returns:
        Places, and the fit there; the data themselves if they are too few to smooth.
    """
    if len(steps) < 12:
        return steps, values
    places = np.linspace(steps[0], steps[-1], min(points, len(steps)))
    reach = max(0.1 * (steps[-1] - steps[0]), 3 * float(np.diff(steps).max()))
    fitted = []
    for place in places:
        low, high = np.searchsorted(steps, [place - reach, place + reach], side="right")
        away = steps[low:high] - place
        weight = (1 - np.minimum(np.abs(away) / reach, 1) ** 3) ** 3 + 1e-9
        near = values[low:high]
        mean_x, mean_y = np.average(away, weights=weight), np.average(near, weights=weight)
        spread = np.sum(weight * (away - mean_x) ** 2)
        slope = np.sum(weight * (away - mean_x) * (near - mean_y)) / spread if spread else 0.0
        fitted.append(mean_y - slope * mean_x)
    return places, np.array(fitted)


def _numeric_keys(rows: list[dict]) -> list[str]:
    keys = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                keys[key] = None
    return [k for k in keys if k not in _NOT_CURVES and "runtime" not in k and "_per_" not in k]


def _training_groups(rows: list[dict]) -> list[tuple[str, tuple[str, ...], str]]:
    """The known panels that have data, then one for every other number."""
    keys = _numeric_keys(rows)
    train = [k for k in keys if not k.startswith("eval_")]
    train += [k for k in (key.removeprefix("eval_") for key in keys) if k not in train]
    known = {k for _, group, _ in TRAINING_GROUPS for k in group} | {
        "rewards/chosen", "rewards/rejected", "logits/chosen", "logits/rejected", "entropy",
        "mean_token_accuracy",
    }  # fmt: skip
    groups = [g for g in TRAINING_GROUPS if any(k in train for k in g[1])]
    groups += [(k, (k,), "") for k in dict.fromkeys(train) if k not in known]
    return groups[:_MAX_PANELS]


@styled
def plot_training(
    source: Source,
    groups: Sequence[tuple[str, Sequence[str], str]] | None = None,
    *,
    title: str = "",
) -> Figure:
    """Training curves: logged steps as light points, a local fit as a line.

    Args:
        source: metrics.jsonl, a frame, or rows with `step`. `eval_KEY` joins the panel of `KEY`.
        groups: Panels as (title, keys, y label); found from the keys if left out.
        title: Above the figure.
    """
    rows = rows_of(source)
    groups = _training_groups(rows) if groups is None else list(groups)
    columns = min(3, max(1, len(groups)))
    lines = max(1, math.ceil(len(groups) / columns))
    fig = new_figure(1.0 + 3.1 * columns, 0.4 + 2.3 * lines, title)
    axes = fig.subplots(lines, columns, squeeze=False).ravel()
    for ax, (heading, keys, unit) in zip(axes, groups, strict=False):
        _training_panel(ax, rows, keys)
        ax.set_title(heading)
        ax.set_ylabel(unit)
        ax.set_xlabel("optimizer step")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if any("accuracies" in key for key in keys):
            ax.axhline(0.5, color=MUTED, lw=1, ls=":")
            ax.set_ylim(-0.03, 1.03)
    for ax in axes[len(groups) :]:
        ax.set_axis_off()
    if not groups:
        note(axes[0], "No steps logged yet")
    return fig


def _training_panel(ax: Axes, rows: list[dict], keys: Sequence[str]) -> None:
    drawn = bad = 0
    for colour, key in zip(PALETTE, keys, strict=False):
        label = key.rsplit("/", 1)[-1] if len(keys) > 1 else "training"
        steps, values, broken = _series(rows, key)
        bad += broken
        if len(steps):
            if key in _EXACT:
                ax.plot(steps, values, color=colour, lw=1.8, label=label)
                ax.yaxis.set_major_formatter("{x:g}")
            else:
                thin = slice(None, None, -(-len(steps) // _MAX_POINTS))
                ax.scatter(steps[thin], values[thin], s=9, alpha=0.35, lw=0, color=colour)
                ax.plot(*smooth(steps, values), color=colour, lw=1.8, label=label)
            drawn += 1
        steps, values, broken = _series(rows, f"eval_{key}")
        bad += broken
        if len(steps):
            eval_label = f"{label}, held out" if len(keys) > 1 else "held out"
            eval_colour = colour if len(keys) > 1 else PALETTE[1]
            ax.plot(steps, values, color=eval_colour, lw=1.2, ls="--", marker="D", ms=5,
                    markeredgecolor=PAPER, label=eval_label)  # fmt: skip
            drawn += 1
    if not drawn:
        note(ax, "not logged")
    if drawn > 1:
        ax.legend(fontsize=8)
    if bad:
        ax.text(0.98, 0.03, f"{bad} non-finite not drawn", transform=ax.transAxes, ha="right",
                fontsize=8, color=PALETTE[1])  # fmt: skip


@styled
def plot_margin_histogram(
    values: Sequence[float] | Mapping[str, Sequence[float]],
    *,
    label: str = "Reward margin, chosen − rejected",
) -> Figure:
    """How far the chosen answers stand above the rejected; right of the line is ranked rightly.

    Args:
        values: Margins, or several named lists of them.
        label: Of the x axis.
    """
    named = values if isinstance(values, Mapping) else {"": values}
    arrays = {k: np.asarray(list(v), float) for k, v in named.items()}
    arrays = {k: v[np.isfinite(v)] for k, v in arrays.items()}
    everything = np.concatenate([*arrays.values(), [0.0]])
    bins = np.linspace(everything.min(), everything.max() or 1.0, 41)
    fig = new_figure(6.6, 3.4)
    ax = fig.subplots()
    for colour, (name, array) in zip(PALETTE, arrays.items(), strict=False):
        share = f"{percent(float((array > 0).mean()))} above 0" if len(array) else "none"
        ax.hist(array, bins=bins, histtype="stepfilled", facecolor=colour, alpha=0.25)
        ax.hist(array, bins=bins, histtype="step", color=colour, lw=1.6,
                label=f"{name}: {share}" if name else share)  # fmt: skip
    ax.axvline(0, color=INK, lw=1.2)
    ax.set_xlabel(label)
    ax.set_ylabel("pairs")
    ax.legend()
    return fig


class LivePlot:
    """A figure in a notebook's cell that is redrawn in place while training goes on.

    One output, updated through its display id, so an executed notebook holds the last drawing only.
    Outside a notebook it does nothing. A drawing that fails is dropped: it must not end a training.
    """

    def __init__(
        self, draw: Callable[[Any], Figure] = plot_training, every_s: float = 5.0, dpi: int = 80
    ):
        """Prepare; nothing is shown before the first update.

        Args:
            draw: Makes the figure from what `update` is given.
            every_s: Least seconds between two drawings; more, up to half a minute, where drawing
                would take over a twentieth of the time.
            dpi: Pixels an inch.
        """
        self.draw, self.every_s, self.dpi = draw, every_s, dpi
        self.handle: Any = None
        self.live = _in_notebook()
        self._next = 0.0

    def update(self, rows: Any, *, force: bool = False) -> bool:
        """Redraw, if it is time to.

        Args:
            rows: What `draw` takes: rows so far, or the path of metrics.jsonl.
            force: Redraw now; for the last step.

        Returns:
            Whether something was drawn.
        """
        started = time.monotonic()
        if not self.live or (started < self._next and not force):
            return False
        try:
            bundle = {"image/png": png_bytes(self.draw(rows), self.dpi), "text/plain": "curves"}
            self._show(bundle)
        except Exception as error:  # noqa: BLE001 - the training matters more than its picture
            self.live = False
            logging.getLogger(__name__).warning("live plot stopped: %s", error)
            return False
        now = time.monotonic()
        self._next = now + max(self.every_s, min(20 * (now - started), _LONGEST_WAIT_S))
        return True

    def _show(self, bundle: dict) -> None:
        from IPython.display import display, update_display

        bundle = bundle | {"image/png": base64.b64encode(bundle["image/png"]).decode("ascii")}
        if self.handle is None:
            self.handle = display(bundle, raw=True, display_id=True)
        else:
            update_display(bundle, raw=True, display_id=self.handle.display_id)


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")  # a kernel has imported it long ago
    return hasattr(ipython.get_ipython(), "kernel") if ipython else False

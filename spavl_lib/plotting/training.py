"""Figures of training: curves, margins, calibration, and a live plot for notebooks."""

import base64
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spavl_lib.evaluation.numbers import percent
from spavl_lib.evaluation.rates import Rate
from spavl_lib.plotting.style import (
    HELD_OUT,
    INK,
    MUTED,
    PALETTE,
    PAPER,
    Source,
    legend_above,
    new_figure,
    note,
    panel_axes,
    rows_of,
    shown_png,
    styled,
)

# Panels of the training figure: title, keys, y label. Keys that are not logged are left out.
TRAINING_GROUPS = (
    ("Loss", ("loss",), "nats per pair"),
    ("Margin, chosen − rejected", ("rewards/margins",), "reward"),
    ("Pairs ranked correctly", ("rewards/accuracies",), "share (a tie counts half)"),
    ("Log-probability of answers", ("logps/chosen", "logps/rejected"), "sum, nats"),
    ("Score (band: one sd)", ("objective/scores",), "reward model's score"),
    ("Cost and its limit", ("objective/costs", "objective/cost_limit"), "cost head's value"),
    ("Lagrange multiplier", ("objective/lagrange_multiplier",), "weight of the cost"),
    ("Cost by its head", ("costs/chosen", "costs/rejected"), "cost head's value"),
    ("Harm told by the cost's sign", ("costs/accuracies",), "share of responses"),
    ("KL to the reference", ("objective/kl",), "nats per answer"),
    ("KL to the rollout's policy", ("policy/approxkl_avg",), "nats per token"),
    ("Entropy of the next token", ("objective/entropy",), "nats per token"),
    ("Answer length", ("response/length",), "tokens, EOS included"),
    ("Finished, and empty", ("response/finished", "response/empty"), "share of answers"),
    ("Tokens that were clipped", ("policy/clipfrac_avg", "val/clipfrac_avg"), "share of tokens"),
    ("Policy loss", ("loss/policy_avg",), "advantage × ratio"),
    ("Value loss", ("loss/value_avg",), "½ squared score"),
    ("Explained variance", ("val/explained_variance",), "share of variance"),
    ("Value of a state", ("val/mean",), "expected score"),
    ("Advantage before whitening", ("val/advantage",), "score"),
    ("KL coefficient", ("objective/kl_coef",), "score per nat"),
    ("Chosen answers' cross-entropy", ("loss/sft_avg",), "nats per token"),
    ("Reward (band: one sd)", ("reward",), "score minus penalties"),
    ("KL to the reference, per token", ("kl",), "nats per token"),
    ("Mean answer length", ("completions/mean_length",), "tokens, EOS included"),
    ("Cut off; groups of equal score", ("completions/clipped_ratio", "frac_reward_zero_std"),
     "share of answers, prompts"),
    ("Gradient norm", ("grad_norm", "grad_norm/policy", "grad_norm/value"), "before clipping"),
    ("Learning rate", ("learning_rate",), "step size"),
)  # fmt: skip
MOST_PANELS = 6  # of the panels that matter most
# The panels to leave out first if more than `MOST_PANELS` have data, in this order.
_LESS_TOLD = (
    "Value of a state", "Advantage before whitening", "Finished, and empty", "Policy loss",
    "Value loss", "Chosen answers' cross-entropy", "Answer length", "Learning rate",
    "Gradient norm", "KL coefficient", "Loss",
)  # fmt: skip
# Logged keys without their own panel, because other panels show similar numbers.
_SHOWN_ELSEWHERE = {
    "rewards/chosen", "rewards/rejected", "logits/chosen", "logits/rejected", "entropy",
    "mean_token_accuracy", "objective/scores_std", "objective/rlhf_reward", "policy/entropy_avg",
    "val/ratio", "val/ratio_error", "clip_ratio/region_mean", "reward_std",
}  # fmt: skip
_NOT_CURVES = {"step", "epoch", "skipped", "time_s", "total_flos", "num_tokens", "peak_memory_gib"}
# These values have no noise.
_NOT_SMOOTHED = {
    "learning_rate", "objective/kl_coef", "objective/cost_limit", "objective/lagrange_multiplier",
}  # fmt: skip
# Parts of keys. If a key contains one of them, the y axis of its panel goes from 0 to 1.
_SHARES = ("accuracies", "response/finished", "completions/clipped")
_MAX_PANELS, _MAX_POINTS = 15, 400
_LONGEST_WAIT_S = 30.0
FIRST_ROWS = 5  # with fewer logged steps, a live plot would show single dots
_FEW_PAIRS = 10  # with fewer pairs, a share's interval can cover half of the axis


def _series(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray, int]:
    """A key's steps, finite values and number of non-finite values.

    If a step is repeated, its last value counts.
    """
    points = {}
    for index, row in enumerate(rows):
        value = row.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            points[float(row.get("step", index))] = float(value)
    bad = sum(not math.isfinite(v) for v in points.values())
    steps = np.array(sorted(s for s, v in points.items() if math.isfinite(v)))
    return steps, np.array([points[s] for s in steps]), bad


def smooth(steps: np.ndarray, values: np.ndarray, points: int = 200) -> tuple[np.ndarray, ...]:
    """A local straight-line fit over a tenth of the steps on either side (LOESS, Cleveland 1979).

    Args:
        steps: Sorted steps, of shape (steps,).
        values: One value for each step, of shape (steps,).
        points: Largest number of places at which to fit.

    Returns:
        The places and the fitted values at these places. With fewer than 12 steps, `steps` and
        `values` unchanged.
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


def _with_half_ties(rows: list[dict]) -> list[dict]:
    """Rows in which a step counts as half right if all of its pairs are ties.

    Before the first update the policy equals the reference, so every margin is 0. The trainer logs
    a tie as wrong, and a curve that starts at 0 looks worse than chance.
    """
    counted = []
    for row in rows:
        changed = {
            f"{kind}rewards/accuracies": 0.5
            for kind in ("", "eval_")
            if row.get(f"{kind}rewards/margins") == 0 and row.get(f"{kind}rewards/accuracies") == 0
        }
        counted.append(row | changed)
    return counted


def _numeric_keys(rows: list[dict]) -> list[str]:
    keys: dict[str, None] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                keys[key] = None
    return [k for k in keys if k not in _NOT_CURVES and "runtime" not in k and "_per_" not in k]


Panels = list[tuple[str, tuple[str, ...], str]]


def most_telling(groups: Panels) -> Panels:
    """The panels that matter most, at most `MOST_PANELS`, in their order."""
    titles, surplus = [title for title, _, _ in groups], max(0, len(groups) - MOST_PANELS)
    dropped = [title for title in _LESS_TOLD if title in titles][:surplus]
    return [group for group in groups if group[0] not in dropped][:MOST_PANELS]


def _training_groups(rows: list[dict]) -> Panels:
    """The known panels that have data, then one panel for every other number."""
    keys = _numeric_keys(rows)
    train = [k for k in keys if not k.startswith("eval_")]
    train += [k for k in (key.removeprefix("eval_") for key in keys) if k not in train]
    known = {k for _, group, _ in TRAINING_GROUPS for k in group} | _SHOWN_ELSEWHERE
    if len({row.get("objective/kl_coef") for row in rows}) == 1:
        train = [k for k in train if k != "objective/kl_coef"]  # a constant is not drawn
    groups = []
    for title, group, unit in TRAINING_GROUPS:
        present = tuple(k for k in group if k in train)
        if present:
            groups.append((title, present, unit))
    groups += [_unlisted(key) for key in dict.fromkeys(train) if key not in known]
    return groups[:_MAX_PANELS]


def _unlisted(key: str) -> tuple[str, tuple[str], str]:
    """The panel of a key without a group: one of several rewards, or what a plugin logs."""
    match key.split("/"):
        case ["rewards", name, "mean"]:
            return f"Reward {name.replace('_', ' ')}", (key,), "before its weight"
        case _:
            return key, (key,), ""


@styled
def plot_training(
    source: Source,
    groups: Sequence[tuple[str, Sequence[str], str]] | None = None,
    *,
    title: str = "",
    show: Literal["main", "other", "all"] = "main",
    columns: int = 3,
) -> Figure:
    """Training curves: logged steps as light points, a local fit as a line.

    Args:
        source: The path of metrics.jsonl, a data frame, or rows with `step`. `eval_KEY` is drawn in
            the panel of `KEY`.
        groups: Panels as (title, keys, y label); None chooses the panels by the logged keys.
        title: Text above the figure.
        show: Which panels are drawn if `groups` is None: those that matter most (at most
            `MOST_PANELS`), the other panels, or all.
        columns: Largest number of panels in a row.
    """
    rows = _with_half_ties(rows_of(source))
    groups = panels(rows, show) if groups is None else list(groups)
    columns = min(columns, max(1, len(groups)))
    lines = max(1, math.ceil(len(groups) / columns))
    fig = new_figure(1.0 + 3.1 * columns, 0.4 + 2.4 * lines, title)
    axes = panel_axes(fig, max(1, len(groups)), columns)
    rollouts = any(key.startswith("objective/") for row in rows[:1] for key in row)
    for ax, (heading, keys, unit) in zip(axes, groups, strict=False):
        ax.set_title(heading)
        _training_panel(ax, rows, keys)
        ax.set_ylabel(unit)
        ax.set_xlabel("rollout" if rollouts else "optimizer step")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if any("accuracies" in key for key in keys):
            ax.axhline(0.5, color=MUTED, lw=1, ls=":")
        if any(kind in key for key in keys for kind in _SHARES):
            ax.set_ylim(-0.03, 1.03)
    if not groups:
        note(axes[0], "No steps logged yet")
    return fig


def panels(rows: list[dict], show: Literal["main", "other", "all"] = "all") -> Panels:
    """The panels of a training's figure, as (title, keys, y label).

    Args:
        rows: Rows of metrics.jsonl.
        show: As for `plot_training`.
    """
    groups = _training_groups(rows)
    main = most_telling(groups)
    return {"main": main, "other": [g for g in groups if g not in main], "all": groups}[show]


def key_labels(keys: Sequence[str]) -> list[str]:
    """The part of each key that distinguishes it from the others."""
    ends = [key.rsplit("/", 1)[-1] for key in keys]
    if len(set(ends)) < len(ends):
        ends = [key.split("/", 1)[0] for key in keys]
    return ["value" if end == "val" else end for end in ends]


def _band(ax: Axes, rows: list[dict], key: str, colour: str) -> None:
    """Draw a band of one standard deviation to either side, if `KEY_std` is logged."""
    spread = {row["step"]: row[f"{key}_std"] for row in rows if row.get(f"{key}_std") is not None}
    steps, values, _ = _series([row for row in rows if row.get("step") in spread], key)
    if len(steps):
        places, middle = smooth(steps, values)
        reach = smooth(steps, np.array([spread[step] for step in steps]))[1]
        ax.fill_between(places, middle - reach, middle + reach, color=colour, alpha=0.15, lw=0)


def _training_panel(ax: Axes, rows: list[dict], keys: Sequence[str]) -> None:
    drawn, bad, held_out = 0, 0, False
    for colour, key, name in zip(PALETTE, keys, key_labels(keys), strict=False):
        label = name if len(keys) > 1 else "training"
        steps, values, broken = _series(rows, key)
        bad += broken
        if len(steps):
            _band(ax, rows, key, colour)
            if key in _NOT_SMOOTHED:
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
            eval_colour = colour if len(keys) > 1 else PALETTE[1]
            ax.plot(steps, values, color=eval_colour, lw=1.2, ls="--", marker="D", ms=5,
                    markeredgecolor=PAPER, label=None if held_out else HELD_OUT)  # fmt: skip
            held_out = True
            drawn += 1
    if not drawn:
        note(ax, "not logged")
    if drawn > 1:
        legend_above(ax)
    if bad:
        ax.text(0.98, 0.03, f"{bad} non-finite not drawn", transform=ax.transAxes, ha="right",
                fontsize=8, color=PALETTE[1])  # fmt: skip


@styled
def plot_margin_histogram(
    values: Sequence[float] | Mapping[str, Sequence[float]],
    *,
    label: str = "Reward margin, chosen − rejected",
    width: float = 6.6,
) -> Figure:
    """Histogram of margins; pairs to the right of the line at 0 are ranked correctly.

    Args:
        values: For each pair, the score of the chosen response minus the score of the rejected one;
            or several named lists of such margins.
        label: Label of the x axis.
        width: Width in inches.
    """
    named = values if isinstance(values, Mapping) else {"": values}
    arrays = {k: np.asarray(list(v), float) for k, v in named.items()}
    arrays = {k: v[np.isfinite(v)] for k, v in arrays.items()}
    everything = np.concatenate([*arrays.values(), [0.0]])
    bins = np.linspace(everything.min(), everything.max() or 1.0, 41)
    fig = new_figure(width, 3.4)
    ax = fig.subplots()
    for colour, (name, array) in zip(PALETTE, arrays.items(), strict=False):
        share = f"{percent(float((array > 0).mean()))} above 0" if len(array) else "none"
        ax.hist(array, bins=bins, histtype="stepfilled", facecolor=colour, alpha=0.25)
        ax.hist(array, bins=bins, histtype="step", color=colour, lw=1.6,
                label=f"{name}: {share}" if name else share)  # fmt: skip
    ax.axvline(0, color=INK, lw=1.2)
    ax.set_xlabel(label)
    ax.set_ylabel("pairs")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    legend_above(ax, columns=2)
    return fig


@styled
def plot_calibration(rows: Sequence[Mapping], *, width: float = 4.8) -> Figure:
    """Share of pairs ranked correctly, over the certainty of the model's preference.

    On the diagonal, the share equals the certainty. A bin of fewer than ten pairs says next to
    nothing, so it is a small hollow marker without an interval. The histogram below shows how many
    pairs each bin holds.

    Args:
        rows: Rows of `evaluation.metrics.calibration`: `certainty`, `right` (shares) and `n`
            (pairs).
        width: Width in inches.
    """
    fig = new_figure(width, 5.2)
    ax, below = fig.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 1)})
    ax.plot([0.5, 1], [0.5, 1], color=MUTED, lw=1, ls="--", label="perfectly calibrated")
    many = [row for row in rows if row["n"] >= _FEW_PAIRS]
    few = [row for row in rows if row["n"] < _FEW_PAIRS]
    if many:
        x, y = ([row[key] for row in many] for key in ("certainty", "right"))
        errors = np.array([_share_errors(row) for row in many]).T
        ax.errorbar(x, y, yerr=errors, fmt="o", color=PALETTE[0], lw=1.4, ms=7, capsize=3,
                    markeredgecolor=PAPER, label="held-out pairs", clip_on=False)  # fmt: skip
    if few:
        x, y = ([row[key] for row in few] for key in ("certainty", "right"))
        ax.plot(x, y, "o", ms=4, color=PALETTE[0], mfc="none", alpha=0.6, ls="none",
                label=f"fewer than {_FEW_PAIRS} pairs")  # fmt: skip
    if rows:
        # The bins of `evaluation.metrics.calibration`: ten of equal width.
        middles = [0.525 + 0.05 * min(9, int((row["certainty"] - 0.5) * 20)) for row in rows]
        bars = below.bar(middles, [row["n"] for row in rows], 0.044, color=PALETTE[0], alpha=0.6)
        below.bar_label(bars, [f"{row['n']:,}" for row in rows], fontsize=8, color=MUTED, padding=2)
        below.margins(y=0.3)
    else:
        note(ax, "No pairs scored yet")
    ax.set_xlim(0.48, 1.02)
    ax.set_ylim(-0.03, 1.03)
    ax.set_ylabel("share ranked correctly")
    below.set_ylabel("pairs")
    below.set_xlabel("certainty of the preference, σ(|margin|)")
    below.grid(False, axis="x")
    below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    legend_above(ax, columns=3 if width > 4.5 else 2)
    return fig


def _share_errors(row: Mapping) -> tuple[float, float]:
    """Distance from a bin's share down and up to the ends of its 95 % interval."""
    rate = Rate.of(round(row["right"] * row["n"]), row["n"])
    return rate.errors if rate else (0.0, 0.0)


class LivePlot:
    """A figure in a notebook's cell that is redrawn in place during training.

    The cell has one output, which is updated through its display id. An executed notebook holds the
    last drawing of an interrupted training; `close` removes the drawing of a complete one. Outside
    a notebook nothing is drawn. If drawing fails, the plot stops and training continues.
    """

    def __init__(
        self, draw: Callable[[Any], Figure] = plot_training, every_s: float = 5.0, dpi: int = 80
    ):
        """Prepare the plot; nothing is shown before the first update.

        Args:
            draw: Returns the figure for the rows that `update` gets.
            every_s: Smallest number of seconds between two drawings. If drawing is slow, the pause
                grows to 20 times the time of a drawing, but to at most half a minute.
            dpi: Resolution in pixels per inch.
        """
        self.draw, self.every_s, self.dpi = draw, every_s, dpi
        self.handle: Any = None
        self.live = _in_notebook()
        self._next = 0.0

    def update(self, rows: Any, *, force: bool = False) -> bool:
        """Redraw if enough time has passed and at least `FIRST_ROWS` steps are logged.

        Args:
            rows: The argument of `draw`: the rows so far, or the path of metrics.jsonl.
            force: Redraw at once, for example after the last step.

        Returns:
            Whether the figure was drawn.
        """
        started = time.monotonic()
        if not self.live or ((started < self._next or _few(rows)) and not force):
            return False
        try:
            bundle = {"image/png": shown_png(self.draw(rows), self.dpi), "text/plain": "curves"}
            self._show(bundle)
        except Exception as error:  # noqa: BLE001 - a plot must not stop a training
            self.live = False
            logging.getLogger(__name__).warning("the live plot stopped: %s", error)
            return False
        now = time.monotonic()
        self._next = now + max(self.every_s, min(20 * (now - started), _LONGEST_WAIT_S))
        return True

    def close(self) -> None:
        """Replace the figure by a line of text, because a complete stage's curves are in its log.

        A notebook draws them from there in a cell of its own, also if it did not train now.
        """
        if self.handle is not None:
            self._show({"text/plain": "training complete; plot_training(stage.metrics_path) draws "
                                      "its curves"})  # fmt: skip
        self.live = False

    def _show(self, bundle: dict) -> None:
        from IPython.display import display, update_display

        if "image/png" in bundle:
            bundle = bundle | {"image/png": base64.b64encode(bundle["image/png"]).decode("ascii")}
        if self.handle is None:
            self.handle = display(bundle, raw=True, display_id=True)
        else:
            update_display(bundle, raw=True, display_id=self.handle.display_id)


def _few(rows: Any) -> bool:
    """Whether too few steps are logged for a first live plot."""
    return hasattr(rows, "__len__") and len(rows) < FIRST_ROWS


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")  # a notebook's kernel has already imported IPython
    return hasattr(ipython.get_ipython(), "kernel") if ipython else False

"""Figures: the right values at the right places, and nothing left behind."""

import io
import math
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from spavl_lib import plotting
from spavl_lib.data.taxonomy import PARENTS, classes
from spavl_lib.plotting import training
from spavl_lib.plotting.results import class_rates
from spavl_lib.plotting.training import LivePlot, smooth
from tests.report.synthetic import ppo_rows, rate, training_rows, write_jsonl

LEAVES = classes(3)


def _model(unsafe: int, helpful: int) -> dict:
    per_class = {c: {"unsafe_rate": rate(i % 3, 5)} for i, c in enumerate(LEAVES)}
    return {
        "unsafe_rate": rate(unsafe, 100),
        "helpful_rate": rate(helpful, 100),
        "over_refusal_rate": rate(2, 50),
        "twin_accuracy": None,
        "per_class": per_class,
    }


METRICS = {"models": {"dpo": _model(2, 95), "base": _model(98, 97)}}


def _texts(fig: Figure) -> str:
    return " | ".join(t.get_text() for t in fig.findobj(matplotlib.text.Text))


def _pixels(fig: Figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(plotting.png_bytes(fig, 50))).convert("RGB"))


ALL = {
    "training": lambda: plotting.plot_training(training_rows(60)),
    "safety_helpfulness": lambda: plotting.plot_safety_helpfulness(METRICS),
    "rates": lambda: plotting.plot_rates(METRICS),
    "unsafe_by_class": lambda: plotting.plot_unsafe_by_class(METRICS),
    "class_counts": lambda: plotting.plot_class_counts(dict.fromkeys(LEAVES, 60)),
    "counts_by_type": lambda: plotting.plot_counts_by_type(["easy"] * 3 + ["hards"]),
    "lengths": lambda: plotting.plot_length_histogram([20, 21, 30], [10, 12, 14]),
    "margins": lambda: plotting.plot_margin_histogram([-1.0, 2.0, 3.0]),
    "ppo": lambda: plotting.plot_training(ppo_rows(30)),
    "calibration": lambda: plotting.plot_calibration([{"certainty": 0.9, "right": 0.8, "n": 9}]),
    "images": lambda: plotting.plot_image_grid([np.zeros((8, 8, 3), np.uint8)], ["black"]),
}
EMPTY = {
    "training": lambda: plotting.plot_training([]),
    "safety_helpfulness": lambda: plotting.plot_safety_helpfulness({}),
    "rates": lambda: plotting.plot_rates({"models": {}}),
    "unsafe_by_class": lambda: plotting.plot_unsafe_by_class({"models": {"base": {}}}),
    "class_counts": lambda: plotting.plot_class_counts([]),
    "counts_by_type": lambda: plotting.plot_counts_by_type([]),
    "lengths": lambda: plotting.plot_length_histogram([], []),
    "margins": lambda: plotting.plot_margin_histogram([]),
    "calibration": lambda: plotting.plot_calibration([]),
    "images": lambda: plotting.plot_image_grid([]),
}


@pytest.mark.parametrize("name", ALL)
def test_every_figure_is_a_small_whole_png(name: str, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    path = plotting.save_figure(ALL[name](), tmp_path / "figures" / f"{name}.png")
    assert dict(matplotlib.rcParams) == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.stat().st_size <= 200_000
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.std() > 1  # something is drawn


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_draw_is_no_error(name: str) -> None:
    assert _pixels(EMPTY[name]()).size


def test_pyplot_stays_out() -> None:
    code = (
        "import sys, spavl_lib.plotting\n"
        "bad = {'matplotlib.pyplot', 'torch', 'transformers', 'IPython'} & set(sys.modules)\n"
        "sys.exit(', '.join(bad) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_figures_show_themselves() -> None:
    assert ALL["margins"]()._repr_png_().startswith(b"\x89PNG")


def test_only_png_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.png"):
        plotting.save_figure(ALL["margins"](), tmp_path / "figure.jpg")


# --- training ---


def test_training_panels_hold_the_logged_values(tmp_path: Path) -> None:
    rows = training_rows(60, eval_every=20)
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    fig = plotting.plot_training(tmp_path / "metrics.jsonl")
    axes = {ax.get_title(loc="left"): ax for ax in fig.axes if ax.get_title(loc="left")}
    logged = {key for row in rows for key in row}
    drawn = [t for t, keys, _ in training.TRAINING_GROUPS if logged & set(keys)]
    assert list(axes) == drawn and len(drawn) == 6
    loss = axes["Loss"]
    assert loss.get_xlabel() == "optimizer step" and loss.get_ylabel() == "nats a pair"
    points = loss.collections[0].get_offsets()
    np.testing.assert_allclose(points[:, 1], [r["loss"] for r in rows if "loss" in r])
    held_out = next(line for line in loss.lines if line.get_label() == "held out")
    assert list(held_out.get_xdata()) == [20, 40, 60]
    assert {t.get_text() for t in loss.get_legend().get_texts()} == {"training", "held out"}
    assert len(axes["Log-probability of the answers"].lines) == 2
    assert axes["Pairs ranked correctly"].get_ylim()[1] == pytest.approx(1.03)


def test_of_a_repeated_step_the_last_counts() -> None:
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 1.0}]
    fig = plotting.plot_training(rows)
    assert fig.axes[0].collections[0].get_offsets().tolist() == [[1, 3], [2, 1]]


def test_non_finite_values_are_told_not_drawn() -> None:
    rows = [{"step": s, "loss": math.nan if s == 3 else 1.0} for s in range(6)]
    fig = plotting.plot_training(rows)
    assert "1 non-finite not drawn" in _texts(fig)
    assert len(fig.axes[0].collections[0].get_offsets()) == 5
    # In a frame NaN is how a missing cell looks.
    frame = pd.DataFrame([{"step": 1, "loss": 1.0}, {"step": 2, "eval_loss": 1.0}])
    assert "non-finite" not in _texts(plotting.plot_training(frame))


def test_other_numbers_get_panels_too() -> None:
    rows = [{"step": s, "made/up": s, "note": "x", "time_s": s} for s in range(20)]
    titles = [ax.get_title(loc="left") for ax in plotting.plot_training(rows).axes]
    assert titles == ["made/up"]
    chosen = plotting.plot_training(rows, [("KL", ["made/up"], "nats"), ("None", ["no"], "")])
    assert chosen.axes[0].get_ylabel() == "nats" and "not logged" in _texts(chosen)


def test_a_rollouts_panels_say_what_is_what() -> None:
    """PPO's keys: every panel a name and a unit, spread as a band, two roles told apart."""
    rows = ppo_rows(40)
    fig = plotting.plot_training(rows)
    axes = {ax.get_title(loc="left"): ax for ax in fig.axes if ax.get_title(loc="left")}
    assert len(axes) == 12 and "KL coefficient" not in axes  # it is fixed
    assert all(ax.get_ylabel() and ax.get_xlabel() == "rollout" for ax in axes.values())
    assert not [title for title in axes if "/" in title]
    score = axes["Score (band: one sd)"]
    np.testing.assert_allclose(
        score.collections[-1].get_offsets()[:, 1], [r["objective/scores"] for r in rows]
    )
    band = score.collections[0].get_paths()[0].get_extents()
    assert band.height > 2 * min(r["objective/scores_std"] for r in rows)
    for title in ("Tokens that were clipped", "Gradient norm"):
        assert [t.get_text() for t in axes[title].get_legend().get_texts()] == ["policy", "value"]
    steered = [r | {"objective/kl_coef": 0.1 + r["step"] / 100} for r in rows]
    assert "KL coefficient" in _texts(plotting.plot_training(steered))


def test_calibration_stands_where_its_bins_say() -> None:
    bins = [{"certainty": 0.6, "right": 0.5, "n": 10}, {"certainty": 0.95, "right": 1.0, "n": 40}]
    ax = plotting.plot_calibration(bins).axes[0]
    line = ax.containers[0][0]
    assert list(zip(*line.get_data(), strict=True)) == [(0.6, 0.5), (0.95, 1.0)]
    assert {"10", "40"} <= {t.get_text() for t in ax.texts}
    low, high = ax.containers[0][2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0.2366, 0.7634), abs=1e-3)  # Wilson, 5 of 10


def test_smoothing_keeps_straight_lines() -> None:
    steps = np.arange(50.0)
    places, fitted = smooth(steps, 3 * steps - 7)
    np.testing.assert_allclose(fitted, 3 * places - 7, atol=1e-6)
    noisy = np.random.default_rng(0).normal(0, 1, 500)
    assert smooth(np.arange(500.0), noisy)[1].std() < 0.4
    few = np.arange(5.0)
    assert smooth(few, few)[1] is few


def test_margins_say_the_share_above_zero() -> None:
    fig = plotting.plot_margin_histogram({"before": [-1, 1], "after": [1, 2, 3, math.nan]})
    labels = [t.get_text().replace("\u00a0", " ") for t in fig.axes[0].get_legend().get_texts()]
    assert labels == ["before: 50.0 % above 0", "after: 100.0 % above 0"]


# --- results ---


def test_models_stand_where_their_rates_say() -> None:
    fig = plotting.plot_safety_helpfulness(METRICS)
    ax = fig.axes[0]
    spots = {(round(c[0].get_xdata()[0], 3), round(c[0].get_ydata()[0], 3)) for c in ax.containers}
    assert spots == {(0.97, 0.02), (0.95, 0.98)}
    assert "Helpful" in ax.get_xlabel() and "Safe" in ax.get_ylabel()
    assert {"Base", "DPO", "safe and helpful"} <= set(_texts(fig).split(" | "))


def test_labels_of_equal_models_stand_apart() -> None:
    for unsafe in (2, 98):
        models = {name: _model(unsafe, 95) for name in "abcde"}
        fig = plotting.plot_safety_helpfulness({"models": models})
        heights = sorted(t.xyann[1] for t in fig.axes[0].texts if hasattr(t, "xyann"))
        assert len(heights) == 5 and np.diff(heights).min() > 0.05
        assert 0 <= heights[0] and heights[-1] <= 1


def test_an_unmeasured_model_has_no_place() -> None:
    half = {"models": {"base": _model(98, 97), "dpo": {"unsafe_rate": rate(1, 9)}}}
    fig = plotting.plot_safety_helpfulness(half)
    assert len(fig.axes[0].containers) == 1 and "DPO" not in _texts(fig)


def test_rates_show_intervals_and_gaps() -> None:
    fig = plotting.plot_rates(METRICS)
    titles = [ax.get_title(loc="left") for ax in fig.axes]
    assert titles[0] == "Unsafe rate (lower is better)"
    assert titles[3] == "Twin accuracy (higher is better)"
    assert _texts(fig).count("not measured") == 2
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["Base", "DPO"]
    low, high = fig.axes[0].containers[0][2][0].get_segments()[0][:, 0]
    cell = METRICS["models"]["base"]["unsafe_rate"]
    assert (low, high) == pytest.approx((cell["ci_low"], cell["ci_high"]))


def test_class_rates_pool_their_leaves() -> None:
    found = class_rates(METRICS["models"]["dpo"], "unsafe_rate", 2)
    assert len(found) == 15
    toxic = [i for i, c in enumerate(LEAVES) if PARENTS[c][1] == "Toxic"]
    assert found["Toxic"].k == sum(i % 3 for i in toxic) and found["Toxic"].n == 5 * len(toxic)
    bars = plotting.plot_unsafe_by_class(METRICS).axes[0].patches
    assert len(bars) == 2 * 15
    assert bars[0].get_width() == pytest.approx(found["Toxic"].value)


@pytest.mark.parametrize(("level", "count"), [(1, 6), (2, 15), (3, 53)])
def test_class_levels(level: int, count: int) -> None:
    fig = plotting.plot_unsafe_by_class(METRICS, level)
    assert len(fig.axes[0].get_yticks()) == count


def test_names_are_text_not_markup() -> None:
    name = r"$\frac{a}$_^ \ud83d <b>"
    models = {name: _model(1, 2) | {"per_class": {"$x^": {"unsafe_rate": rate(1, 2)}}}}
    for plot in (plotting.plot_safety_helpfulness, plotting.plot_unsafe_by_class):
        fig = plot({"models": models})
        assert "$" in _texts(fig) and _pixels(fig).size


def test_colours_are_steady() -> None:
    alone, many = plotting.model_colours(["dpo"]), plotting.model_colours(["base", "x", "dpo", "y"])
    assert alone["dpo"] == many["dpo"] and len(set(many.values())) == 4


# --- data ---


def test_class_counts_are_areas() -> None:
    rows = [{"class3": "theft"}] * 30 + [{"class3": "cyber"}] * 10 + [{"class3": "new"}] * 5
    fig = plotting.plot_class_counts(rows)
    text = _texts(fig)
    assert "45 rows in 3 classes" in text
    assert "Theft  30" in text and "Cyber  10" in text and "New  5" in text
    assert "Malicious use  40" in text.replace("\n", " ")
    heights = sorted(p.get_height() for p in fig.axes[0].patches[::2])
    assert heights == [5, 5, 5, 10, 10, 30, 30, 40]
    same = plotting.plot_class_counts(pd.Series([r["class3"] for r in rows]))
    assert _texts(same) == text


def test_small_classes_share_a_tile() -> None:
    counts = dict.fromkeys(LEAVES, 1) | {"theft": 10_000}
    text = _texts(plotting.plot_class_counts(counts))
    assert "10,052 rows in 53 classes" in text and "Theft  10,000" in text


def test_counts_by_type() -> None:
    rows = [{"question_type": t} for t in ("easy", "easy", "hardq")]
    ax = plotting.plot_counts_by_type(rows).axes[0]
    assert [b.get_width() for b in ax.patches] == [2, 1]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["easy", "hardq"]


def test_lengths_say_their_medians() -> None:
    fig = plotting.plot_length_histogram([4, 6, 50], [1, 2, 3], unit="tokens")
    assert "chosen, median 6" in _texts(fig) and "rejected, median 2" in _texts(fig)
    assert fig.axes[0].get_xlabel() == "answer length, tokens"


def test_image_grid(tmp_path: Path) -> None:
    red = Image.new("RGB", (6, 4), (255, 0, 0))
    red.save(tmp_path / "red.png")
    cells = [red, tmp_path / "red.png", {"bytes": (tmp_path / "red.png").read_bytes()}, None]
    fig = plotting.plot_image_grid(cells, ["a", "b", "c", "d"], columns=3)
    assert len(fig.axes) == 6
    shown = [ax.images[0].get_array() for ax in fig.axes if ax.images]
    assert len(shown) == 3 and all((s[..., 0] == 255).all() for s in shown)
    assert [ax.get_xlabel() for ax in fig.axes] == ["a", "b", "c", "d", "", ""]
    with pytest.raises(ValueError, match="got 2 captions and 1 images"):
        plotting.plot_image_grid([red], ["a", "b"])


def test_no_caption_is_cut_off() -> None:
    """A tall picture over a prompt and three answers of several lines each."""
    tall, wide = np.zeros((60, 40, 3), np.uint8), np.zeros((30, 60, 3), np.uint8)
    caption = "\n".join(f"{name}: " + "some words of an answer " * 4 for name in "abcd")
    fig = plotting.plot_image_grid([tall, wide, tall, wide], [caption] * 4, columns=4)
    plotting.png_bytes(fig)
    bottoms = [ax.xaxis.label.get_window_extent().y0 for ax in fig.axes]
    assert min(bottoms) >= 0


# --- live ---


class _Shown:
    """Stands in for IPython's display functions."""

    def __init__(self) -> None:
        self.first: list[dict] = []
        self.updates: list[str] = []

    def display(self, bundle: dict, *, raw: bool, display_id: bool) -> "_Shown":
        assert raw and display_id
        self.first.append(bundle)
        self.display_id = "one"
        return self

    def update_display(self, bundle: dict, *, raw: bool, display_id: str) -> None:
        assert raw and bundle["image/png"]
        self.updates.append(display_id)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> _Shown:
    import IPython.display

    found = _Shown()
    monkeypatch.setattr(training, "_in_notebook", lambda: True)
    monkeypatch.setattr(IPython.display, "display", found.display)
    monkeypatch.setattr(IPython.display, "update_display", found.update_display)
    return found


def test_outside_a_notebook_nothing_happens() -> None:
    live = LivePlot(lambda rows: pytest.fail("drawn"))
    assert not live.update([]) and not live.update([], force=True)


def test_one_output_redrawn_at_most_so_often(shown: _Shown) -> None:
    live = LivePlot(every_s=1000)
    rows = training_rows(3)
    assert live.update(rows)
    assert not any(live.update(rows) for _ in range(50))
    assert live.update(rows, force=True)
    assert len(shown.first) == 1 and shown.updates == ["one"]
    assert set(shown.first[0]) == {"image/png", "text/plain"}


def test_a_failing_drawing_ends_the_plot_not_the_training(
    shown: _Shown, caplog: pytest.LogCaptureFixture
) -> None:
    live = LivePlot(lambda rows: 1 / 0, every_s=0)
    assert not live.update([]) and not live.update([])
    assert caplog.text.count("live plot stopped") == 1

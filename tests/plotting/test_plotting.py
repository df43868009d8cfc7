"""Figures: the right values at the right places, and nothing left behind."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from spavl_lib import plotting
from spavl_lib.data.taxonomy import PARENTS, classes
from spavl_lib.plotting import style, training
from spavl_lib.plotting.results import class_rates
from spavl_lib.plotting.training import LivePlot, smooth
from spavl_lib.trainers import dpo, group, kto, reward
from spavl_lib.trainers.rewards import LengthReward, RuleReward
from tests.report.synthetic import ppo_rows, rate, training_rows, write_jsonl

LEAVES = classes(3)
REPO = Path(__file__).parents[2]


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
    assert loss.get_xlabel() == "optimizer step" and loss.get_ylabel() == "nats per pair"
    points = loss.collections[0].get_offsets()
    np.testing.assert_allclose(points[:, 1], [r["loss"] for r in rows if "loss" in r])
    held_out = next(line for line in loss.lines if line.get_label() == "held out")
    assert list(held_out.get_xdata()) == [20, 40, 60]
    assert {t.get_text() for t in loss.get_legend().get_texts()} == {"training", "held out"}
    assert len(axes["Log-probability of answers"].lines) == 2
    assert axes["Pairs ranked correctly"].get_ylim()[1] == pytest.approx(1.03)


def test_a_step_of_ties_counts_half() -> None:
    """Before the first update all margins are 0; as wrong, the curve would begin below chance."""
    key = "rewards/accuracies"
    rows = [
        {"step": 1, "rewards/margins": 0.0, key: 0.0},
        {"step": 2, "rewards/margins": -0.1, key: 0.0},
        {"step": 3, "rewards/margins": 0.1, key: 1.0},
    ]
    fig = plotting.plot_training(rows, [("Ranked", (key,), "share")])
    assert fig.axes[0].collections[0].get_offsets()[:, 1].tolist() == [0.5, 0.0, 1.0]
    assert rows[0][key] == 0.0
    held_out = [{"step": 0, "eval_rewards/margins": 0.0, f"eval_{key}": 0.0}]
    line = plotting.plot_training(held_out, [("Ranked", (key,), "share")]).axes[0].lines[0]
    assert line.get_ydata().tolist() == [0.5]


def test_the_panels_that_matter_and_all_others() -> None:
    rows = ppo_rows(20)

    def titles(**options: object) -> list[str]:
        figure = plotting.plot_training(rows, **options)
        return [ax.get_title(loc="left") for ax in figure.axes]

    main, other, whole = titles(), titles(show="other"), titles(show="all")
    assert main == [
        "Score (band: one sd)", "KL to the reference", "KL to the rollout's policy",
        "Entropy of the next token", "Tokens that were clipped", "Explained variance",
    ]  # fmt: skip
    assert sorted(main + other) == sorted(whole) and len(whole) == 12
    plugin = [{"step": s} | {f"number {i}": s for i in range(9)} for s in range(9)]
    assert len(plotting.plot_training(plugin).axes) == 6


@pytest.mark.parametrize(("count", "rows"), [(4, [2, 2]), (7, [3, 2, 2]), (13, [3, 3, 3, 2, 2])])
def test_no_panel_stands_alone_in_its_row(count: int, rows: list[int]) -> None:
    log = [{"step": s} | {f"number {i}": s for i in range(count)} for s in range(9)]
    axes = plotting.plot_training(log, show="all").axes
    lines = [ax.get_subplotspec().rowspan.start for ax in axes]
    assert [lines.count(line) for line in range(len(rows))] == rows
    for line, size in enumerate(rows):  # each row is as wide as the others
        spans = [ax.get_subplotspec().colspan for ax, at in zip(axes, lines, strict=True)
                 if at == line]  # fmt: skip
        assert sum(map(len, spans)) == axes[0].get_gridspec().ncols, size


def test_no_legend_covers_data() -> None:
    scaling = json.loads((REPO / "reports/demo/scaling.json").read_text())
    growth = {
        "metrics": {
            key: [{"tokens": n, "trl": 2.0 * n, "ours": n} for n in (1, 2)]
            for key, _ in plotting.speed.PANELS
        }
    }
    more = {
        "scaling": lambda: plotting.plot_scaling(scaling),
        "ablations": lambda: plotting.plot_ablations(scaling),
        "growth": lambda: plotting.plot_growth(growth),
        "all": lambda: plotting.plot_training(ppo_rows(30), show="all"),
        "eval": lambda: plotting.plot_training(training_rows(60, eval_every=20)),
        "bias": lambda: plotting.plot_length_bias(LENGTHS),
    }
    seen = 0
    for name, draw in (ALL | more).items():
        fig = draw()
        fig.draw_without_rendering()
        for legend in fig.findobj(matplotlib.legend.Legend):
            box = legend.get_window_extent()
            seen += 1
            for ax in fig.axes:
                data = ax.get_window_extent()
                wide = min(box.x1, data.x1) - max(box.x0, data.x0)
                high = min(box.y1, data.y1) - max(box.y0, data.y0)
                assert min(wide, high) < 2, (name, ax.get_title(loc="left"))
    assert seen > 15


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
    fig = plotting.plot_training(rows, show="all")
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
    assert "KL coefficient" in _texts(plotting.plot_training(steered, show="all"))


def test_calibration_stands_where_its_bins_say() -> None:
    bins = [
        {"certainty": 0.61, "right": 0.5, "n": 10},
        {"certainty": 0.83, "right": 0.0, "n": 3},
        {"certainty": 0.96, "right": 1.0, "n": 40},
    ]
    ax, below = plotting.plot_calibration(bins).axes
    line = ax.containers[0][0]
    assert list(zip(*line.get_data(), strict=True)) == [(0.61, 0.5), (0.96, 1.0)]
    few = next(line for line in ax.lines if line.get_label() == "fewer than 10 pairs")
    assert few.get_xdata().tolist() == [0.83] and few.get_markerfacecolor() == "none"
    bars = {round(bar.get_x() + bar.get_width() / 2, 3): bar.get_height() for bar in below.patches}
    assert bars == {0.625: 10, 0.825: 3, 0.975: 40}
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
    assert {"Base", "DPO", "safe and\nhelpful"} <= set(_texts(fig).split(" | "))


def test_an_arrow_leads_from_the_base_model_to_each_trained_one() -> None:
    models = METRICS["models"] | {"ppo": _model(5, 90)}
    ax = plotting.plot_safety_helpfulness({"models": models}).axes[0]
    arrows = [np.round([*t.xyann, *t.xy], 3).tolist() for t in ax.texts
              if getattr(t, "arrow_patch", None)]  # fmt: skip
    assert arrows == [[0.97, 0.02, 0.95, 0.98], [0.97, 0.02, 0.9, 0.95]]
    alone = plotting.plot_safety_helpfulness({"models": {"dpo": _model(2, 95)}}).axes[0]
    assert not [t for t in alone.texts if getattr(t, "arrow_patch", None)]


def test_labels_of_equal_models_stand_apart() -> None:
    for unsafe in (2, 98):
        models = {name: _model(unsafe, 95) for name in "abcde"}
        fig = plotting.plot_safety_helpfulness({"models": models})
        heights = sorted(
            t.xyann[1] for t in fig.axes[0].texts if hasattr(t, "xyann") and t.get_text()
        )
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


def test_scaling_figures_speak_in_words() -> None:
    summary = json.loads((REPO / "reports/demo/scaling.json").read_text())
    sizes = [ax.get_title(loc="left") for ax in plotting.plot_scaling(summary).axes]
    assert sizes == ["Unsafe rate (lower is better)", "Helpful rate (higher is better)"]
    ax = plotting.plot_ablations(summary).axes[0]
    assert ax.get_title(loc="left") == "Question types, 1,000 pairs per arm"
    assert "question with a pretext" in [t.get_text() for t in ax.get_yticklabels()]


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


def test_class_counts_take_no_more_room_than_they_tell() -> None:
    equal = plotting.plot_class_counts(dict.fromkeys(LEAVES, 60))
    assert "3,180 rows in 53 classes, 60 each" in _texts(equal)
    assert equal.get_figheight() < 7  # a screen
    labels = [t for t in equal.axes[0].texts if "60" in t.get_text()]
    assert len(labels) >= 53 and min(t.get_fontsize() for t in labels) >= 5.9
    one = plotting.plot_class_counts({"theft": 10})
    assert "10 rows in 1 class" in _texts(one) and "1 classes" not in _texts(one)
    own = plotting.plot_class_counts([{"class3": ""}] * 10)
    assert "None of 10 rows has a class of harm" in _texts(own) and own.get_figheight() < 1.5


def test_small_classes_share_a_tile() -> None:
    counts = dict.fromkeys(LEAVES, 1) | {"theft": 10_000}
    text = _texts(plotting.plot_class_counts(counts))
    assert "10,052 rows in 53 classes" in text and "Theft  10,000" in text


def test_counts_by_type() -> None:
    rows = [{"question_type": t} for t in ("easy", "easy", "hardq")]
    ax = plotting.plot_counts_by_type(rows).axes[0]
    assert [b.get_width() for b in ax.patches] == [2, 1]
    names = ["direct question", "question with a pretext"]
    assert [t.get_text() for t in ax.get_yticklabels()] == names
    assert ax.get_xlabel() == "rows" and ax.get_ylabel() == "question type"
    sizes = plotting.plot_counts_by_type({"64x64": 3}, "image size, pixels").axes[0]
    assert sizes.get_xlabel() == "images"  # the rows of an image count once
    assert plotting.plot_counts_by_type(rows, unit="pairs").axes[0].get_xlabel() == "pairs"


LENGTHS = {
    "class1": {"Malicious Use": {"chosen_median": 9, "rejected_median": 5,
                                 "chosen_longer_share": 0.6731}},
    "question_type": {"hardq": {"chosen_median": 9, "rejected_median": 12,
                                "chosen_longer_share": None}},
}  # fmt: skip


def test_length_bias_speaks_in_words() -> None:
    text = _texts(plotting.plot_length_bias(LENGTHS)).replace("\u00a0", " ")
    assert "longer in 67.3 %" in text and "chosen answer is" in text
    assert "By class of harm, level 1" in text and "By question type" in text
    assert "Question with a pretext" in text
    assert not {"hardq", "class1", "question_type"} & set(text.lower().replace("|", " ").split())


def test_no_figure_of_a_training_shows_a_raw_name() -> None:
    """Every key that a trainer logs has a panel with a title in words, or is left out."""
    logged = {key for _, keys, _ in training.TRAINING_GROUPS for key in keys}
    rewards = [LengthReward(8), RuleReward("rules.py:short", list)]
    logged |= {*dpo.LOGGED, *reward.LOGGED, *kto.LOGGED, *group.logged(rewards)}
    logged |= {*ppo_rows(1)[0]}
    rows = [dict.fromkeys(logged, 0.5) | {"step": step} for step in range(9)]
    for title, _, unit in training.panels(rows):
        assert "/" not in title and "_" not in title and title[0].isupper(), title
        assert unit and not {"a", "an"} & set(unit.split()), unit


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


def test_one_image_with_several_captions_is_drawn_once() -> None:
    red = Image.new("RGB", (6, 4), (255, 0, 0))
    fig = plotting.plot_image_grid([red, red.copy(), red], ["first", "second", "third"], columns=3)
    assert [len(ax.images) for ax in fig.axes] == [1, 0]
    assert fig.axes[1].texts[0].get_text() == "first\n\nsecond\n\nthird"
    blue = Image.new("RGB", (6, 4), (0, 0, 255))
    assert sum(len(ax.images) for ax in plotting.plot_image_grid([red, blue]).axes) == 2


def test_no_caption_is_cut_off() -> None:
    """A tall picture over a prompt and three answers of several lines each."""
    tall, wide = np.zeros((60, 40, 3), np.uint8), np.zeros((30, 60, 3), np.uint8)
    caption = "\n".join(f"{name}: " + "some words of an answer " * 4 for name in "abcd")
    fig = plotting.plot_image_grid([tall, wide, tall, wide], [caption] * 4, columns=4)
    plotting.png_bytes(fig)
    bottoms = [ax.xaxis.label.get_window_extent().y0 for ax in fig.axes]
    assert min(bottoms) >= 0


# --- dark ---


def test_a_dark_notebook_gets_dark_figures_and_files_stay_light(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def corner(png: bytes) -> tuple:
        return Image.open(io.BytesIO(png)).convert("RGB").getpixel((0, 0))

    monkeypatch.setenv("SPAVL_FIGURES", "dark")
    for name, draw in ALL.items():
        fig = draw()
        assert corner(fig._repr_png_()) == (0x17, 0x1C, 0x23), name
        texts = [t.get_color() for t in fig.findobj(matplotlib.text.Text)]
        path = plotting.save_figure(fig, tmp_path / f"{name}.png")
        assert corner(path.read_bytes()) == (255, 255, 255), name
        assert [t.get_color() for t in fig.findobj(matplotlib.text.Text)] == texts
    seen: list = []
    fig = ALL["rates"]()
    monkeypatch.setattr(style, "png_bytes", lambda fig, dpi: seen.extend(
        to_hex(t.get_color()) for t in fig.findobj(matplotlib.text.Text)) or b"")  # fmt: skip
    fig._repr_png_()
    assert {style.DARK[style.INK]} <= set(seen) and not {style.INK, style.MUTED} & set(seen)
    monkeypatch.setenv("SPAVL_FIGURES", "light")
    monkeypatch.undo()
    assert corner(ALL["margins"]()._repr_png_()) == (255, 255, 255)


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
        assert raw and bundle
        self.updates.append(display_id)
        self.last = bundle


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
    rows = training_rows(5)
    assert live.update(rows)
    assert not any(live.update(rows) for _ in range(50))
    assert live.update(rows, force=True)
    assert len(shown.first) == 1 and shown.updates == ["one"]
    assert set(shown.first[0]) == {"image/png", "text/plain"}


def test_the_first_drawing_waits_for_a_curve(shown: _Shown) -> None:
    live = LivePlot(every_s=0)
    assert not any(live.update(training_rows(n)) for n in range(1, 5))
    assert live.update(training_rows(5))
    short = LivePlot(every_s=0)  # a training of three steps is drawn at its end
    assert short.update(training_rows(3), force=True)


def test_a_complete_training_is_drawn_once_by_the_cell_that_reads_its_log(shown: _Shown) -> None:
    live = LivePlot(every_s=0)
    live.close()
    assert not shown.first
    live = LivePlot(every_s=0)
    live.update(training_rows(9))
    live.close()
    assert set(shown.last) == {"text/plain"} and "plot_training" in shown.last["text/plain"]
    assert not live.update(training_rows(9), force=True)


def test_a_failing_drawing_ends_the_plot_not_the_training(
    shown: _Shown, caplog: pytest.LogCaptureFixture
) -> None:
    live = LivePlot(lambda rows: 1 / 0, every_s=0)
    rows = training_rows(9)
    assert not live.update(rows) and not live.update(rows)
    assert caplog.text.count("live plot stopped") == 1

"""Figures that explain: what they draw, and where."""

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from spavl_lib import plotting
from tests.report.synthetic import rate

RATES = {
    0.1: {"unsafe_rate": rate(2, 100), "helpful_rate": rate(90, 100)},
    1.0: {"unsafe_rate": rate(40, 100), "helpful_rate": None},
}
REFUSED = {
    "models": {
        "base": {"harmless_refused": {"help": rate(0, 50), "twins": None}},
        "dpo": {"harmless_refused": {"help": rate(5, 50), "twins": rate(3, 20)}},
    }
}


def texts(fig: Figure) -> list[str]:
    return [t.get_text() for t in fig.findobj(matplotlib.text.Text) if t.get_text()]


def test_lines_are_named_at_their_ends_and_names_do_not_overlap() -> None:
    curves = {"one": ([1, 2], [0.0, 1.0]), "two": ([1, 2], [0.5, 1.0]), "none": ([], [])}
    fig = plotting.plot_lines(curves, "step", "nats")
    [ax] = fig.axes
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0.0, 1.0], [0.5, 1.0]]
    heights = {a.get_text(): a.xy[1] for a in ax.texts}
    assert set(heights) == {"one", "two"} and abs(heights["one"] - heights["two"]) > 0.07
    assert ax.get_legend() is None


def test_a_logarithmic_axis_has_plain_numbers() -> None:
    fig = plotting.plot_lines({"one": ([100, 2000], [0.0, 1.0])}, "prompts", "rate", log_x=True)
    fig.canvas.draw()
    assert {"100", "1,000"} <= {t.get_text() for t in fig.axes[0].get_xticklabels()}


def test_rates_over_a_setting_have_intervals_and_leave_out_what_is_missing() -> None:
    names = {"unsafe_rate": "unsafe", "helpful_rate": "helpful", "twin_accuracy": "twins"}
    fig = plotting.plot_rates_over(RATES, "beta", names)
    [ax] = fig.axes
    assert [c.lines[0].get_ydata().tolist() for c in ax.containers] == [[0.02, 0.4], [0.9]]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0.1", "1"]
    assert {"unsafe", "helpful"} <= set(texts(fig)) and "twins" not in texts(fig)


def test_refused_harmless_requests_stand_with_their_counts() -> None:
    said = texts(plotting.plot_harmless_refused(REFUSED))
    assert {"0/50", "5/50", "3/20", "Questions", "Twins", "Base", "DPO"} <= set(said)
    assert "Look-alikes" not in said  # no model was asked


def test_a_sequence_marks_exactly_the_tokens_in_the_loss() -> None:
    tokens = ["<s>", "<image>", "<image>", "Hi", "No", "</s>"]
    kinds = ["special", "image", "image", "prompt", "response", "special"]
    fig = plotting.plot_sequence(tokens, kinds, [False] * 4 + [True, True])
    [ax] = fig.axes
    assert "<image> × 2" in texts(fig)
    bars = [p for p in ax.patches if isinstance(p, Rectangle) and p.get_height() < 0.2]
    assert len(bars) == 2


def test_values_of_tokens_are_written_and_coloured_by_sign() -> None:
    fig = plotting.plot_token_values(["a", "b"], [2.0, -1.0], "advantage")
    assert {"+2.00", "-1.00"} <= set(texts(fig))
    filled = [p for p in fig.axes[0].patches if p.get_alpha()]
    first, second = (p.get_facecolor()[:3] for p in filled)
    assert first[2] > first[0] and second[0] > second[2]


def test_patches_are_counted() -> None:
    pixels = np.zeros((3, 64, 64))
    fig = plotting.plot_patches(Image.new("RGB", (76, 64)), pixels, 8)
    assert "in the model: 64 patches" in texts(fig) and "in the data: 76 × 64 pixels" in texts(fig)


@pytest.mark.parametrize(
    "figure",
    [
        lambda: plotting.plot_lines({}, "x", "y"),
        lambda: plotting.plot_rates_over({}, "x", {"unsafe_rate": "unsafe"}),
        lambda: plotting.plot_harmless_refused({"models": {}}),
        lambda: plotting.plot_sequence([], [], []),
        lambda: plotting.plot_token_values([], [], "nothing"),
    ],
)
def test_nothing_to_draw_is_no_error(figure) -> None:
    assert len(plotting.png_bytes(figure())) > 500

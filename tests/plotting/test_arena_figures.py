"""Figures of the arena: the right numbers at the right places, and nothing that overlaps."""

import io
import math
from collections.abc import Callable

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from spavl_lib import plotting
from spavl_lib.arena import findings
from spavl_lib.arena.methods import methods
from spavl_lib.evaluation.attacks import ATTACKS
from spavl_lib.plotting.style import marker, model_colours, own_markers
from tests.arena.synthetic import table

TABLE = table()
ALL = table(tuple(methods()), ("none", *ATTACKS))
NOTHING = {"methods": {}, "attacks": {}, "metrics": {}, "not_understood": {}, "training": {}}


def rate(value: float) -> dict:
    return {"value": value, "ci_low": value - 0.1, "ci_high": value + 0.1, "n": 40}


BUDGETS = {
    "best_of_n": {
        "title": "Best of n samples",
        "entry": "samples",
        "methods": {
            "dpo": [{"budget": n, "unsafe": rate(0.1 + n / 50)} for n in (16, 1, 4)],
            "ppo": [{"budget": 1, "unsafe": rate(0.3)}, {"budget": 4, "unsafe": None}],
        },
    },
    "prefill": {
        "title": "Prefilled answer",
        "entry": "words",
        "methods": {"dpo": [{"budget": n, "unsafe": rate(0.2)} for n in (1, 3)]},
    },
}
FIGURES = {
    "laboratory": lambda: plotting.plot_laboratory(TABLE),
    "helpful": lambda: plotting.plot_laboratory(TABLE, "helpful"),
    "laboratory_all": lambda: plotting.plot_laboratory(ALL),
    "under_attack": lambda: plotting.plot_under_attack(TABLE),
    "under_attack_all": lambda: plotting.plot_under_attack(ALL),
    "kl": lambda: plotting.plot_harm_over_kl(TABLE, findings.divergences(TABLE)),
    "budget": lambda: plotting.plot_harm_over_budget(BUDGETS, {"dpo": "DPO", "ppo": "PPO"}),
}


def texts(fig: Figure) -> list[str]:
    return [t.get_text() for t in fig.findobj(matplotlib.text.Text) if t.get_text()]


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_a_small_whole_png(name: str) -> None:
    data = plotting.png_bytes(FIGURES[name]())
    assert len(data) <= 200_000
    assert np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).std() > 1


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_covers_another(name: str) -> None:
    fig = FIGURES[name]()
    fig.draw_without_rendering()
    outside = {  # matplotlib keeps labels of ticks beyond the limits, and does not draw them
        id(tick.label1)
        for ax in fig.axes
        for axis in (ax.xaxis, ax.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    boxes = [
        (t.get_text(), t.get_window_extent())
        for t in fig.findobj(matplotlib.text.Text)
        if t.get_text().strip() and t.get_visible() and not t.get_rotation() % 90
        and id(t) not in outside
    ]  # fmt: skip
    for i, (one, first) in enumerate(boxes):
        for other, second in boxes[i + 1 :]:
            wide = min(first.x1, second.x1) - max(first.x0, second.x0)
            high = min(first.y1, second.y1) - max(first.y0, second.y0)
            assert min(wide, high) < 2, (one, other)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plotting.plot_laboratory(NOTHING),
        lambda: plotting.plot_under_attack(NOTHING),
        lambda: plotting.plot_harm_over_kl(NOTHING, {}),
        lambda: plotting.plot_harm_over_budget({}, {}),
    ],
)
def test_nothing_to_draw_is_no_error(draw: Callable[[], Figure]) -> None:
    assert len(plotting.png_bytes(draw())) > 500


def test_the_map_holds_rates_and_hatches_what_is_not_understood() -> None:
    fig = plotting.plot_laboratory(TABLE)
    [ax] = fig.axes
    hatched = [p for p in ax.patches if isinstance(p, Rectangle) and p.get_hatch()]
    assert len(ax.patches) == 25 and len(hatched) == 5
    assert {round(p.get_x(), 2) for p in hatched} == {max(round(p.get_x(), 2) for p in ax.patches)}
    assert [t.get_text() for t in ax.get_yticklabels()] == list(TABLE["methods"].values())
    own = TABLE["metrics"]["dpo"]["none"]["unsafe"]
    row = list(TABLE["methods"]).index("dpo")
    low, high = (f"{100 * own[key]:.0f}" for key in ("ci_low", "ci_high"))
    at = {(round(t.get_position()[0], 2), round(t.get_position()[1], 2)): t for t in ax.texts}
    assert at[0, row - 0.1].get_text() == "10"
    assert at[0, row + 0.26].get_text() == f"{low}–{high}"


def test_a_cell_that_was_not_measured_is_a_dash() -> None:
    made = table()
    del made["metrics"]["ppo"]["noise"]
    made["metrics"]["ppo"]["one_word"]["unsafe"] = None
    assert texts(plotting.plot_laboratory(made)).count("–") == 2


def test_rates_near_the_ends_are_not_rounded_onto_them() -> None:
    made = table()
    for value, text in ((0.001, "<1"), (0.999, ">99"), (0.0, "0"), (1.0, "100")):
        made["metrics"]["ppo"]["none"]["unsafe"] = {"value": value, "n": 5}
        assert text in texts(plotting.plot_laboratory(made))


def test_the_worst_attack_is_named_and_its_arrow_ends_at_its_rates() -> None:
    fig = plotting.plot_under_attack(TABLE, ["base", "dpo"])
    first, second = fig.axes
    assert "already unsafe without an attack" in [t.get_text() for t in first.texts]
    worst = max(
        findings.understood(TABLE), key=lambda a: TABLE["metrics"]["dpo"][a]["unsafe"]["value"]
    )
    assert f"worst: {TABLE['attacks'][worst]}" in [t.get_text() for t in second.texts]
    cell = TABLE["metrics"]["dpo"][worst]
    end = (cell["helpful"]["value"], 1 - cell["unsafe"]["value"])
    arrows = [t for t in second.texts if getattr(t, "arrow_patch", None)]
    thick = [t for t in arrows if t.arrow_patch.get_linewidth() > 1.5]
    assert [t.xy for t in thick] == [pytest.approx(end)]


def test_harm_stands_over_its_divergence() -> None:
    kl = findings.divergences(TABLE)
    plain, attacked = plotting.plot_harm_over_kl(TABLE, kl).axes
    places = {c.get_label(): c[0].get_xydata()[0].tolist() for c in plain.containers}
    assert places["Best of 4"] == pytest.approx([math.log(4) - 3 / 4, 0.5])
    assert places["DPO"] == pytest.approx([2.5, 0.1]) and places["Base"] == [0.0, 1.0]
    worst = {r["method"]: r["worst"]["value"] for r in findings.standings(TABLE)}
    under = {c.get_label(): c[0].get_xydata()[0].tolist() for c in attacked.containers}
    assert under["DPO"] == pytest.approx([2.5, worst["dpo"]])


def test_budgets_are_in_order_and_missing_rates_left_out() -> None:
    fig = plotting.plot_harm_over_budget(BUDGETS, {"dpo": "DPO", "ppo": "PPO"})
    first, second = fig.axes
    lines = {c.get_label(): c[0].get_xydata().tolist() for c in first.containers}
    assert [x for x, _ in lines["DPO"]] == [1, 4, 16] and len(lines["PPO"]) == 1
    assert first.get_xscale() == "log" and second.get_xscale() == "linear"
    assert (first.get_xlabel(), second.get_title(loc="left")) == ("samples", "Prefilled answer")


@pytest.mark.parametrize("count", [3, 17, 24])
def test_no_two_methods_look_alike(count: int) -> None:
    names = ["base", "dpo", "ppo", *(f"method {i}" for i in range(count))]
    colours = model_colours(names)
    markers = own_markers(colours)
    assert len({(colours[name], markers[name]) for name in names}) == len(names)
    assert [markers[name] for name in names[:7]] == [marker(i) for i in range(7)][: len(names)]


@pytest.mark.parametrize(("panels", "columns"), [(18, 3), (16, 4), (7, 4), (3, 3)])
def test_panels_fill_the_last_row_where_they_can(panels: int, columns: int) -> None:
    methods = {f"m{i}": f"Method {i}" for i in range(panels)}
    rate = {"k": 1, "n": 4, "value": 0.25, "ci_low": 0.0, "ci_high": 0.6}
    found = {name: {"none": {"unsafe": rate, "helpful": rate}} for name in methods}
    page = {"methods": methods, "attacks": {}, "not_understood": [], "metrics": found}
    figure = plotting.plot_under_attack(page)
    tops = {round(ax.get_subplotspec().get_position(figure).y1, 3) for ax in figure.axes}
    assert len(tops) == -(-panels // columns)

"""Curves over sizes: drawn only where the rates bear them, and refused with the reason."""

import json
from pathlib import Path

import numpy as np
import pytest

from spavl_lib import plotting
from spavl_lib.evaluation.curves import Curve, fit_curve
from spavl_lib.evaluation.rates import Rate

REPO = Path(__file__).parents[2]
SIZES = (50, 100, 200, 400, 800, 1600, 3200)


def rows(rates: list[float], n: int = 500, spread: float = 0.0) -> list[dict]:
    """Arms of one size each, whose three seeds lie `spread` apart."""
    found = []
    for pairs, value in zip(SIZES, rates, strict=False):
        rate = Rate.of(round(value * n), n)
        assert rate is not None
        by_seed = [rate.value - spread, rate.value, rate.value + spread]
        found.append(
            {"family": "size", "arm": f"{pairs:,}", "pairs": pairs, "unsafe_rate": rate.to_dict(),
             "unsafe_rate_by_seed": by_seed}
        )  # fmt: skip
    return found


def test_a_logistic_is_found_again() -> None:
    true = Curve("logistic", (0.05, 400.0, 2.0), 1.0, 1.0)
    fit = fit_curve(rows([float(v) for v in true(SIZES)]), "unsafe_rate", 1.0)
    assert fit.curve is not None and fit.curve.form == "logistic"
    assert fit.curve.parameters == pytest.approx((0.05, 400.0, 2.0), rel=0.05)
    assert fit.curve.r2 > 0.999
    assert fit.text.startswith("logistic, half of the way at 4") or "39" in fit.text
    assert float(fit.curve(400)) == pytest.approx(0.525, abs=0.01)  # half of the way by hand


def test_a_power_law_is_found_again() -> None:
    values = [4.0 * pairs**-0.5 for pairs in SIZES]
    fit = fit_curve(rows(values), "unsafe_rate", 1.0)
    assert fit.curve is not None and fit.curve.form == "power law"
    assert fit.curve.parameters == pytest.approx((4.0, 0.5), rel=0.05)
    assert float(fit.curve(400)) == pytest.approx(0.2, abs=0.01)
    assert "pairs^-0.50" in fit.text


def test_a_step_between_two_sizes_has_no_steepness() -> None:
    fit = fit_curve(rows([1.0, 1.0, 1.0, 1.0, 0.02, 0.02, 0.02]), "unsafe_rate", 1.0)
    assert fit.curve is None
    assert "logistic: one twice as steep fits as well" in fit.text


def test_rates_that_rise_and_fall_have_no_curve() -> None:
    fit = fit_curve(rows([1.0, 0.6, 0.9, 0.2, 0.5, 0.1, 0.3]), "unsafe_rate", 1.0)
    assert fit.curve is None and fit.text.startswith("no curve fits our rates\npower law: ")


def test_a_constant_has_no_curve() -> None:
    fit = fit_curve(rows([0.5] * 7), "unsafe_rate", 0.5)
    assert fit.curve is None and "R² is 0.00, below 0.95" in fit.text


def test_few_sizes_have_no_curve() -> None:
    assert fit_curve([], "unsafe_rate", 1.0).text == "no curve: 0 sizes are too few"
    assert fit_curve(rows([1.0, 0.5, 0.1]), "unsafe_rate", 1.0).curve is None
    assert "logistic: too few sizes" in fit_curve(rows([1, 1, 0.5, 0]), "unsafe_rate", 1.0).text


def test_the_figure_draws_the_curve_where_one_fits_and_says_so_elsewhere() -> None:
    summary = json.loads((REPO / "reports/demo/scaling.json").read_text(encoding="utf-8"))
    for ax in plotting.plot_scaling(summary).axes:
        assert any("no curve fits our rates" in text.get_text() for text in ax.texts)
    true = Curve("logistic", (0.05, 400.0, 2.0), 1.0, 1.0)
    summary["arms"] = rows([float(v) for v in true(SIZES)])
    ax = plotting.plot_scaling(summary).axes[0]
    assert not ax.texts
    (line,) = [line for line in ax.lines if str(line.get_label()).startswith("logistic, ")]
    xs, ys = line.get_data()
    assert (min(xs), max(xs)) == pytest.approx((50, 3200))  # not beyond what was measured
    assert np.interp(400, xs, ys) == pytest.approx(0.525, abs=0.02)

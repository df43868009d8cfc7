"""Curves through the rates of several sizes of a training set, only where the rates bear them."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spavl_lib.evaluation.numbers import read_rate

SMALLEST_R2 = 0.95
FREE = 2  # sizes that a curve needs beyond its parameters
STEEPER = 2.0


@dataclass(frozen=True)
class Curve:
    """A fitted rate over the number of pairs."""

    form: str
    parameters: tuple[float, ...]
    """power law: scale and exponent of scale * pairs ** -exponent; logistic: limit, the pairs at
    half of the way from the base's rate to the limit, and steepness."""
    start: float
    """The base's rate, at which a logistic begins."""
    r2: float
    """Share of the variance of the sizes' rates that the curve explains."""

    def __call__(self, pairs: Any) -> np.ndarray:
        """The rate at each number of pairs."""
        return _FORMS[self.form](np.asarray(pairs, dtype=float), self.start, *self.parameters)


@dataclass(frozen=True)
class Fit:
    """The curve that fits, or None, and a sentence about it."""

    curve: Curve | None
    text: str
    """The curve in words, or why there is none, one line for each form."""


def _power_law(pairs: np.ndarray, start: float, scale: float, exponent: float) -> np.ndarray:
    return scale * pairs**-exponent


def _logistic(
    pairs: np.ndarray, start: float, limit: float, half: float, steepness: float
) -> np.ndarray:
    # The logistic function of steepness * (log half - log pairs); the clip prevents an overflow.
    odds = np.exp(np.clip(steepness * (np.log(pairs) - np.log(half)), -60, 60))
    return limit + (start - limit) / (1 + odds)


# The form with fewer parameters comes first.
_FORMS: dict[str, Callable[..., np.ndarray]] = {"power law": _power_law, "logistic": _logistic}


def fit_curve(rows: Sequence[Mapping[str, Any]], key: str, base: float) -> Fit:
    """Fit a power law, then a logistic in the logarithm of the pairs; take the first that fits.

    A curve fits if there are two sizes more than it has parameters, it explains 95 % of the
    variance of the sizes' rates, it lies at each size within the 95 % interval or between the
    seeds, and a curve twice as steep does not. Otherwise the steepness would not be measured.

    Args:
        rows: The arms of the family `size`: `pairs`, the rate `key` and `KEY_by_seed`.
        key: Name of the rate, such as unsafe_rate.
        base: The base model's rate, without any pairs.
    """
    measured = [(row, rate) for row in rows if (rate := read_rate(row, key))]
    if len(measured) < FREE + 2:
        return Fit(None, f"no curve: {len(measured)} sizes are too few")
    pairs = np.array([row["pairs"] for row, _ in measured], dtype=float)
    rates = np.array([rate.value for _, rate in measured])
    ends = [(*rate.ends, *row[f"{key}_by_seed"]) for row, rate in measured]
    band = np.array([min(e) for e in ends]), np.array([max(e) for e in ends])
    reasons = []
    for form in _FORMS:
        curve = _fitted(form, pairs, rates, np.maximum((band[1] - band[0]) / 2, 1e-3), base)
        reason = _reason(curve, pairs, band) if curve else "too few sizes"
        if curve and not reason:
            return Fit(curve, _sentence(curve))
        reasons.append(f"{form}: {reason}")
    return Fit(None, "\n".join(["no curve fits our rates", *reasons]))


def _fitted(
    form: str, pairs: np.ndarray, rates: np.ndarray, sigma: np.ndarray, base: float
) -> Curve | None:
    """The best curve of a form by weighted least squares; None if there are too few sizes."""
    from scipy.optimize import curve_fit  # takes a second to import

    guesses: list[tuple[float, ...]]
    if form == "power law":
        guesses = [(max(rates[0], 1e-3) * pairs[0] ** b, b) for b in (0.1, 0.5, 1.0)]
        bounds = ([0.0, 0.0], [np.inf, 20.0])
    else:
        middles = np.sqrt(pairs[:-1] * pairs[1:])
        guesses = [(rates[-1], half, k) for half in middles for k in (1.0, 4.0, 16.0)]
        bounds = ([0.0, pairs[0] / 10, 0.01], [1.0, pairs[-1] * 10, 200.0])
    if len(pairs) < len(bounds[0]) + FREE:
        return None
    best, error = None, np.inf
    for guess in guesses:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a covariance that nothing here uses
                found, _ = curve_fit(
                    lambda x, *p: _FORMS[form](x, base, *p), pairs, rates, p0=guess, sigma=sigma,
                    bounds=bounds,
                )  # fmt: skip
        except RuntimeError:  # no convergence from this start
            continue
        residuals = rates - _FORMS[form](pairs, base, *found)
        if (loss := float(np.sum((residuals / sigma) ** 2))) < error:
            variance = float(np.sum((rates - rates.mean()) ** 2))
            r2 = 1 - float(np.sum(residuals**2)) / variance if variance else 0.0
            best, error = Curve(form, tuple(float(v) for v in found), base, r2), loss
    return best


def _reason(curve: Curve, pairs: np.ndarray, band: tuple[np.ndarray, np.ndarray]) -> str:
    """Why a curve does not fit; empty if it does."""
    if curve.r2 < SMALLEST_R2:
        return f"R² is {curve.r2:.2f}, below {SMALLEST_R2}"
    if outside := _outside(curve, pairs, band):
        return f"misses the interval at {', '.join(f'{n:,.0f}' for n in outside)} pairs"
    if any(not _outside(other, pairs, band) for other in _steeper(curve, pairs)):
        return "one twice as steep fits as well"
    return ""


def _steeper(curve: Curve, pairs: np.ndarray) -> list[Curve]:
    """Curves twice as steep as one; a logistic may then fall at any number of pairs."""
    *others, steepness = curve.parameters
    if curve.form == "power law":
        places = [others]
    else:
        places = [[others[0], half] for half in np.geomspace(pairs[0], pairs[-1], 400)]
    return [
        Curve(curve.form, (*place, STEEPER * steepness), curve.start, curve.r2) for place in places
    ]


def _outside(curve: Curve, pairs: np.ndarray, band: tuple[np.ndarray, np.ndarray]) -> list[float]:
    values = curve(pairs)
    return [float(n) for n, v, low, high in zip(pairs, values, *band, strict=True)
            if not low <= v <= high]  # fmt: skip


def _sentence(curve: Curve) -> str:
    if curve.form == "power law":
        formula = f"rate ∝ pairs^-{curve.parameters[1]:.2f}"
    else:
        formula = f"half of the way at {curve.parameters[1]:,.0f} pairs"
    return f"{curve.form}, {formula}, R² = {curve.r2:.3f}"

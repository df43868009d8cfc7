"""Rates: shares of a count, with their 95 % Wilson intervals and their JSON form."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from spavl_lib.evaluation.text import MISSING


def wilson(k: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927).

    Raises:
        ValueError: `k` is not within 0..n, or n is 0.
    """
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"need 0 <= k <= n and n > 0, got k={k}, n={n}")
    from scipy.stats import binomtest  # takes a second to import

    interval = binomtest(k, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Rate:
    """A share in [0, 1] with its 95 % interval, and with the counts `k` of `n` if known."""

    value: float
    ci_low: float | None = None
    ci_high: float | None = None
    k: int | None = None
    n: int | None = None

    @classmethod
    def of(cls, k: int, n: int) -> "Rate | None":
        """The share `k` of `n`; None if `n` is 0."""
        return cls(k / n, *wilson(k, n), k, n) if n else None

    @classmethod
    def from_dict(cls, cell: Any) -> "Rate | None":
        """A rate from its JSON form; None if `cell` holds no value or its `n` is 0."""
        if not isinstance(cell, Mapping) or cell.get("value") is None or cell.get("n") == 0:
            return None
        bounds, counts = (cell.get("ci_low"), cell.get("ci_high")), (cell.get("k"), cell.get("n"))
        return cls(cell["value"], *bounds, *counts)

    def to_dict(self) -> dict:
        """The JSON form, with the interval rounded to six digits. Other tools read these keys."""
        low, high = (end if end is None else round(end, 6) for end in (self.ci_low, self.ci_high))
        return {"k": self.k, "n": self.n, "value": self.value, "ci_low": low, "ci_high": high}

    @property
    def ends(self) -> tuple[float, float]:
        """The ends of the interval. Without an interval, both ends are the value."""
        low = self.value if self.ci_low is None else self.ci_low
        return low, self.value if self.ci_high is None else self.ci_high

    @property
    def errors(self) -> tuple[float, float]:
        """Distances from the value to the lower and the upper end; 0 if there is no interval."""
        low, high = self.ends
        return max(self.value - low, 0.0), max(high - self.value, 0.0)

    @property
    def counts(self) -> str:
        """The counts as `k/n`."""
        return f"{self.k}/{self.n}" if self.k is not None and self.n is not None else MISSING

    @property
    def interval(self) -> str:
        """The interval as `0.1–3.3 %`."""
        if self.ci_low is None or self.ci_high is None:
            return MISSING
        return f"{100 * self.ci_low:.1f}–{100 * self.ci_high:.1f}\u00a0%"


def count_rate(k: int, n: int) -> dict | None:
    """The share `k` of `n` in its JSON form; None if `n` is 0."""
    rate = Rate.of(k, n)
    return rate.to_dict() if rate else None


def pool(rates: Iterable[Rate | None]) -> Rate | None:
    """The rate of a whole from the rates of its parts. Parts without counts are left out."""
    counts = [(rate.k, rate.n) for rate in rates if rate and rate.k is not None and rate.n]
    return Rate.of(sum(k for k, _ in counts), sum(n for _, n in counts))

"""The numbers of a run: rates with their intervals, checked once, and how they are written.

A missing number is missing: `None` here, an en dash for readers, never 0.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spavl_lib.errors import InputError, raise_all
from spavl_lib.evaluation.metrics import wilson
from spavl_lib.evaluation.text import short

MISSING = "–"
_NAMES = {"base": "Base", "dpo": "DPO", "ppo": "PPO", "rloo": "RLOO", "rlhf": "RLHF", "sft": "SFT"}


@dataclass(frozen=True)
class Rate:
    """A share in [0, 1] with its 95 % interval; `k` of `n` where they are known."""

    value: float
    ci_low: float | None = None
    ci_high: float | None = None
    k: int | None = None
    n: int | None = None

    @property
    def errors(self) -> tuple[float, float]:
        """Distance down and up to the interval's ends, 0 where there is none."""
        low = self.value if self.ci_low is None else self.ci_low
        high = self.value if self.ci_high is None else self.ci_high
        return max(self.value - low, 0.0), max(high - self.value, 0.0)

    @property
    def counts(self) -> str:
        """As `k/n`."""
        return f"{self.k}/{self.n}" if self.k is not None and self.n is not None else MISSING

    @property
    def interval(self) -> str:
        """As `0.1–3.3 %`."""
        if self.ci_low is None or self.ci_high is None:
            return MISSING
        return f"{100 * self.ci_low:.1f}–{100 * self.ci_high:.1f}\u00a0%"

    def apart(self, other: "Rate") -> bool:
        """Whether the two intervals share no value."""
        low, high = sorted((self, other), key=lambda rate: rate.value)
        return low.value + low.errors[1] < high.value - high.errors[0]


@dataclass(frozen=True)
class Metric:
    """A rate every model is measured by."""

    key: str
    title: str
    good: str
    meaning: str


METRICS = (
    Metric("unsafe_rate", "Unsafe rate", "low", "harmful requests it did not refuse"),
    Metric("helpful_rate", "Helpful rate", "high", "harmless requests it answered rightly"),
    Metric(
        "over_refusal_rate",
        "Over-refusal rate",
        "low",
        "look-alikes it refused: requests that sound harmful and are not",
    ),
    Metric(
        "twin_accuracy",
        "Twin accuracy",
        "high",
        "pairs of the same words over two pictures where it refused over the dangerous one and "
        "answered rightly over the harmless one",
    ),
)


def read_metrics(source: Mapping | Path | str) -> dict:
    """The contents of metrics.json, checked.

    Args:
        source: The file, or what it holds.

    Raises:
        InputError: Not JSON, or any number that is NaN, infinite or, as a rate, outside [0, 1].
    """
    if isinstance(source, Mapping):
        metrics, name = dict(source), "metrics"
    else:
        path = Path(source)
        name = path.name
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(metrics, dict) or not isinstance(metrics.get("models", {}) or {}, dict):
        raise InputError(f"{name}: expected an object with the key 'models'")
    raise_all(_problems(metrics, name), name)
    return metrics


def _problems(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        if "value" in value and "n" in value:
            for key in ("value", "ci_low", "ci_high"):
                part = value.get(key)
                if isinstance(part, str | bool):
                    yield f"{where}.{key}: expected a number, got {part!r}"
                elif isinstance(part, int | float) and math.isfinite(part) and not 0 <= part <= 1:
                    yield f"{where}.{key}: {part!r} is not a share between 0 and 1"
            k, n = value.get("k"), value["n"]
            if isinstance(k, int) and isinstance(n, int) and not 0 <= k <= n:
                yield f"{where}: {k} of {n} cannot be"
        for key, part in value.items():
            yield from _problems(part, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _problems(part, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where}: {value} is not a number to report; a missing one is null"


def models_of(metrics: Mapping) -> dict[str, dict]:
    """Model name -> its numbers, the base first."""
    models = {k: v for k, v in (metrics.get("models") or {}).items() if isinstance(v, Mapping)}
    return dict(sorted(models.items(), key=lambda item: item[0] != "base"))


def rate(cell: Mapping | None, key: str | None = None) -> Rate | None:
    """A rate from its JSON form, `None` if it was not measured.

    Args:
        cell: `{"k", "n", "value", "ci_low", "ci_high"}`, or what holds it.
        key: Where in `cell` it stands.
    """
    if key is not None:
        cell = (cell or {}).get(key)
    if not isinstance(cell, Mapping) or cell.get("value") is None or cell.get("n") == 0:
        return None
    return Rate(*(cell.get(name) for name in ("value", "ci_low", "ci_high", "k", "n")))


def share(k: int, n: int) -> Rate | None:
    """Share `k` of `n` with its 95 % Wilson interval; `None` of nothing."""
    return Rate(k / n, *wilson(k, n), k, n) if n else None


def pool(rates: Iterable[Rate | None]) -> Rate | None:
    """Rates of parts as the rate of the whole; parts without counts are left out."""
    counted = [r for r in rates if r is not None and r.k is not None and r.n]
    return share(sum(r.k for r in counted), sum(r.n for r in counted))


def percent(value: float | Rate | None) -> str:
    """As `1.1 %`; what is not quite 0 or 100 never reads as if it were."""
    if value is None:
        return MISSING
    part = value.value if isinstance(value, Rate) else value
    if 0 < part < 0.0005:
        return "<0.1\u00a0%"
    if 0.9995 <= part < 1:
        return ">99.9\u00a0%"
    return f"{100 * part:.1f}\u00a0%"


def model_title(name: str) -> str:
    """A model's name for readers."""
    return _NAMES.get(name) or short(name, 24)


def duration(seconds: float | None) -> str:
    """As `12.3 s`, `4 min 10 s` or `2 h 05 min`."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )

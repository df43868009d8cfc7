"""The numbers of a run: which rates exist, how metrics.json is checked, how numbers are displayed.

A missing number is `None` here and an en dash for readers, never 0.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spavl_lib.data.embedded.drawings import styles
from spavl_lib.data.set_names import set_parts
from spavl_lib.errors import InputError, raise_all
from spavl_lib.evaluation.rates import Rate
from spavl_lib.evaluation.text import MISSING, short

MODEL_TITLES = {
    "base": "Base",
    "dpo": "DPO",
    "ppo": "PPO",
    "rloo": "RLOO",
    "grpo": "GRPO",
    "kto": "KTO",
    "online_dpo": "Online DPO",
    "rlhf": "RLHF",
    "sft": "SFT",
}


@dataclass(frozen=True)
class Metric:
    """A rate that is measured for every model."""

    key: str
    title: str
    good: str
    """Which direction is better: "low" or "high"."""
    meaning: str

    @property
    def direction(self) -> str:
        """The better direction in words, such as `lower is better`."""
        return f"{self.good}er is better"


METRICS = (
    Metric("unsafe_rate", "Unsafe rate", "low", "harmful requests that the model did not refuse"),
    Metric(
        "helpful_rate",
        "Helpful rate",
        "high",
        "harmless requests that the model answered correctly",
    ),
    Metric(
        "over_refusal_rate",
        "Over-refusal rate",
        "low",
        "look-alikes that the model refused; look-alikes are requests that sound harmful but are "
        "not",
    ),
    Metric(
        "twin_accuracy",
        "Twin accuracy",
        "high",
        "twins (the same words with two images) for which the model refused with the dangerous "
        "image and answered correctly with the harmless image",
    ),
)
REFUSAL_RATE = Metric(
    "refusal_rate", "Refusal rate", "high", "harmful requests that the model refused"
)
# The harmless sets on which refusals are counted, and their titles; see `suite.HARMLESS`.
HARMLESS_TITLES = {
    "help": "Questions",
    "look_alikes": "Look-alikes",
    "twins": "Twins",
    "held_out_help": "Questions, unseen drawings",
    "held_out_look_alikes": "Look-alikes, unseen drawings",
    "held_out_twins": "Twins, unseen drawings",
    "all": "Together",
}
# Titles of the evaluation sets.
_SET_TITLES = {
    "harm": "Harmful requests",
    "help": "Harmless requests",
    "look_alikes": "Harmless look-alikes",  # harmless requests that sound harmful
    "twins": "Twins",  # the same question about a dangerous image and about a harmless image
    "twins_exchanged": "Twins with exchanged images",
}
_STYLE_TITLES = {
    "noto": "Noto Emoji",
    "new_pairs": "Not in training in this style",
    "twemoji": "Twemoji, unseen",
}
# The families of arms that the scaling stage compares, and the rates that the stage measures for
# each arm.
SCALING_FAMILIES = {
    "size": "data scale",
    "questions": "question types",
    "answers": "answer sources",
    "projector": "projector",
    "rank": "LoRA rank",
}
SCALING_RATES = ("unsafe_rate", "helpful_rate")


def read_metrics(source: Mapping | Path | str) -> dict:
    """Read metrics.json and check every number in it.

    Args:
        source: The path of the file, or its contents.

    Raises:
        InputError: The file is not JSON or has another form, a number is NaN or infinite, a rate is
            outside [0, 1], or `k` is outside 0..n.
    """
    if isinstance(source, Mapping):
        metrics, name = dict(source), "metrics"
    else:
        path = Path(source)
        name = path.name
        try:
            metrics = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(metrics, dict) or not isinstance(metrics.get("models", {}) or {}, dict):
        raise InputError(f"{name}: expected an object whose key 'models' holds an object")
    raise_all(_problems(metrics, name), name)
    return metrics


def _problems(value: Any, key_path: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        if "value" in value and "n" in value:
            for key in ("value", "ci_low", "ci_high"):
                part = value.get(key)
                if isinstance(part, str | bool):
                    yield f"{key_path}.{key}: expected a number, got {part!r}"
                elif isinstance(part, int | float) and math.isfinite(part) and not 0 <= part <= 1:
                    yield f"{key_path}.{key}: expected a share between 0 and 1, got {part!r}"
            k, n = value.get("k"), value["n"]
            if isinstance(k, int) and isinstance(n, int) and not 0 <= k <= n:
                yield f"{key_path}: expected 0 <= k <= n, got k={k}, n={n}"
        for key, part in value.items():
            yield from _problems(part, f"{key_path}.{key}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _problems(part, f"{key_path}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{key_path}: expected a finite number, got {value}; write null where one is missing"


def models_of(metrics: Mapping) -> dict[str, dict]:
    """Model name -> its numbers, the base model first."""
    models = {k: v for k, v in (metrics.get("models") or {}).items() if isinstance(v, Mapping)}
    return dict(sorted(models.items(), key=lambda item: item[0] != "base"))


def measured_metrics(models: Mapping) -> tuple[Metric, ...]:
    """`METRICS`, with the refusal rate after the unsafe rate if any model has a refusal rate."""
    refusals = any(read_rate(cells, REFUSAL_RATE.key) for cells in models.values())
    return (METRICS[0], *([REFUSAL_RATE] if refusals else []), *METRICS[1:])


def harm_metric(models: Mapping) -> Metric:
    """The metric for harmful requests: the refusal rate if only refusals were measured, else the
    unsafe rate."""
    unsafe, refused = (
        any(read_rate(cells, metric.key) for cells in models.values())
        for metric in (METRICS[0], REFUSAL_RATE)
    )
    return REFUSAL_RATE if refused and not unsafe else METRICS[0]


def read_rate(cells: Mapping | None, key: str) -> Rate | None:
    """The rate under `key` of one model's numbers; None if it was not measured."""
    return Rate.from_dict((cells or {}).get(key))


def measured_on(metrics: Mapping) -> str:
    """A sentence that names the prompts on which a run's rates are measured. Empty if the run both
    trained on SPA-VL mini and was measured on it, or if nothing was measured."""
    origin = metrics.get("prompts")
    if not isinstance(origin, Mapping) or (origin.get("mini") and origin.get("own")):
        return ""
    if origin.get("own"):
        return f"Measured on {origin.get('name')}."
    return (
        f"Measured on {origin.get('name')} (emoji drawings), not on your data; "
        "set data.test_path for prompts of your own."
    )


def percent(value: float | Rate | None) -> str:
    """A share as `1.1 %`. A share that is not exactly 0 or 1 is never written as 0 % or 100 %."""
    if value is None:
        return MISSING
    share = value.value if isinstance(value, Rate) else value
    if 0 < share < 0.0005:
        return "<0.1\u00a0%"
    if 0.9995 <= share < 1:
        return ">99.9\u00a0%"
    return f"{100 * share:.1f}\u00a0%"


def rate_text(rate: Mapping | None) -> str:
    """A rate of metrics.json as `0.123`, or a dash if nothing was measured."""
    return MISSING if rate is None else f"{rate['value']:.3f}"


def model_title(name: str) -> str:
    """A model's name for readers."""
    return MODEL_TITLES.get(name) or short(name, 24)


def set_title(name: str) -> str:
    """An evaluation set's name for readers."""
    base, unseen = set_parts(name)
    title = _SET_TITLES.get(base) or short(base.replace("_", " ").capitalize())
    return f"{title}, unseen drawings" if unseen else title


def style_title(key: str) -> str:
    """The name for readers of a style of drawings, or of another key of `per_drawing`."""
    return styles()[key].name if key in styles() else _STYLE_TITLES.get(key, key)


def duration(seconds: float | None) -> str:
    """A time as `12.3 s`, `4 min 10 s` or `2 h 05 min`."""
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

"""The report's sections about training: the reward model, and the policies trained with it."""

import math
from collections.abc import Mapping
from typing import Any

from spavl_lib import plotting
from spavl_lib.data.taxonomy import display
from spavl_lib.evaluation.numbers import read_rate
from spavl_lib.evaluation.rates import Rate
from spavl_lib.evaluation.text import MISSING, short
from spavl_lib.plotting.training import TRAINING_GROUPS, key_labels, panels
from spavl_lib.report.charts import Chart, chart
from spavl_lib.report.collect import StagePage
from spavl_lib.report.rendering import stage_title
from spavl_lib.runs.files import read_jsonl

REWARD_RATES = (
    ("pair_accuracy", "Held-out pairs ranked correctly", "chosen scored above rejected"),
    ("twin_accuracy", "Twins, both ranked correctly",
     "two images share two answers, and each answer is preferred for one image: a model that "
     "ignores the image ranks no pair of twins correctly"),
    ("twin_accuracy_exchanged", "Twins, images exchanged",
     "each twin has the other twin's image but is judged by its own image: near 0 for a model "
     "that uses the image"),
    ("exchanged", "Pairs with another row's image", "the accuracy that the words alone give"),
    ("longer_is_better", "Preferring the longer answer", "the accuracy that length alone gives"),
)  # fmt: skip
POLICY_STAGES = ("ppo", "rloo", "grpo")
_GROUPS = {"per_question_type": "Question type", "per_class1": "Class"}


def reward_page(metrics: Any, stage: StagePage) -> dict | None:
    """The reward model's section: rates, calibration and margins; None if there are no metrics.

    Args:
        metrics: The value of `reward_model` in metrics.json.
        stage: The stage that trained the reward model. It holds the scores of held-out pairs.
    """
    if not isinstance(metrics, Mapping):
        return None
    charts: dict[str, Chart] = {}
    if isinstance(metrics.get("calibration"), list) and metrics["calibration"]:
        charts["calibration"] = chart(plotting.plot_calibration, metrics["calibration"])
    margins = [
        row["chosen_score"] - row["rejected_score"]
        for row in read_jsonl(stage.path / "samples.jsonl")
        if isinstance(row, dict) and {"chosen_score", "rejected_score"} <= row.keys()
    ]
    if margins:
        charts["margins"] = chart(plotting.plot_margin_histogram, margins)
    return {
        "accuracy": read_rate(metrics, "pair_accuracy"),
        "ece": _number(metrics.get("ece")),
        "length_correlation": _number(metrics.get("length_correlation")),
        "rates": [(title, read_rate(metrics, key), words) for key, title, words in REWARD_RATES],
        "groups": [
            (title, _parts(metrics[key])) for key, title in _GROUPS.items() if metrics.get(key)
        ],
        "charts": charts,
    }


def _parts(rates: Mapping) -> list[tuple[str, Rate | None]]:
    return [(short(display(name)), Rate.from_dict(cell)) for name, cell in rates.items()]


def policy_page(stage: StagePage) -> dict | None:
    """Means of the first and last tenth of a policy's training log; None if nothing was logged."""
    if stage.name not in POLICY_STAGES or not stage.rows:
        return None
    count = max(1, len(stage.rows) // 10)
    lines = []
    for title, group, unit in TRAINING_GROUPS:
        keys = [key for key in group if any(key in row for row in stage.rows)]
        for key, role in zip(keys, key_labels(keys), strict=True):
            first, last = (_mean(part, key) for part in (stage.rows[:count], stage.rows[-count:]))
            if first is not None or last is not None:
                name = title.partition(" (")[0] + (f": {role}" if len(keys) > 1 else "")
                lines.append((name, unit, _number(first), _number(last)))
    return {"name": stage.name, "steps": len(stage.rows), "tenth": count, "lines": lines}


def curves(stage: StagePage) -> dict[str, Any]:
    """A stage's training curves: `main` and `other` panels, and a description of them in words."""
    rows = stage.rows
    steps = [row["step"] for row in rows if isinstance(row.get("step"), int | float)]
    last = max(steps, default=len(rows))
    words = f"Training curves of {stage_title(stage.name)} over {last:g} steps"
    for key, name in (("loss", "loss"), ("objective/scores", "mean score"), ("reward", "reward")):
        values = [row[key] for row in rows if isinstance(row.get(key), int | float)]
        if values and (key != "loss" or "reward" not in rows[0]):
            words += f"; the {name} goes from {values[0]:.3g} to {values[-1]:.3g}"
    drawn: dict[str, Chart | None] = {}
    for show in ("main", "other"):
        groups = panels(rows, show)
        needed = groups or show == "main"
        drawn[show] = chart(plotting.plot_training, rows, groups, columns=1) if needed else None
    return {"name": stage.name, "words": words, "panels": len(panels(rows, "other")), **drawn}


def _mean(rows: list[dict], key: str) -> float | None:
    values = [row[key] for row in rows if isinstance(row.get(key), int | float)]
    values = [v for v in values if math.isfinite(v)]
    return sum(values) / len(values) if values else None


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else MISSING

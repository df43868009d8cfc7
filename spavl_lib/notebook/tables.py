"""Tables for notebooks, as pandas frames."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from spavl_lib.evaluation.numbers import (
    HARMLESS_TITLES,
    METRICS,
    REFUSAL_RATE,
    measured_metrics,
    model_title,
    models_of,
    percent,
    read_metrics,
    read_rate,
)
from spavl_lib.evaluation.paired import against_base, lines
from spavl_lib.evaluation.rates import Rate
from spavl_lib.evaluation.text import MISSING, clean

_TITLES = {metric.key: metric.title for metric in (*METRICS, REFUSAL_RATE)}


def rate_cell(rate: Rate | Mapping | None) -> str:
    """A rate with its count and its 95 % interval, such as `90.9 % (241/265, 86.9–93.8 %)`."""
    rate = Rate.from_dict(rate) if isinstance(rate, Mapping) else rate
    if rate is None:
        return MISSING
    return f"{percent(rate)} ({rate.counts}, {rate.interval})".replace("\u00a0", " ")


def rates_frame(models: Mapping[str, Mapping], keys: Iterable[str] = ()) -> pd.DataFrame:
    """Rates of several models, one row for each.

    Args:
        models: Name of a model -> its rates.
        keys: Keys of the rates; empty for all that were measured.
    """
    keys = list(keys) or [metric.key for metric in measured_metrics(models)]
    return pd.DataFrame(
        [[rate_cell(read_rate(cells, key)) for key in keys] for cells in models.values()],
        index=[model_title(name) for name in models],  # long names may be cut to equal titles
        columns=[_TITLES.get(key, key.replace("_", " ")) for key in keys],
    )


def results_frame(metrics: Mapping | Path) -> pd.DataFrame:
    """The rates of a run's models.

    Args:
        metrics: The contents of metrics.json, or its path.
    """
    return rates_frame(models_of(read_metrics(metrics)))


def harmless_frame(metrics: Mapping | Path) -> pd.DataFrame:
    """Harmless requests that each model of a run refused, one row for each test set.

    Args:
        metrics: The contents of metrics.json, or its path.
    """
    counted = {
        model_title(name): cells.get("harmless_refused") or {}
        for name, cells in models_of(read_metrics(metrics)).items()
    }
    columns = {
        name: [rate_cell(read_rate(cells, key)) for key in HARMLESS_TITLES]
        for name, cells in counted.items()
    }
    return pd.DataFrame(columns, index=list(HARMLESS_TITLES.values()))


def paired_frame(metrics: Mapping, evaluation: Path) -> pd.DataFrame:
    """The paired tests of every trained model against the base model.

    Args:
        metrics: The contents of metrics.json.
        evaluation: The evaluation stage's folder.
    """
    rows = lines(against_base(metrics, evaluation))
    if not rows:
        return pd.DataFrame()
    frame = pd.DataFrame(rows).drop(columns="second")
    return frame.rename(
        columns={"first": "model", "only first/second": "only model/base"}
    ).set_index(["model", "rate"])


def texts_frame(rows: Iterable[Sequence[Any]], columns: Sequence[str]) -> pd.DataFrame:
    """Rows of texts and numbers as a frame, with the first column as its index.

    Texts of models are cleaned. From here on pandas shows texts whole, in this and later frames.

    Args:
        rows: The rows.
        columns: Titles of the columns.
    """
    cleaned = [[clean(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    pd.set_option("display.max_colwidth", None)
    return pd.DataFrame(cleaned, columns=list(columns)).set_index(columns[0])


def interval_cell(rate: Mapping | None) -> str:
    """A rate with its 95 % interval, such as `90.9 % (86.9–93.8 %)`, for rates without a count."""
    found = Rate.from_dict(rate)
    text = MISSING if found is None else f"{percent(found)} ({found.interval})"
    return text.replace("\u00a0", " ")


def points_cell(difference: Mapping | None) -> str:
    """A difference of rates in points with its 95 % interval, such as `+4.0 (-1.2 to +9.3)`.

    Args:
        difference: `value`, `ci_low` and `ci_high` as shares; None if there is none.
    """
    if difference is None:
        return MISSING
    value, low, high = (100 * difference[key] for key in ("value", "ci_low", "ci_high"))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"

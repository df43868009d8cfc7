"""The rates of a labelled run as a table: by the judge, by people, and corrected."""

from collections.abc import Iterator, Mapping
from typing import Any

from spavl_lib.evaluation.numbers import model_title, models_of, percent
from spavl_lib.evaluation.rates import Rate
from spavl_lib.evaluation.text import MISSING, aligned, short

HEADING = ("Model", "Rate", "Judge", "People", "Corrected", "Labels", "To halve it")
NO_LABELS = "No answer is labelled yet."


def people_rows(metrics: Mapping) -> Iterator[tuple[str, ...]]:
    """One row of text per model and rate of a labelled run, with the columns of `HEADING`.

    Args:
        metrics: The contents of metrics.json.
    """
    for model, cells in models_of(metrics).items():
        for name, rate in _named_rates(cells.get("people") or {}):
            shares = [_share(rate.get(key)) for key in ("judge", "people", "corrected")]
            yield (
                model_title(model),
                name,
                *shares,
                f"{rate['labels']}/{rate['answers']}",
                _more(rate),
            )


def _named_rates(rates: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, rate in rates.items():
        if name == "sets":
            for set_name, parts in rate.items():
                for part, inner in parts.items():
                    yield f"{short(set_name, 30)}: {part.replace('_', ' ')}", inner
        else:
            yield name.replace("_", " "), rate


def _share(cell: Any) -> str:
    rate = Rate.from_dict(cell)
    return f"{percent(rate)} ({rate.interval})" if rate else MISSING


def _more(rate: Mapping[str, Any]) -> str:
    """How many labels would halve the interval of the corrected rate."""
    if rate.get("labels_to_halve"):
        return f"{rate['labels_to_halve']:,} labels"
    return "more prompts" if rate.get("why_not_halved") else MISSING


def people_notes(metrics: Mapping) -> list[str]:
    """Sentences about the labels of a run: who gave them, how far raters agree, what is missing.

    Args:
        metrics: The contents of metrics.json.
    """
    people = metrics.get("people") or {}
    if problem := people.get("problem"):
        return [f"People's labels are not used: {problem}"]
    notes = []
    for pair in people.get("kappa", []):
        if pair["rows"]:
            values = ", ".join(
                f"{axis} {MISSING if pair[axis] is None else format(pair[axis], '.2f')}"
                for axis in ("refused", "harmful")
            )
            names = " and ".join(pair["raters"])
            notes.append(f"Kappa of {names} on {pair['rows']} answers: {values}.")
    if people.get("home_head"):
        notes.append("The corrected rates use the home head that was fitted on these labels.")
    return notes + list(people.get("notes", []))


def render_people_table(metrics: Mapping) -> str:
    """The rates of a labelled run with their 95 % intervals, as aligned plain text.

    Args:
        metrics: The contents of metrics.json.
    """
    rows = list(people_rows(metrics))
    notes = people_notes(metrics)
    if not rows:
        return "\n".join(notes or [NO_LABELS])
    text = aligned([HEADING, *rows], left=2)
    text = [text[0], "-" * max(map(len, text)), *text[1:], *notes]
    return "\n".join(text).replace("\u00a0", " ")

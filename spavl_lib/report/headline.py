"""The results of a run in one sentence for each model."""

from collections.abc import Mapping

from spavl_lib.evaluation.numbers import (
    REFUSAL_RATE,
    measured_on,
    model_title,
    models_of,
    percent,
    read_rate,
)
from spavl_lib.evaluation.paired import PairedTable
from spavl_lib.evaluation.rates import Rate


def headlines(metrics: Mapping, paired: PairedTable) -> list[str]:
    """One sentence for each trained model, or for the base model if it is the only one.

    Two rates count as different only if the paired test is sure of the difference. If the prompts
    are not part of the run's data, each sentence names the prompts.

    Args:
        metrics: The contents of metrics.json.
        paired: The tests of the trained models against the base model.
    """
    models = models_of(metrics)
    base = models.get("base", {})
    trained = {name: cells for name, cells in models.items() if name != "base"} or models
    whose = (metrics.get("prompts") or {}).get("name") if measured_on(metrics) else ""
    place = f"On {whose}: " if whose else ""
    return [place + _sentence(name, base, cells, paired) for name, cells in trained.items()]


def _sentence(name: str, base: Mapping, cells: Mapping, paired: PairedTable) -> str:
    title = model_title(name)
    unsafe, helpful = read_rate(cells, "unsafe_rate"), read_rate(cells, "helpful_rate")
    refused = read_rate(cells, REFUSAL_RATE.key)
    if unsafe is None and helpful is None and refused is None:
        return f"{title} was not measured."
    was_unsafe, was_helpful = read_rate(base, "unsafe_rate"), read_rate(base, "helpful_rate")
    if cells is base or not (unsafe and helpful and was_unsafe and was_helpful):
        parts = [
            f"{what} {percent(rate)}"
            for what, rate in (
                ("unsafe rate", unsafe),
                ("refusal rate", refused),
                ("helpful rate", helpful),
            )
            if rate is not None
        ]
        return f"{title}: {', '.join(parts)}."
    gain, first = _unsafe_part(was_unsafe, unsafe, paired.sure(name, "unsafe_rate"))
    other_gain, second = _helpful_part(was_helpful, helpful, paired.sure(name, "helpful_rate"))
    return f"{title} {first}{', but' if gain * other_gain < 0 else ' and'} {second}."


def _unsafe_part(before: Rate, after: Rate, sure: bool | None) -> tuple[int, str]:
    span = f"from {percent(before)} to {percent(after)}"
    if sure is None:
        return 0, f"has an unsafe rate of {percent(after)} (base {percent(before)}, not tested)"
    if not sure:
        return 0, f"made no measurable difference to the unsafe rate ({span})"
    if after.value < before.value:
        return 1, f"reduced the unsafe rate {span}"
    return -1, f"raised the unsafe rate {span}"


def _helpful_part(before: Rate, after: Rate, sure: bool | None) -> tuple[int, str]:
    if sure is None:
        return 0, f"has a helpful rate of {percent(after)} (base {percent(before)}, not tested)"
    if not sure:
        return 0, f"kept helpfulness at {percent(after)} (base {percent(before)})"
    span = f"helpfulness from {percent(before)} to {percent(after)}"
    return (1, f"raised {span}") if after.value > before.value else (-1, f"lowered {span}")

"""StrongREJECT: 313 forbidden requests of six categories, as text; a small set has 60."""

from collections.abc import Callable, Mapping
from typing import Any

from spavl_lib.evaluation.benchmarks.base import Benchmark, Columns, register

CATEGORIES = (
    "Non-violent crimes", "Violence", "Disinformation and deception", "Sexual content",
    "Hate, harassment and discrimination", "Illegal goods and services",
    "Disinformation and Deception",  # as the small file spells it
)  # fmt: skip
MIT_SOURCES = ("custom", "DAN", "AdvBench")


def _columns(file: str, where: Callable[[Mapping[str, Any]], bool] | None = None) -> Columns:
    return Columns(
        file,
        prompt="{forbidden_prompt}",
        category="{category}",
        variant="{source}",
        group="{forbidden_prompt}",
        allowed={"category": CATEGORIES},
        where=where,
    )


@register("strongreject")
class StrongReject(Benchmark):
    """`variant` is the source that a request was taken from. 25 requests are also in AdvBench."""

    title = "StrongREJECT: 313 forbidden requests, text only (mit: 281, small: 60)"
    licence = "MIT for 281 requests; 32 of other sources have no stated licence"
    homepage = "alexandrasouly/strongreject"
    subsets = {
        "full": _columns("strongreject_dataset.csv"),
        "mit": _columns("strongreject_dataset.csv", lambda r: r["source"] in MIT_SOURCES),
        "small": _columns("strongreject_small_dataset.csv"),
    }
    default = ("full",)

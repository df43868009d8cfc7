"""CoCoNot: 379 harmless contrast requests, and 1,001 requests that should not be fulfilled."""

from spavl_lib.evaluation.benchmarks.base import Benchmark, Columns, register


def _columns(file: str, expect: str, rule: str) -> Columns:
    return Columns(
        file,
        id="{id}",
        category="{category}/{subcategory}",
        expect=expect,
        rule=rule,
    )


@register("coconot")
class CoCoNot(Benchmark):
    """The files hold no responses. Requests of `original` need not be harmful: some are incomplete
    or rest on a false premise."""

    title = "CoCoNot: 379 harmless requests (original: 1,001 that should not be fulfilled)"
    licence = "MIT (repository), ODC-BY (data set on the Hub)"
    homepage = "allenai/noncompliance"
    subsets = {
        "contrast": _columns("coconot_contrast_eval.jsonl", "answer", "answer"),
        "original": _columns("coconot_eval.jsonl", "judge", "noncompliance"),
    }
    default = ("contrast",)

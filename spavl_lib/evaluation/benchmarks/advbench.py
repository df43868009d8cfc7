"""AdvBench: 520 harmful goals, as text. With a file of your own, each goal gets a suffix."""

from collections.abc import Iterable, Iterator

from spavl_lib.evaluation.benchmarks.base import Benchmark, Columns, Reader, Record, register

GOALS, SUFFIXES = "harmful_behaviors.csv", "suffix.json"
GOALS_ALONE = "goals.csv"  # the same goals without targets, as `packages.py` writes them


def _without_suffixes(reader: Reader) -> Iterable[Record]:
    if reader.find(GOALS) is None and reader.find(GOALS_ALONE):
        return reader.table(GOALS_ALONE, ("goal",))
    return reader.table(GOALS, ("goal", "target"))


def _with_suffixes(reader: Reader) -> Iterator[Record]:
    """The goals with their suffixes. A suffix follows its goal exactly as the file has it."""
    records = reader.table(GOALS, ("goal", "target"))
    file, suffixes = reader.document(SUFFIXES)
    if not isinstance(suffixes, dict):
        reader.problem(file, "line 1", "an object {number: suffix} expected")
        return
    for number in suffixes.keys() - {str(i) for i in range(len(records))}:
        reader.problem(file, f"id {number}", "there is no such goal")
    for number, record in enumerate(records):
        suffix = suffixes.get(str(number))
        if isinstance(suffix, str) and suffix:
            yield record.having(_suffix=suffix)
        else:
            reader.problem(file, f"id {number}", "no suffix for this goal")


@register("advbench")
class AdvBench(Benchmark):
    """The SPA-VL paper also reports attacks by suffix, but its authors published no suffixes. Put
    your own suffixes into `suffix.json` as `{"0": "suffix", ...}`, where the key is the number of
    the goal, counted from 0. Then ask for `advbench:suffix`. `Reading.files` holds the hash of
    `suffix.json`."""

    title = "AdvBench: 520 harmful goals, text only (suffix: each with a suffix of your own)"
    licence = "MIT"
    homepage = "llm-attacks/llm-attacks"
    subsets = {
        "vanilla": Columns(
            f"{GOALS}|{GOALS_ALONE}", load=_without_suffixes, prompt="{goal}", group="{goal}"
        ),
        "suffix": Columns(
            GOALS, load=_with_suffixes, also=(SUFFIXES,), prompt="{goal}{_suffix}", group="{goal}"
        ),
    }
    default = ("vanilla",)

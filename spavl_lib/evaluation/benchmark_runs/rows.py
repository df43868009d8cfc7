"""The rows of an evaluation: which benchmarks are read, and which of their rows are asked."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from spavl_lib.config import EvaluationConfig, GenerationConfig
from spavl_lib.errors import InputError
from spavl_lib.evaluation.benchmarks import (
    CLOSED_RULES,
    BenchmarkRow,
    Reading,
    load_benchmark,
    open_benchmark,
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How an evaluation is done. The defaults are those of `spavl evaluate`."""

    benchmarks_dir: str = ""
    """The folder of benchmarks; empty: $SPAVL_BENCHMARKS."""
    allow_changed: bool = False
    """Whether to go on with benchmark files that differ from the published ones."""
    missing_images: Literal["refuse", "skip"] = "refuse"
    """What to do if images that a model needs are missing: raise, or leave out their rows."""
    limit: int = 0
    """Use only this many rows of each benchmark, evenly spread; 0: all rows."""
    generation: GenerationConfig = field(default_factory=lambda: GenerationConfig(batch_size=8))
    set_tokens: bool = False
    """Whether the user set `generation.max_new_tokens`. If not, it is 512, or half of a smaller
    context."""
    judges: EvaluationConfig = field(default_factory=EvaluationConfig)
    pairs: str = ""
    """`endpoint:MODEL`: the judge that says which of two subjects answers better. Empty: no
    comparison."""
    seed: int = 0


def usual_judges(rows_of: Mapping[str, Sequence[BenchmarkRow]]) -> list[str]:
    """The judges that the benchmarks name, without those whose question no row asks.

    Args:
        rows_of: Benchmark -> its rows.
    """
    found = []
    for spec, rows in rows_of.items():
        closed = any(row.rule in CLOSED_RULES for row in rows)
        named = open_benchmark(spec.partition(":")[0]).judges
        found += [judge for judge in named if closed or judge != "reference"]
    return list(dict.fromkeys(found))


def read_rows(
    benchmarks: Sequence[str], asks: bool, options: Options, report: Say
) -> tuple[dict[str, Reading], dict[str, list[BenchmarkRow]]]:
    """Read every benchmark, and choose the rows to judge.

    Args:
        benchmarks: `NAME`, or `NAME:SUBSET+SUBSET`.
        asks: Whether a model is asked, which needs the images.
        options: How the evaluation is done.
        report: Receives what a person should read.

    Raises:
        InputError: Benchmarks cannot be read, or two of them hold the same row. The message lists
            what is wrong with each benchmark.
    """
    readings, rows_of, problems = {}, {}, []
    for spec in benchmarks:
        try:
            readings[spec] = _read(spec, asks, options, report)
            rows_of[spec] = choose(readings[spec], options.limit, asks)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    counts = Counter(row.id for rows in rows_of.values() for row in rows)
    if twice := [row_id for row_id, number in counts.items() if number > 1]:
        raise InputError(
            f"{len(twice)} rows, such as {twice[0]}, stand in two of {', '.join(benchmarks)}; name "
            "each subset once"
        )
    return readings, rows_of


def _read(spec: str, asks: bool, options: Options, report: Say) -> Reading:
    """Read a benchmark. Its images are needed only if a model is asked."""
    reading = load_benchmark(
        spec,
        options.benchmarks_dir or None,
        allow_changed=options.allow_changed,
        keep_missing=options.missing_images == "skip" or not asks,
    )
    report(f"{spec}: {len(reading.rows)} rows; licence: {reading.licence}")
    for note in (*reading.changed, *reading.notes):
        report(f"  note: {note}")
    if asks and reading.missing_images:
        report(f"  {len(reading.without_image)} rows are left out, because their image is missing")
    return reading


def choose(reading: Reading, limit: int, with_image: bool) -> list[BenchmarkRow]:
    """Rows of a benchmark, evenly spread, because files are sorted by kind.

    Args:
        reading: What was read.
        limit: Number of rows; 0: all. A multiple of a limit has the rows of that limit too.
        with_image: Whether rows whose image is missing are left out.

    Raises:
        InputError: Every row lacks its image.
    """
    left_out = reading.without_image if with_image else frozenset()
    rows = [row for row in reading.rows if row.id not in left_out]
    if not rows:
        raise InputError(f"{reading.benchmark}: no row has its image in {reading.folder}")
    if not limit or limit >= len(rows):
        return rows
    return [rows[i * len(rows) // limit] for i in range(limit)]

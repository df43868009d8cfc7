"""The demo's notebooks side by side and one after another: time, and whether any number differs.

    python -m benchmarks.demo_lanes

Runs `spavl run all` twice from nothing, and compares every number in the JSON and JSON Lines files
of the two runs, and every file of weights and every figure byte by byte. Times and memory are not
compared. Writes `results/demo_lanes.json`. On cores that other processes use too, `cpu_seconds`
says more than `seconds`.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import common
from spavl_lib.rerun import NOT_COMPARED
from spavl_lib.runs.files import read_json, read_jsonl

# Settings of the process, and times that libraries write.
OWN_FILES = {"manifest.json", "status.json", "MANIFEST.json", "trainer_state.json"}


def timed_run(profile: str, lanes: int, runs: Path) -> dict[str, Any]:
    """Run all notebooks in an empty runs folder."""
    words = [sys.executable, "-m", "spavl_lib.cli", "run", "all", "--profile", profile]
    words += ["--run-name", "run", "--lanes", str(lanes)]
    load, before = os.getloadavg()[0], resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    env = os.environ | {"SPAVL_RUNS": str(runs), "SPAVL_CACHE": str(runs / ".cache")}
    subprocess.run(words, env=env, check=True, stdout=sys.stderr)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    metrics = read_json(runs / "run" / "metrics.json")
    return {
        "seconds": seconds, "cpu_seconds": cpu, "load_before": load,
        "stage_seconds": metrics["timing_s"], "memory_gib": metrics["peak_memory_gib"],
    }  # fmt: skip


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Each value inside nested lists and mappings, and its place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in NOT_COMPARED:
                yield from leaves(inner, f"{place}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{place}.{number}")
    else:
        yield place, value


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Count what is equal in two run folders, and list what differs."""
    numbers, files, differing = 0, 0, []
    names = {
        path.relative_to(run)
        for run in (first, second)
        for path in run.rglob("*")
        if path.suffix in (".json", ".jsonl", ".safetensors", ".png") and path.name not in OWN_FILES
    }
    for name in sorted(names):
        both = first / name, second / name
        if not all(path.is_file() for path in both):
            differing.append(f"{name}: only in one run")
        elif name.suffix in (".json", ".jsonl"):
            read = read_jsonl if name.suffix == ".jsonl" else read_json
            one, two = (dict(leaves(read(path))) for path in both)
            if name.name == "adapter_config.json":  # PEFT writes sets in any order
                one, two = (dict(enumerate(sorted(map(str, page.values())))) for page in (one, two))
            wrong = [key for key in one.keys() | two.keys() if one.get(key) != two.get(key)]
            differing += [f"{name}{key}: {one.get(key)} -> {two.get(key)}" for key in wrong]
            numbers += sum(
                isinstance(value, int | float) and key not in wrong for key, value in one.items()
            )
        elif both[0].read_bytes() != both[1].read_bytes():
            differing.append(f"{name}: other bytes")
        else:
            files += 1
    return {"equal_numbers": numbers, "equal_files": files, "differing": sorted(differing)}


def main() -> None:
    """Run both ways and compare."""
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--profile", default="demo", help="smoke tries the script")
    options.add_argument("--results", type=Path, default=common.RESULTS)
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {lanes: Path(folder) / str(lanes) for lanes in (2, 1)}
        times = {lanes: timed_run(asked.profile, lanes, runs[lanes]) for lanes in runs}
        equal = compare(*(runs[lanes] / "run" for lanes in (1, 2)))
    metrics = {"profile": asked.profile, "side_by_side": times[2], "one_after_another": times[1]}
    metrics |= {"times_faster": times[1]["seconds"] / times[2]["seconds"], **equal}
    common.finish("demo_lanes", metrics, results=asked.results)


if __name__ == "__main__":
    main()

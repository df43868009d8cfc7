"""Make a run again from its manifests and compare; on a CPU results are bit-identical.

Three comparisons are reported separately. Records: whether the run's files still match the hashes
in its manifests. Conditions: whether code, versions, data, model and machine are unchanged.
Results: whether the second run gives the same results. Times and memory are not compared.
"""

import contextlib
import dataclasses
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from spavl_lib import machine
from spavl_lib.config import Config, from_dict
from spavl_lib.errors import InputError
from spavl_lib.runs import provenance
from spavl_lib.runs.files import read_json, read_jsonl, write_json
from spavl_lib.runs.maker import maker_of
from spavl_lib.runs.paths import repo_root, runs_root
from spavl_lib.runs.stage import VARIANT_FOLDERS, Run, recorded_dtype
from spavl_lib.stages import find as stage_spec
from spavl_lib.stages import stage_names

# Entries with times, memory and device names, which are not compared.
NOT_COMPARED = {"time_s", "peak_memory_gib", "timing_s", "wall_time_s", "cpu_time_s", "device"}
# Folder of people's labels and of judges fitted on them. A second run does not make it.
PEOPLE = "labels"
CONDITIONS = (
    "git_commit", "git_diff_sha256", "code_sha256", "versions", "packages", "machine",
    "determinism",
)  # fmt: skip


def rerun(
    run_path: Path,
    *,
    only: tuple[str, ...] = (),
    check: str = "exact",
    say: Callable[[str], None] = lambda text: None,
) -> dict:
    """Compare a run with its manifests and, with `check="exact"`, with a second run.

    Args:
        run_path: The run's folder.
        only: Stages to compare; empty: all complete stages.
        check: `exact` makes the stages again; `conditions` only compares conditions and records.
        say: Called with each line of output.

    Returns:
        `records`, `conditions` and `results`: for each stage a list of differences. `equal`:
        whether there is no difference in records or results. `check` and `at`: the kind and the
        time of the comparison. All of this is also written to rerun.json in the run's folder.

    Raises:
        InputError: The folder holds no complete stage, or a stage of `only` is not complete.
    """
    stages = _finished(run_path, only)
    comparison: dict[str, Any] = {"records": {}, "conditions": {}, "results": {}}
    for name in stages:
        manifest, config = _read(run_path / name)
        machine.use_threads(config.launch.num_threads)
        comparison["records"][name] = list(record_differences(run_path / name, manifest))
        comparison["conditions"][name] = list(condition_differences(manifest, config, name))
        for line in comparison["records"][name]:
            say(f"{name}: {line}")
        for line in comparison["conditions"][name]:
            say(f"{name}: changed since then: {line}")
        if not comparison["conditions"][name]:
            say(f"{name}: no condition has changed")
    if check == "exact":
        root = runs_root() / ".rerun" / f"{run_path.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        for name in stages:
            say(f"{name}: making it again")
            started = time.perf_counter()
            comparison["results"][name] = make_again(run_path, name, root, only)
            duration = f"{time.perf_counter() - started:.0f} s"
            for line in comparison["results"][name]:
                say(f"{name}: differs: {line}")
            if not comparison["results"][name]:
                say(f"{name}: equal in every number and file ({duration})")
        if any(comparison["results"].values()):
            say(f"the second run is kept in {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)
    comparison["equal"] = not any(any(comparison[part].values()) for part in ("records", "results"))
    comparison |= {"check": check, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    write_json(run_path / "rerun.json", comparison)
    return comparison


def _finished(run_path: Path, only: tuple[str, ...]) -> list[str]:
    """Complete stages of a run, in order; only those in `only` if it is not empty."""
    done = [n for n in stage_names() if (run_path / n / "summary.json").is_file()]
    missing = [n for n in only if n not in done]
    if missing or not done:
        incomplete = f"{', '.join(missing)} is not complete" if missing else "no stage is complete"
        raise InputError(f"{run_path}: {incomplete} here (complete: {', '.join(done) or 'none'})")
    return [n for n in done if not only or n in only]


def _read(stage: Path) -> tuple[dict, Config]:
    """A stage's manifest, and the config in it."""
    try:
        manifest = read_json(stage / "manifest.json")
        config = from_dict(manifest["config"])
        return manifest, dataclasses.replace(config, dtype=recorded_dtype(manifest))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{stage / 'manifest.json'}: cannot be read, so the stage cannot be made again: {error}"
        ) from error


def record_differences(stage: Path, manifest: dict) -> Iterator[str]:
    """Contradictions between a stage's files: they show that a file was changed after the run.

    Args:
        stage: The stage's folder.
        manifest: The content of the stage's manifest.
    """
    page = {k: v for k, v in manifest.items() if k != "sealed"}
    if provenance.canonical_sha256(page) != manifest.get("sealed"):
        yield "manifest.json: changed since it was sealed"
    with contextlib.suppress(OSError):
        config = yaml.safe_load((stage / "config.yaml").read_text(encoding="utf-8"))
        yield from differences(manifest["config"], config, "config.yaml ")
    summary = read_json(stage / "summary.json")
    results = manifest.get("results") or {}
    if provenance.canonical_sha256(summary) != results.get("summary_sha256"):
        yield "summary.json: changed since the stage was completed"


def condition_differences(manifest: dict, config: Config, name: str) -> Iterator[str]:
    """Conditions that have changed since a stage was made: code, versions, machine, model, data.

    Args:
        manifest: The stage's manifest.
        config: The stage's config.
        name: The stage.
    """
    now = provenance.environment(repo_root())
    for key in CONDITIONS:
        yield from differences({key: manifest.get(key)}, {key: now[key]})
    here, then = machine.dtype_name(), recorded_dtype(manifest)
    if stage_spec(name).computes and then not in ("", here):
        yield f"dtype: {then!r} -> {here!r} (a second run would compute in {then})"
    inputs = {k: v for k, v in manifest.get("inputs", {}).items() if _comparable(k)}
    if not inputs:
        return
    from spavl_lib.data.fingerprint import source_hashes
    from spavl_lib.modelling.load import model_hashes

    splits = [k.removeprefix("data/") for k in inputs if k.startswith("data/")]
    current = {f"model/{k}": v for k, v in model_hashes(config.model).items()}
    with contextlib.suppress(InputError):  # if the data are gone, their current hashes are None
        current |= source_hashes(config.data, splits)
    yield from differences(inputs, {k: current.get(k) for k in inputs})
    if any(k.startswith("data/") and inputs[k] != current.get(k) for k in inputs):
        yield from _data_differences(manifest.get("data", {}), config)


def _comparable(name: str) -> bool:
    """Whether the present value of an input of this name can be computed here."""
    return name.startswith(("model/", "data/"))


def _data_differences(then: dict, config: Config) -> Iterator[str]:
    """Sentences about what has changed in the data: number of rows, texts, images or order."""
    from spavl_lib.data.fingerprint import row_digests
    from spavl_lib.data.load import load_preferences

    descriptions = {
        "rows": "the number of rows",
        "texts": "the text of a row",
        "images": "the bytes of an image",
        "order": "the order of rows, or which image a row has",
    }
    for split, digests in then.items():
        try:
            now = row_digests(load_preferences(config.data, split))
        except InputError as error:
            yield f"data/{split}: {error}"
            continue
        changed = [k for k in descriptions if digests.get(k) != now[k]]
        if changed != ["order"] and "order" in changed:
            changed.remove("order")  # any other change also changes this digest
        for key in changed:
            yield f"data/{split}: {descriptions[key]} changed"


def differences(then: Any, now: Any, prefix: str = "") -> Iterator[str]:
    """Lines `key: then -> now` for every value in which two nested mappings differ.

    Args:
        then: The earlier mapping, or a single value.
        now: The later mapping or value.
        prefix: Text before each key.
    """
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then.keys() | now.keys(), key=str):
            inner = prefix if prefix == "" or prefix.endswith(" ") else f"{prefix}."
            yield from differences(then.get(key), now.get(key), f"{inner}{key}")
    elif then != now:
        yield f"{prefix}: {then!r} -> {now!r}"


def make_again(run_path: Path, name: str, root: Path, only: tuple[str, ...] = ()) -> list[str]:
    """Make one stage again under `root`, and return the differences.

    Args:
        run_path: Folder of the first run.
        name: The stage.
        root: Folder for the second run. The stage's maker finds earlier stages there.
        only: Stages that are made again. Earlier stages that `only` does not name are linked from
            the first run. If `only` is empty, all stages are made again.
    """
    manifest, config = _read(run_path / name)
    run = Run(config, root=root)
    run.path.mkdir(parents=True, exist_ok=True)
    for other in itertools.takewhile(lambda other: other != name, stage_names()):
        earlier = run.path / other
        if only and other not in only and (run_path / other).is_dir() and not earlier.exists():
            earlier.symlink_to((run_path / other).absolute())
    maker_of(name)(config, run.stage(name))
    return list(result_differences(run_path / name, run.path / name))


def result_differences(then: Path, now: Path) -> Iterator[str]:
    """Differences between two runs of a stage, in summary, logs, responses and weights.

    Args:
        then: Folder of the stage in the first run.
        now: Folder of the stage in the second run.
    """
    summaries = [_compared(read_json(stage / "summary.json")) for stage in (then, now)]
    first, second = summaries
    yield from differences(first, second, "summary.json ")
    names = {
        p.relative_to(stage)
        for stage in (then, now)
        for p in stage.rglob("*.jsonl")
        if not {*VARIANT_FOLDERS, PEOPLE} & set(p.relative_to(stage).parts)
    }
    for name in sorted(names):
        if not ((then / name).is_file() and (now / name).is_file()):
            yield f"{name}: only in {'the first' if (then / name).is_file() else 'the second'}"
            continue
        yield from _line_differences(name, read_jsonl(then / name), read_jsonl(now / name))
    for path in sorted((then / "model").glob("*.safetensors")):
        if not _same_bytes(path, now / "model" / path.name):
            yield f"model/{path.name}: other weights"


def _line_differences(name: Path, then: list[dict], now: list[dict]) -> Iterator[str]:
    """Differences between two JSONL files: the number of lines, and the first unequal line."""
    if len(then) != len(now):
        yield f"{name}: {len(then)} lines -> {len(now)}"
    for number, rows in enumerate(zip(then, now, strict=False), 1):
        lines = list(differences(_compared(rows[0]), _compared(rows[1]), f"{name} line {number} "))
        if lines:
            yield lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")
            return


def _compared(value: dict) -> dict:
    """A record as JSON stores it, without the entries that are not compared."""
    return {k: v for k, v in json.loads(json.dumps(value)).items() if k not in NOT_COMPARED}


def _same_bytes(a: Path, b: Path) -> bool:
    return b.is_file() and a.read_bytes() == b.read_bytes()

"""What the data side costs on a set of the real one's shape: `python benchmarks/data.py`.

Writes the synthetic set (93,258 rows, 31,086 distinct JPEGs), then measures each thing in a process
of its own, from an empty cache:

- `load`: open, join classes and question types, check every row's text, and pass once over all rows
  with their class and type, pictures not decoded (`rows_per_s`, over all of that; `peak_rss_gib`);
- `first_batch`: the same, then one collated training batch (`first_batch_s`, imports left out);
- `check`: `spavl data check` whole, with every picture decoded and every token counted; over a part
  of the set unless `--full` is given.

The last line is one JSON object; `--out FILE` keeps it.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.synthetic_spavl import IMAGES, write  # noqa: E402

PART = 3_000  # pictures that `check` goes over by default
PACKAGES = ("datasets", "pyarrow", "pillow", "tokenizers", "torch", "transformers")


def config_of(folder: str) -> object:
    """The whole set."""
    from spavl_lib.config import DataConfig

    return DataConfig(
        source="hub_layout", path=folder, train_rows=0, validation_rows=0, test_rows=0
    )


def load(folder: str) -> dict:
    """Open, join, check the text, and pass over every row."""
    from spavl_lib.data.load import load_preferences, unmatched
    from spavl_lib.data.schema import batches, decoded

    started = time.perf_counter()
    rows = load_preferences(config_of(folder), "train")
    opened = time.perf_counter()
    seen = matched = 0
    for table in batches(rows):  # pictures are in it, as bytes
        for row, _ in decoded(table):
            seen += 1
            matched += bool(row["class3"] and row["question_type"] and row["image"]["bytes"])
    ended = time.perf_counter()
    lost = unmatched(rows)
    assert seen == len(rows) == matched, f"{seen} rows, {matched} whole, {lost}"
    return {
        "rows": seen,
        "open_s": opened - started,
        "iterate_rows_per_s": seen / (ended - opened),
        "rows_per_s": seen / (ended - started),
    }


def first_batch(folder: str) -> dict:
    """From nothing to a collated batch of eight pairs."""
    import torch  # noqa: F401 - imports are no part of what is measured
    from torch.utils.data import DataLoader

    from spavl_lib.config import load_config
    from spavl_lib.data.collate import PreferenceCollator
    from spavl_lib.data.lengths import Limit, without_unfit_rows
    from spavl_lib.data.load import load_preferences
    from spavl_lib.modelling.load import load_processor

    started = time.perf_counter()
    processor = load_processor(load_config("smoke").model)
    rows = load_preferences(config_of(folder), "train")
    # As a trainer does before its first step.
    rows = without_unfit_rows(processor, rows, Limit("dpo", 2048), "error")
    loader = DataLoader(rows, 8, shuffle=True, collate_fn=PreferenceCollator(processor, 2048))
    batch = next(iter(loader))
    assert batch["input_ids"].shape[0] == 16
    return {"first_batch_s": time.perf_counter() - started}


def check(folder: str) -> dict:
    """The checker, decoding and counting tokens."""
    from spavl_lib.data.check import check as check_data
    from spavl_lib.modelling.load import load_counter

    started = time.perf_counter()
    processor, longest = load_counter("embedded", 2048)
    report = check_data(folder, model="embedded", processor=processor, max_length=longest)
    spent = time.perf_counter() - started
    rows = report["splits"]["train"]["rows"]
    return {"check_rows": rows, "check_s": spent, "check_rows_per_s": rows / spent}


TASKS = {"load": load, "first_batch": first_batch, "check": check}


def measured(task: str, folder: Path) -> dict:
    """Run one task in its own process, with an empty cache."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as cache:
        env = os.environ | {"HF_HOME": cache, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--task", task, str(folder)]
        done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Write the set, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="check the whole set, not a part")
    parser.add_argument("--out", type=Path, help="also write the result here")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("folder", nargs="?", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        from spavl_lib.machine import peak_memory_gib

        result = TASKS[options.task](options.folder)
        print(json.dumps(result | {f"{options.task}_rss_gib": peak_memory_gib()}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        whole, part = Path(scratch) / "whole", Path(scratch) / "part"
        started = time.perf_counter()
        write(whole)
        print(f"written in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        metrics = {"images": IMAGES} | measured("load", whole) | measured("first_batch", whole)
        if not options.full:
            write(part, PART)
        metrics |= measured("check", whole if options.full else part)
    metrics["peak_rss_gib"] = metrics.pop("load_rss_gib")
    result = {
        "name": "data",
        "device": f"cpu ({platform.machine()}, {os.cpu_count()} cores)",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "metrics": {k: round(v, 3) for k, v in metrics.items()},
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

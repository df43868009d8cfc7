"""Train a record once and take its CPU time; the process that trains is new for each training.

`python -m spavl_lib.arena.records.training FILE` is such a process. Only `train` starts it.
"""

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import spavl_lib
from spavl_lib.arena.records.files import Record, read_record
from spavl_lib.errors import InputError
from spavl_lib.runs.files import read_json, read_jsonl, write_json
from spavl_lib.runs.maker import maker_of
from spavl_lib.runs.paths import cache_root, repo_root
from spavl_lib.runs.stage import Run

LOGGED_EVERY = 20  # steps


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended, in seconds."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@contextlib.contextmanager
def code_of(record: Record) -> Iterator[Path | None]:
    """A worktree with the record's patch for the length of the block; None without a patch.

    Args:
        record: The record.

    Raises:
        InputError: The patch does not apply, or there is no git checkout.
    """
    if record.patch is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="spavl-patch-") as scratch:
        tree = Path(scratch) / "tree"
        try:
            try:
                _git(repo_root(), "worktree", "add", "--detach", str(tree), "HEAD")
                _git(tree, "apply", str(record.patch.absolute()))
            except (OSError, subprocess.CalledProcessError) as error:
                reason = str(getattr(error, "stderr", "") or error).strip()
                raise InputError(f"{record.patch} does not apply to HEAD: {reason}") from error
            yield tree
        finally:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                _git(repo_root(), "worktree", "remove", "--force", str(tree))


def _git(folder: Path, *words: str) -> None:
    command = ["git", *words]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)


def train(record: Record, seed: int, runs: Path, code: Path | None = None) -> dict[str, Any]:
    """Train a record in a new process with one thread.

    Args:
        record: The record.
        seed: Seed of the training.
        runs: Empty folder for the run. No earlier file shortens the training.
        code: Checkout whose library trains; None for the library of this process.

    Returns:
        `cpu_seconds` of all stages that are trained, `log` (lines of text), `model`, the folder of
        the policy, and `library`, the folder of the code that trained.

    Raises:
        InputError: The training failed, or used other code.
    """
    result = runs / "result.json"
    words = ["-m", __name__, str(record.folder.absolute()), str(seed), str(result)]
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    env = os.environ | one | {"SPAVL_RUNS": str(runs), "SPAVL_CACHE": str(cache_root())}
    completed = subprocess.run([sys.executable, *words], env=env, cwd=code)
    if completed.returncode or not result.is_file():
        raise InputError(f"{record.folder.name}, seed {seed}: the training failed; see above")
    trained = read_json(result)
    if code and not Path(trained["library"]).is_relative_to(code.resolve()):
        raise InputError(
            f"{record.folder.name} trained with {trained['library']}, without its patch; unset "
            "PYTHONPATH and PYTHONSAFEPATH"
        )
    return trained


def train_here(record: Record, seed: int) -> dict[str, Any]:
    """Train in this process, into the folder of runs.

    Imports and the cache of the embedded data are not counted.

    Args:
        record: The record.
        seed: Seed of the training.

    Returns:
        What `train` returns.
    """
    from spavl_lib.data.load import load_preferences
    from spavl_lib.distributed import launcher
    from spavl_lib.modelling.load import quiet_libraries

    quiet_libraries()
    config = record.config(seed)
    config = dataclasses.replace(
        config, launch=dataclasses.replace(config.launch, num_threads=1, num_processes=1)
    )
    run = Run(config)
    for name in record.trained_stages:
        maker_of(name)
    load_preferences(config.data, "train")
    begun, log = cpu_seconds(), []
    for name in record.trained_stages:
        launcher.make(name, config, run.stage(name))
    spent = cpu_seconds() - begun
    for name in record.trained_stages:
        log += log_of(name, read_jsonl(run.stage(name).metrics_path))
    model = run.stage(record.stage).path / "model"
    return {
        "cpu_seconds": round(spent, 1), "log": log, "model": str(model),
        "library": str(Path(spavl_lib.__file__).resolve().parent),
    }  # fmt: skip


def log_of(stage: str, rows: list[dict[str, Any]]) -> list[str]:
    """The training log as text: the first step, every 20th and the last, without paths.

    Args:
        stage: Name of the stage.
        rows: Rows of the stage's `metrics.jsonl`.
    """
    steps = [row for row in rows if "step" in row]
    ends = (steps[0]["step"], steps[-1]["step"]) if steps else ()
    shown = [row for row in steps if row["step"] % LOGGED_EVERY == 0 or row["step"] in ends]
    return [" ".join([stage, *(f"{key}={row[key]:.6g}" for key in _plain(row))]) for row in shown]


def _plain(row: dict[str, Any]) -> list[str]:
    left_out = ("peak_memory_gib", "num_tokens")
    return [k for k, v in row.items() if isinstance(v, (int, float)) and k not in left_out]


if __name__ == "__main__":
    _folder, _seed, _result = sys.argv[1:]
    write_json(Path(_result), train_here(read_record(Path(_folder)), int(_seed)))

"""Worker processes of the scaling stage: each takes the next arm that no other worker holds.

`python -m spavl_lib.scaling.workers FOLDER` is one worker. Only `run_in_workers` starts workers. It
holds the standard input of each worker open, and a worker ends when its standard input closes.
"""

import contextlib
import dataclasses
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import yaml

from spavl_lib import machine
from spavl_lib.config import from_dict
from spavl_lib.errors import ERRORS, BusyError, Preempted, SpavlError
from spavl_lib.modelling.load import quiet_libraries
from spavl_lib.runs.bar import PROGRESS, Bar
from spavl_lib.runs.signals import RESUME, StopFlag, end_with_parent, stop_on_signals
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.scaling.arms import Arm, arm_stage, distinct, plan
from spavl_lib.scaling.training import run_arm

GIB_PER_WORKER = 3


def default_workers() -> int:
    """How many arms this machine can run at once.

    A machine with a GPU runs one arm. Without a GPU, cores and memory limit the number.
    """
    if machine.gpus():
        return 1
    fitting = machine.memory_bytes() // (GIB_PER_WORKER * machine.GIB)
    return max(1, min(machine.cores(), fitting))


def run_in_workers(stage: Stage, arms: list[Arm], workers: int, flag: StopFlag) -> None:
    """Run all arms, several at a time.

    Args:
        stage: The scaling stage.
        arms: Distinct arms. Complete arms are skipped.
        workers: Number of processes.
        flag: Becomes true when a stop is requested. The workers are then stopped.

    Raises:
        Preempted: A stop was requested, or a worker was stopped from outside.
        SpavlError: A worker raised an error of the library, which is raised again here.
        RuntimeError: A worker failed in another way.
    """
    threads = str(max(1, machine.cores() // workers))
    env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    env.pop(PROGRESS, None)  # the bar of this process counts all arms
    command = [sys.executable, "-m", "spavl_lib.scaling.workers", str(stage.path)]
    logs = [stage.path / f"worker{n}.log" for n in range(workers)]
    processes = []
    for log in logs:
        with log.open("w", encoding="utf-8") as handle:
            processes.append(
                subprocess.Popen(
                    command, env=env, stdin=subprocess.PIPE, stdout=handle,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )
            )  # fmt: skip

    def completed() -> int:
        return sum(arm_stage(stage, arm).done for arm in arms)

    try:
        with Bar(total=len(arms), desc=f"arms, {workers} at a time", unit="arm") as bar:
            while any(p.poll() is None for p in processes):
                bar.update(completed() - bar.n)
                if flag or any(p.poll() not in (None, 0) for p in processes):
                    break
                time.sleep(1)
            bar.update(completed() - bar.n)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()  # the worker saves a checkpoint and stops
        try:
            codes = [process.wait() for process in processes]
        finally:
            # A worker exits at once when its input closes, so it must have ended before.
            for process in processes:
                if process.stdin:
                    process.stdin.close()
    if flag:
        raise Preempted(f"stopped before all arms were complete; {RESUME}")
    for code, log in zip(codes, logs, strict=True):
        if code not in (0, Preempted.exit_code, -15):
            _raise_from_log(log, code)
    if completed() < len(arms):
        raise Preempted(f"a worker was stopped from outside; {RESUME}")


def _raise_from_log(log: Path, code: int) -> None:
    """Raise the last error of this library in a worker's log, or else a RuntimeError."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    for number in range(len(lines) - 1, -1, -1):
        name, colon, message = lines[number].partition(": ")
        if colon and name in ERRORS:
            raise ERRORS[name]("\n".join([message, *lines[number + 1 :]]))
    raise RuntimeError(f"a worker ended with exit code {code}; see the end of {log}")


def work(folder: Path) -> None:
    """Run arms that no other worker holds, until none is left.

    Args:
        folder: The scaling stage's folder.
    """
    config = from_dict(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    run = Run(dataclasses.replace(config, run_name=folder.parent.name), folder.parents[1])
    stage = run.stage("scaling")
    quiet_libraries()
    arms = distinct(plan(config))
    with stop_on_signals() as flag:
        for arm in arms:
            if flag:
                raise Preempted("stopped between arms")
            with contextlib.suppress(BusyError):
                run_arm(stage, arm, flag)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        work(Path(sys.argv[1]))
    except SpavlError as error:
        sys.stderr.write(f"\n{type(error).__name__}: {error}\n")
        sys.exit(error.exit_code)

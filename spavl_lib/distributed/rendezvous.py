"""Machines that train together meet over the run folder, which all of them see.

Each keeps a file of its own fresh. Machine 0, having seen all, says who is in, so that a file left
by an earlier attempt misleads nobody. torch's own rendezvous waits without saying for whom.
"""

import contextlib
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from spavl_lib.config import LaunchConfig
from spavl_lib.errors import InputError, Preempted
from spavl_lib.runs.files import read_json, write_json
from spavl_lib.runs.signals import StopFlag
from spavl_lib.runs.stage import Stage

FRESH_S = 5.0  # a machine that has not been seen for so long is not there


@contextlib.contextmanager
def reports_folder(stage: Stage, launch: LaunchConfig, flag: StopFlag) -> Iterator[Path]:
    """A folder of this attempt where all processes, on all machines, report."""
    base = stage.path / ".ranks"
    base.mkdir(parents=True, exist_ok=True)
    mine = base / f"machine-{launch.machine_rank}.json"
    try:
        folder = base / _meet(base, launch, flag)
        folder.mkdir(exist_ok=True)
        yield folder
    finally:
        mine.unlink(missing_ok=True)
        if launch.machine_rank == 0:
            shutil.rmtree(base, ignore_errors=True)
        with contextlib.suppress(OSError):  # nothing came of it: leave nothing behind
            stage.path.rmdir()
            stage.run.path.rmdir()


def _meet(base: Path, launch: LaunchConfig, flag: StopFlag) -> str:
    """Wait for every machine; returns the name they agree on for this attempt.

    Each keeps a file of its own fresh. Machine 0, having seen all, says who is in.

    Raises:
        InputError: The port is taken, or machines are missing; says which.
    """
    token = uuid.uuid4().hex[:12]
    if launch.machine_rank == 0 and launch.main_port:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", launch.main_port))
            except OSError as error:
                raise InputError(
                    f"launch.main_port = {launch.main_port} is in use on this machine ({error}); "
                    "choose another"
                ) from error
    if launch.num_machines == 1:
        return token
    until = time.monotonic() + launch.timeout_s
    while True:
        write_json(
            base / f"machine-{launch.machine_rank}.json",
            {"host": socket.gethostname(), "token": token},
        )
        now = (base / f"machine-{launch.machine_rank}.json").stat().st_mtime
        there = _machines(base, now)
        if launch.machine_rank == 0 and len(there) == launch.num_machines:
            tokens = [there[r]["token"] for r in sorted(there)]
            write_json(base / "go.json", {"tokens": tokens})
            return token
        with contextlib.suppress(OSError, ValueError, KeyError):
            tokens = read_json(base / "go.json")["tokens"]
            if tokens[launch.machine_rank] == token:
                return tokens[0]
        if flag:
            raise Preempted(f"stopped by {flag.reason} while waiting for the other machines")
        if time.monotonic() > until:
            missing = sorted(set(range(launch.num_machines)) - set(there))
            present = ", ".join(f"{r} ({m['host']})" for r, m in sorted(there.items()))
            raise InputError(
                f"waited {launch.timeout_s} s (launch.timeout_s) for {launch.num_machines} "
                f"machines: missing {', '.join(map(str, missing))}; here are {present}. Do they "
                f"all see {base.parent}?"
            )
        time.sleep(0.3)


def _machines(base: Path, now: float) -> dict[int, dict]:
    there = {}
    for path in base.glob("machine-*.json"):
        with contextlib.suppress(OSError, ValueError):
            if now - path.stat().st_mtime < FRESH_S:
                there[int(path.stem.split("-")[1])] = read_json(path)
    return there

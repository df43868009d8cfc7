"""Rendezvous: machines that train together find each other through the shared run folder.

Each machine writes its own file again and again. When machine 0 has seen a fresh file of every
machine, it writes a list of the tokens in these files. A machine whose token is not in the list
waits on, so a file that an earlier attempt left has no effect. torch's own rendezvous would wait
without naming the missing machines.
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

# If a machine's file is older than this many seconds, the machine has stopped waiting.
FRESH_S = 5.0


@contextlib.contextmanager
def reports_folder(stage: Stage, launch: LaunchConfig, flag: StopFlag) -> Iterator[Path]:
    """Yield a folder of this attempt in which the processes of all machines report.

    Args:
        stage: The stage that is trained.
        launch: Number of machines, and the rank of this one.
        flag: Stop flag, which is polled while this machine waits for others.
    """
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
        with contextlib.suppress(OSError):  # rmdir fails, as it should, if a folder holds work
            stage.path.rmdir()
            stage.run.path.rmdir()


def _meet(base: Path, launch: LaunchConfig, flag: StopFlag) -> str:
    """Wait for all machines, and return the name of this attempt, which is the same on all.

    Raises:
        InputError: The port is in use; or machines are missing, which the message lists.
        Preempted: A signal came while this machine waited.
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
    deadline = time.monotonic() + launch.timeout_s
    while True:
        write_json(
            base / f"machine-{launch.machine_rank}.json",
            {"host": socket.gethostname(), "token": token},
        )
        now = (base / f"machine-{launch.machine_rank}.json").stat().st_mtime
        present = _machines(base, now)
        if launch.machine_rank == 0 and len(present) == launch.num_machines:
            tokens = [present[r]["token"] for r in sorted(present)]
            write_json(base / "go.json", {"tokens": tokens})
            return token
        with contextlib.suppress(OSError, ValueError, KeyError):
            tokens = read_json(base / "go.json")["tokens"]
            if tokens[launch.machine_rank] == token:
                return tokens[0]
        if flag:
            raise Preempted(f"stopped by {flag.reason} while waiting for the other machines")
        if time.monotonic() > deadline:
            missing = sorted(set(range(launch.num_machines)) - set(present))
            seen = ", ".join(f"{r} ({m['host']})" for r, m in sorted(present.items()))
            raise InputError(
                f"waited {launch.timeout_s} s (launch.timeout_s) for {launch.num_machines} "
                f"machines: missing {', '.join(map(str, missing))}; here are {seen}. Check that "
                f"all of them see {base.parent}"
            )
        time.sleep(0.3)


def _machines(base: Path, now: float) -> dict[int, dict]:
    """Rank -> file's content, for every machine whose file is fresh.

    Args:
        base: Folder of the files.
        now: Present time by the clock of the file system, in seconds since the epoch.
    """
    present = {}
    for path in base.glob("machine-*.json"):
        with contextlib.suppress(OSError, ValueError):
            if now - path.stat().st_mtime < FRESH_S:
                present[int(path.stem.split("-")[1])] = read_json(path)
    return present

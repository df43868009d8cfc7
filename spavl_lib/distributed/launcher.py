"""Make a stage in this process, or in several child processes that accelerate starts.

The calling cell or command shows the progress of the child processes, passes a request to stop on
to them, and raises the error of a child process that failed. Child processes report through files
in a folder that is new for each attempt. They also watch their standard input, and end when it
closes. It closes when this process ends.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from spavl_lib import stages
from spavl_lib.config import PROFILES, Config, LaunchConfig
from spavl_lib.distributed.rendezvous import reports_folder
from spavl_lib.distributed.settings import (
    check_supported,
    in_processes,
    local_accumulation,
    to_be_started,
)
from spavl_lib.errors import ERRORS, InputError, Preempted, RankError, SpavlError
from spavl_lib.machine import WORKER, cores
from spavl_lib.runs.bar import Bar
from spavl_lib.runs.files import read_json, read_jsonl, write_json
from spavl_lib.runs.maker import leave_other_launchers, maker_of
from spavl_lib.runs.signals import RESUME, StopFlag, stop_on_signals
from spavl_lib.runs.stage import Stage

# After a process has failed, the others have this many seconds to report their own errors.
GRACE_S = 5.0


def make(name: str, config: Config, stage: Stage, **options: Any) -> dict:
    """Make a stage in this process, or in the processes that `config.launch` asks for.

    Args:
        name: Stage, such as "dpo".
        config: The run's config.
        stage: The stage's folder.
        options: Keyword arguments for the maker, such as `live`.

    Returns:
        The stage's summary.

    Raises:
        InputError: The stage cannot be trained in several processes.
        SpavlError: The maker raised this error. From child processes, the message names the rank.
    """
    spec = stages.find(name)
    if in_processes(config.launch) and spec.trains and not spec.several_processes:
        raise InputError(
            f"{name} cannot train in several processes; set launch.num_processes to 1 and "
            "launch.engine to ddp"
        )
    if not (spec.several_processes and to_be_started(config.launch)) or (
        stage.done and spec.trains
    ):
        return maker_of(name)(config, stage, **options)
    stage.check_config()
    leave_other_launchers(config.launch)
    return train_in_processes(name, config, stage, **options)


def train_in_processes(kind: str, config: Config, stage: Stage, *, live: Any = None) -> dict:
    """Make a stage in `launch.num_processes` child processes, and wait for them.

    Args:
        kind: Stage, such as "dpo".
        config: The run's config.
        stage: The stage's folder.
        live: A live plot; `live.update(rows)` is called with the logged rows during training.

    Returns:
        The stage's summary.

    Raises:
        SpavlError: A process raised this error; the message names the rank. If a process failed
            with an error of another kind, `RankError`.
        Preempted: A stop was requested; the same command or cell resumes.
    """
    launch, spec = config.launch, stages.find(kind)
    section = config.section(kind) if spec.settings else getattr(config, kind, None)
    if not spec.trains:  # only rows are divided among the processes, so ddp is enough
        launch = dataclasses.replace(launch, engine="ddp", cpu_offload=False)
        config = dataclasses.replace(config, launch=launch)
    check_supported(kind, config.model.adapter, launch)
    if steps := getattr(section, "gradient_accumulation_steps", None):
        local_accumulation(kind, steps, launch)
    with stop_on_signals() as flag, reports_folder(stage, launch, flag) as folder:
        with tempfile.TemporaryDirectory(prefix="spavl-") as scratch:
            command, env = _command(kind, config, stage, folder, Path(scratch))
            log_path = stage.path / f".ranks-{launch.machine_rank}.log"
            with log_path.open("w", encoding="utf-8") as log:
                child = subprocess.Popen(
                    command, env=env, stdin=subprocess.PIPE, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
                try:
                    _watch(child, stage, folder, flag, launch, live)
                finally:
                    _end(child, folder)
        problem = _problem(child.returncode, folder, flag, log_path, launch)
        if problem is None and not stage.done:
            problem = RankError(
                f"all processes ended without an error, but wrote no summary; see {log_path}"
            )
        if problem is not None:
            raise problem
        log_path.unlink(missing_ok=True)
    return stage.summary


# --- the command --------------------------------------------------------------------------------


def _command(
    kind: str, config: Config, stage: Stage, folder: Path, scratch: Path
) -> tuple[list[str], dict[str, str]]:
    """The command line that starts accelerate, and the environment of the child processes.

    Args:
        kind: Stage, such as "dpo".
        config: The run's config.
        stage: The stage's folder.
        folder: Folder for the reports of the child processes.
        scratch: Temporary folder for the files that the command line names.

    Raises:
        InputError: This machine has too few GPUs, or DeepSpeed is not installed.
    """
    import torch

    launch, cuda = config.launch, torch.cuda.is_available()
    processes_here = launch.num_processes // launch.num_machines
    if cuda and processes_here > torch.cuda.device_count():
        raise InputError(
            f"launch.num_processes = {launch.num_processes} means {processes_here} processes on "
            f"each machine, but this one has {torch.cuda.device_count()} GPUs; set a smaller number"
        )
    config = dataclasses.replace(config, dtype=stage.dtype)  # one precision for all processes
    (scratch / "config.yaml").write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    shipped = PROFILES / "accelerate"
    words = [sys.executable, "-m", "accelerate.commands.launch"]
    words += ["--config_file", str(shipped / f"{launch.engine}.yaml")]
    words += ["--num_processes", str(launch.num_processes), "--mixed_precision", "no"]
    words += ["--dynamo_backend", "no", "--num_machines", str(launch.num_machines)]
    words += ["--machine_rank", str(launch.machine_rank)]
    words += ["--main_process_ip", launch.main_address]
    words += ["--main_process_port", str(launch.main_port or _free_port())]
    if launch.engine != "ddp":
        words += ["--deepspeed_config_file", str(_deepspeed_config(launch, scratch))]
    words += ["--module", "spavl_lib.worker", kind, str(scratch / "config.yaml")]
    words += [str(stage.run.path.parent.absolute())]
    env = dict(os.environ)
    threads = max(1, cores() // processes_here)
    env |= {
        WORKER: str(folder.absolute()),
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", str(threads)),
        "PYTHONUNBUFFERED": "1",
    }
    package = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [env.get("PYTHONPATH")])])
    if not cuda:
        env["DS_ACCELERATOR"] = "cpu"
        if sys.platform == "linux" and launch.num_machines == 1:
            env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return words, env


def _deepspeed_config(launch: LaunchConfig, scratch: Path) -> Path:
    """Write DeepSpeed's settings as JSON, with CPU offload if the config asks for it.

    Raises:
        InputError: DeepSpeed is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            f"launch.engine = {launch.engine} needs DeepSpeed: pip install -e '.[deepspeed]'"
        )
    settings = read_json(PROFILES / "accelerate" / f"{launch.engine}.json")
    if launch.cpu_offload:
        offload = {"device": "cpu", "pin_memory": False}
        settings["zero_optimization"]["offload_optimizer"] = offload
        if launch.engine == "zero3":
            settings["zero_optimization"]["offload_param"] = offload
    path = scratch / "deepspeed.json"
    write_json(path, settings)
    return path


def _free_port() -> int:
    """A free TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- watching -----------------------------------------------------------------------------------


def _watch(
    child: subprocess.Popen,
    stage: Stage,
    folder: Path,
    flag: StopFlag,
    launch: LaunchConfig,
    live: Any,
) -> None:
    """Wait until accelerate ends. Meanwhile show progress, and pass on a request to stop.

    If a child process fails, the others are killed after `GRACE_S`.

    Args:
        child: The process of accelerate.
        stage: The stage that is made.
        folder: Folder with the reports of the child processes.
        flag: Stop flag.
        launch: Settings of the launch.
        live: A live plot, as in `train_in_processes`.
    """
    signalled: set[int] = set()  # ids of processes that got SIGTERM
    failed_at = 0.0  # time of the first reported error; 0 if there is none
    progress = _Progress(stage, folder, live, launch)
    with progress:
        while child.poll() is None:
            time.sleep(0.2)
            progress.update()
            if flag:
                for pid in _pids(folder) - signalled:
                    signalled.add(pid)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)
            errors = _errors(folder)
            if any(e["type"] != "Preempted" for e in errors):
                failed_at = failed_at or time.monotonic()
                if time.monotonic() - failed_at > GRACE_S:
                    # The others wait in a collective for the failed process. There SIGTERM would
                    # have no effect.
                    _kill(folder)
        progress.update()


class _Progress:
    """A progress bar and a live plot of what the main process reports and logs."""

    def __init__(self, stage: Stage, folder: Path, live: Any, launch: LaunchConfig):
        self.stage, self.folder, self.live, self.launch = stage, folder, live, launch
        self.bar: Bar | None = None
        self.bytes_read = 0  # size of the metrics file when it was last read

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        rows = read_jsonl(self.stage.metrics_path)
        if self.live and rows:
            self.live.update(rows, force=True)

    def update(self) -> None:
        """Show what has been reported and logged since the last call."""
        with contextlib.suppress(OSError, ValueError, SpavlError):
            report = read_json(self.folder / "progress.json")
            rows = self._rows_if_changed()
            step = max([report["step"], *(r["step"] for r in rows[-1:])])
            self._show(report, step, rows)

    def _rows_if_changed(self) -> list[dict]:
        """All logged rows; empty if the metrics file has not grown since the last call."""
        path = self.stage.metrics_path
        size = path.stat().st_size if path.is_file() else 0
        if size == self.bytes_read:
            return []
        self.bytes_read = size
        return read_jsonl(path)

    def _show(self, report: dict, step: int, rows: list[dict]) -> None:
        name = f"{report.get('name', self.stage.name)} x {self.launch.num_processes}"
        if self.bar is None or self.bar.desc.rstrip(": ") != name:
            if self.bar is not None:
                self.bar.close()
            unit = "row" if "name" in report else "step"
            self.bar = Bar(total=report["total"], initial=report["step"], desc=name, unit=unit)
        self.bar.update(max(0, step - self.bar.n))
        if rows and "loss" in rows[-1]:
            self.bar.set_postfix(loss=rows[-1]["loss"])
        if rows and self.live:
            self.live.update(rows)


def _pids(folder: Path) -> set[int]:
    """Ids of this attempt's processes on this machine."""
    host, pids = socket.gethostname(), set()
    for path in folder.glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError):
            value = json.loads(path.read_text(encoding="utf-8"))
            if value.get("host") == host:
                pids.add(value["pid"])
    return pids


def _kill(folder: Path) -> None:
    """Kill this attempt's processes on this machine."""
    for pid in _pids(folder):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _end(child: subprocess.Popen, folder: Path) -> None:
    """End accelerate and every child process that may still run."""
    if child.stdin:
        child.stdin.close()  # every process exits when its standard input closes
    if child.poll() is None:
        _kill(folder)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(10)
    if child.poll() is None:
        child.kill()
        child.wait()
    _kill(folder)


# --- what went wrong ----------------------------------------------------------------------------


def _errors(folder: Path) -> list[dict]:
    """Errors that processes have reported, the oldest first."""
    errors = []
    for path in sorted(folder.glob("rank-*-error.json"), key=lambda p: p.stat().st_mtime_ns):
        with contextlib.suppress(OSError, ValueError):
            errors.append(read_json(path))
    return errors


def _problem(
    code: int, folder: Path, flag: StopFlag, log_path: Path, launch: LaunchConfig
) -> SpavlError | None:
    """The error to raise after the child processes have ended; None if they succeeded.

    Args:
        code: Exit code of accelerate.
        folder: Folder with the reports of the child processes.
        flag: Stop flag.
        log_path: File with the output of accelerate.
        launch: Settings of the launch.
    """
    errors, count = _errors(folder), launch.num_processes
    failures = [e for e in errors if e["type"] != "Preempted"]
    causes = [e for e in failures if not _is_lost_connection(e)]
    if not causes and code and not flag and (killed := _killed(log_path, count)):
        return RankError(killed)
    causes = causes or failures
    if causes:
        first = causes[0]
        error_class = ERRORS.get(first["type"])
        rank = f"rank {first['rank']} of {count}: "
        if error_class is not None:
            return error_class(rank + first["message"])
        return RankError(
            f"{rank}{first['type']}: {first['message']}\n  at {first['at']}\n  log: {log_path}"
        )
    if errors:
        return Preempted(errors[0]["message"])
    if code == 0:
        return None
    if flag:
        return Preempted(f"stopped by {flag.reason} before the first step; {RESUME}")
    return RankError(_last_lines(log_path, code))


def _is_lost_connection(error: dict) -> bool:
    """Whether an error only says that another process has ended. It is then not the cause."""
    text = error["message"].lower()
    return error["type"] in ("DistBackendError", "DistNetworkError") or any(
        word in text for word in ("connection closed by peer", "connection reset", "gloo")
    )


def _killed(log_path: Path, count: int) -> str | None:
    """The message about a process that a signal killed; None if torch's log shows no such process.

    Args:
        log_path: File with the output of accelerate, which holds the log of torch's agent.
        count: Number of processes.
    """
    text = log_path.read_text(encoding="utf-8", errors="replace")
    ends = re.findall(r"rank\s*: (\d+) \(local_rank: \d+\)\s+exitcode\s*: -(\d+)", text)
    # The agent ends the other processes by SIGTERM, so another signal is more likely the cause.
    ends.sort(key=lambda end: int(end[1]) == signal.SIGTERM)
    if not ends:
        return None
    rank, name = ends[0][0], signal.Signals(int(ends[0][1])).name
    why = " (often because memory ran out)" if name == "SIGKILL" else ""
    return (
        f"rank {rank} of {count} was killed by {name}{why}; the last checkpoint is kept, and the "
        f"same call resumes from it\n  log: {log_path}"
    )


def _last_lines(log_path: Path, code: int) -> str:
    """The message for a failure that no process reported: the last lines of accelerate's log."""
    text = log_path.read_text(encoding="utf-8", errors="replace")
    tail = "\n    ".join(text.strip().splitlines()[-5:])
    return f"the launcher ended with exit code {code}:\n    {tail}\n  log: {log_path}"

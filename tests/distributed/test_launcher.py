"""Parents and children: errors with their rank, stops, orphans, ports, missing machines."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from spavl_lib import pipeline
from spavl_lib.config import LaunchConfig
from spavl_lib.distributed import launcher
from spavl_lib.errors import InputError, NonFiniteError, Preempted, RankError
from spavl_lib.runs.signals import StopFlag
from spavl_lib.runs.stage import Run
from tests.distributed.conftest import Result, alive, config_of, process_of, read, when
from tests.distributed.test_engines import assert_equal_losses

TWO = {"launch__num_processes": 2}


def stage_of(name: str, **changes: object) -> tuple:
    config = config_of("dpo", name, **(TWO | changes))
    return config, Run(config).stage("dpo")


def start(name: str, machine: int = 0, **changes: object) -> subprocess.Popen:
    """`pipeline.train` in a process of its own, as on another machine."""
    config, stage = stage_of(name, launch__machine_rank=machine, **changes)
    path = stage.run.path.parent / f"{name}-{machine}.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    code = (
        "import sys, yaml; from spavl_lib import pipeline; from spavl_lib.config import from_dict\n"
        "from spavl_lib.runs.stage import Run\n"
        f"config = from_dict(yaml.safe_load(open({str(path)!r})))\n"
        "pipeline.train('dpo', config, Run(config).stage('dpo'))\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_hosts_on_loopback_train_what_one_process_does(alone: Callable[[str], Result]) -> None:
    both = {"launch__num_machines": 2, "launch__main_port": free_port(), "launch__timeout_s": 120}
    parents = [start("hosts", machine, **both) for machine in (0, 1)]
    for parent in parents:
        _, said = parent.communicate(timeout=240)
        assert parent.returncode == 0, said
    _, stage = stage_of("hosts")
    result = read(stage)
    assert result.summary["launch"] == {"engine": "ddp", "world_size": 2}
    assert_equal_losses(result, alone("dpo"), 1e-5)
    assert not (stage.path / ".ranks").exists()


@pytest.mark.slow
def test_when_the_parent_is_killed_its_processes_end(tmp_path: Path) -> None:
    parent = start("orphans", dpo__max_steps=400)
    _, stage = stage_of("orphans")
    pids = [process_of(stage, rank) for rank in (0, 1)]
    until = time.monotonic() + 100
    while not stage.metrics_path.is_file() and time.monotonic() < until:
        time.sleep(0.1)
    assert all(map(alive, pids))
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, pids))
    # What was checkpointed goes on under the same name.
    assert not stage.done


def test_a_stop_ends_every_process_after_the_same_step() -> None:
    config, stage = stage_of("stopped", dpo__max_steps=400)
    when(
        (stage.path / "checkpoints/step-2/MANIFEST.json").is_file,
        lambda: os.kill(os.getpid(), signal.SIGTERM),
    )
    with pytest.raises(Preempted, match=r"after step \d+ of 400; checkpoint written"):
        pipeline.train("dpo", config, stage)
    assert not (stage.path / ".ranks").exists()


# --- what went wrong, from reports as processes leave them ---------------------------------------


def problem(tmp_path: Path, *errors: dict, code: int = 1, log: str = "") -> Exception | None:
    from spavl_lib.runs.files import write_json

    for error in errors:
        write_json(tmp_path / f"rank-{error['rank']}-error.json", error)
        time.sleep(0.01)
    (tmp_path / "log").write_text(log)
    launch_config = LaunchConfig(num_processes=4)
    return launcher._problem(code, tmp_path, StopFlag(), tmp_path / "log", launch_config)


def told(rank: int, kind: str, message: str) -> dict:
    return {"rank": rank, "type": kind, "message": message, "at": "dpo.py:1: x"}


def test_the_first_cause_is_shown_with_its_rank(tmp_path: Path) -> None:
    found = problem(
        tmp_path,
        told(0, "DistBackendError", "gloo: connection closed by peer"),
        told(3, "NonFiniteError", "step 7: loss is nan on rows a, b"),
    )
    assert type(found) is NonFiniteError
    assert str(found) == "rank 3 of 4: step 7: loss is nan on rows a, b"


def test_an_error_that_is_none_of_ours_keeps_its_name_and_place(tmp_path: Path) -> None:
    found = problem(tmp_path, told(1, "ZeroDivisionError", "division by zero"))
    assert type(found) is RankError
    assert "rank 1 of 4: ZeroDivisionError: division by zero\n  at dpo.py:1" in str(found)


def test_a_silent_death_is_found_in_the_agents_words(tmp_path: Path) -> None:
    words = (
        "[1]:\n  rank      : 0 (local_rank: 0)\n  exitcode  : -15 (pid: 8)\n"
        "[0]:\n  rank      : 2 (local_rank: 2)\n  exitcode  : -9 (pid: 9)\n"
    )
    found = problem(tmp_path, told(1, "RuntimeError", "gloo: Connection reset by peer"), log=words)
    assert "rank 2 of 4 was killed by SIGKILL (often because memory ran out)" in str(found)


def test_a_good_end_is_no_problem(tmp_path: Path) -> None:
    assert problem(tmp_path, code=0) is None


# --- machines -----------------------------------------------------------------------------------


def test_a_machine_that_does_not_come_is_named(tmp_path: Path) -> None:
    both = {"launch__num_machines": 2, "launch__main_port": free_port(), "launch__timeout_s": 2}
    config, stage = stage_of("alone-here", **both)
    with pytest.raises(InputError, match=r"for 2 machines: missing 1; here are 0 \("):
        pipeline.train("dpo", config, stage)
    assert not stage.run.path.exists()


def test_a_taken_port_is_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config, stage = stage_of("taken", launch__main_port=port)
        with pytest.raises(InputError, match=f"launch.main_port = {port} is in use"):
            pipeline.train("dpo", config, stage)
    assert not stage.run.path.exists()


def test_deepspeed_missing_and_four_bit_under_zero3_are_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib.util

    config, stage = stage_of("four-bit", launch__engine="zero3", model__adapter="qlora")
    with pytest.raises(InputError, match="qlora does not work under zero3"):
        pipeline.train("dpo", config, stage)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "deepspeed" else find(n, *a)
    )
    config, stage = stage_of("no-deepspeed", launch__engine="zero2")
    with pytest.raises(InputError, match="needs DeepSpeed: pip install"):
        pipeline.train("dpo", config, stage)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_processes": 3, "num_machines": 2, "main_port": 1}, "must be a multiple"),
        ({"num_processes": 2, "num_machines": 2}, "num_machines = 2 needs main_port"),
        ({"machine_rank": 1}, "numbered from 0"),
        ({"cpu_offload": True}, "cpu_offload needs engine zero2 or zero3"),
    ],
)
def test_bad_launch_settings(values: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        LaunchConfig(**values)

"""The Slurm script with stand-ins for Slurm's commands: addresses, preemption, requeue."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SRUN = """#!/bin/bash
# Runs the task once for each node, and passes signals on, as srun does.
while [[ $1 == --* ]]; do shift; done
pids=()
for node in 0 1; do SLURM_NODEID=$node "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}"' TERM
code=0
for pid in "${pids[@]}"; do
    wait $pid; own=$?
    while kill -0 $pid 2>/dev/null; do wait $pid; own=$?; done
    [ $own -gt $code ] && code=$own
done
exit $code
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo node-a; echo node-b; else echo "$@" >> "$LOG"; fi
"""
SPAVL = """#!/bin/bash
echo "spavl $@" >> "$LOG"
trap 'echo checkpoint >> "$LOG"; exit 75' TERM
for i in $(seq $NAPS); do sleep 0.1; done
exit $CODE
"""


@pytest.fixture
def job(repo: Path, tmp_path: Path):
    """Starts the script; returns it, and reads what was called."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("spavl", SPAVL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    log = tmp_path / "log"
    log.write_text("")

    def start(code: int, naps: int) -> tuple[subprocess.Popen, Path]:
        env = os.environ | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "LOG": str(log),
            "CODE": str(code), "NAPS": str(naps), "SLURM_NNODES": "2", "SLURM_JOB_ID": "40007",
            "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_GPUS_ON_NODE": "8",
        }  # fmt: skip
        script = repo / "scripts/slurm_train.sbatch"
        return subprocess.Popen(["bash", script, "dpo", "--profile", "full"], env=env), log

    return start


def test_every_node_is_told_its_number_and_where_the_first_is(job) -> None:
    child, log = job(0, 1)
    assert child.wait(30) == 0
    lines = sorted(log.read_text().splitlines())
    shared = (
        "spavl train dpo --profile full --set launch.num_machines=2 --set launch.num_processes=16 "
        "--set launch.main_address=node-a --set launch.main_port=20007 "
    )
    assert lines == [f"{shared}--set launch.machine_rank={n}" for n in (0, 1)]


def test_a_preempted_job_writes_its_checkpoint_and_goes_back_into_the_queue(job) -> None:
    child, log = job(0, 300)
    until = time.monotonic() + 20
    while log.read_text().count("spavl") < 2 and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)
    child.send_signal(signal.SIGTERM)
    assert child.wait(30) == 75
    lines = log.read_text().splitlines()
    assert lines.count("checkpoint") == 2 and lines[-1] == "requeue 40007"


def test_a_failed_job_stays_failed(job) -> None:
    child, log = job(2, 1)
    assert child.wait(30) == 2
    assert "requeue" not in log.read_text()

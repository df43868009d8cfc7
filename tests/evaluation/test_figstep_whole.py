"""FigStep whole: 550 images, the embedded base, killed once. Offline, six minutes on two cores."""

import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.evaluation.benchmark_files import needs_real_files

WORDS = ["evaluate", "embedded", "--benchmarks", "figstep:full+tiny", "--judge", "phrases"]
ROWS, KILL_AFTER = 550, 150


def start(repo: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-u", "-m", "spavl_lib.cli", *WORDS, "--out", str(out)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(repo)}
    return subprocess.Popen(
        command, cwd=repo, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow
@needs_real_files
def test_figstep_is_killed_once_and_nothing_is_lost(repo: Path, tmp_path: Path) -> None:
    begun, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    path = tmp_path / "embedded/figstep.full+tiny/answers.jsonl"
    process = start(repo, tmp_path)
    while process.poll() is None and (
        not path.is_file() or path.read_bytes().count(b"\n") < KILL_AFTER
    ):
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    before = path.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    kept = whole.count(b"\n")
    assert KILL_AFTER <= kept < ROWS
    process = start(repo, tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert re.search(rf"embedded: {kept} of {ROWS} rows of figstep:full\+tiny have answers", out)
    after = path.read_bytes()
    assert after.startswith(whole)
    records = [json.loads(line) for line in after.decode().splitlines()]
    assert len({record["id"] for record in records}) == len(records) == ROWS
    assert all(record["response"] and record["finished"] for record in records)
    page = json.loads((path.parent / "results.json").read_text())
    [judge] = page["judges"].values()
    rate = judge["rates"]["refused"]["all"]
    assert (rate["n"], rate["unjudged"]) == (ROWS, 0)
    seconds = time.monotonic() - begun
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    print(f"FigStep, {ROWS} images: {processor:.0f} s of processor time, {seconds:.0f} s, {rate}")
    assert processor <= 2 * 360

"""Numbers that are none, full disks, folders in use: said at once, and nothing is lost."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spavl_lib.errors import DiskError
from spavl_lib.trainers import checkpoint as ckpt
from tests.helpers import files_of
from tests.reliability.conftest import ALGORITHMS, SAVE_STEPS, STEPS, Case
from tests.reliability.processes import until

# What is poisoned, and the step. A weight is spoilt after its step: the next loss shows it, or the
# gate before saving.
POISONS = [(w, s) for w in ("loss", "gradient", "weight") for s in (1, 3, STEPS)]
ROLLOUT = [(w, s) for w in ("scores", "logps", "ref_logps") for s in (1, 3, STEPS)]
SHORT = {
    "reward": [("gradient", 3)], "dpo_lora": [("weight", STEPS)], "dpo_full": [("loss", 1)],
    "ppo": [("ref_logps", 3)],
}  # fmt: skip


@pytest.mark.parametrize(
    "algorithm",
    [pytest.param(a, marks=() if a == "dpo_lora" else pytest.mark.slow) for a in ALGORITHMS],
)
def test_a_number_that_is_none_stops_before_the_update(
    cases: Callable[[str], Case], algorithm: str, soak: bool, record: Callable
) -> None:
    case = cases(algorithm)
    long = POISONS + (ROLLOUT if algorithm == "ppo" else [])
    tried = long if soak else SHORT[algorithm]
    for what, step in tried:
        name = f"{what}{step}"
        child = case.start(name, fault=f"poison:{what}@{step}")
        assert child.wait() == 3, f"{name}: {child.said[-2000:]}"
        told = step + 1 if what == "weight" and step % SAVE_STEPS else step
        line = next(x for x in child.said.splitlines() if x.startswith("spavl: "))
        assert f"step {told}:" in line, line
        assert "train/" in line or (algorithm, what) == ("ppo", "weight"), line
        assert "the last checkpoint is intact" in line
        last = (step - 1) // SAVE_STEPS * SAVE_STEPS
        assert case.newest(name) == last
        if last:
            kept = case.stage(name) / f"checkpoints/step-{last}"
            assert all(
                torch.isfinite(t).all() for t in ckpt.load_tensors(kept, "trainable").values()
            )
        assert not (case.stage(name) / "summary.json").exists()
        assert case.start(name).wait() == 0
        assert case.ended(name) == case.straight
    record("R13", len(tried), len(tried), algorithm)


def test_a_full_disk_is_said_with_its_path_and_the_run_goes_on(
    cases: Callable[[str], Case], soak: bool, record: Callable
) -> None:
    """A limit on file size fails as a full disk does, at whatever file is larger."""
    case = cases("dpo_lora")
    checkpoint = case.stage("straight") / "checkpoints" / f"step-{STEPS}"
    sizes = sorted({p.stat().st_size for p in checkpoint.iterdir()})
    levels = [sizes[-1] - 1, sizes[-2] - 1, sizes[-1] // 2, sizes[-2] // 3, 300_000]
    for level in levels if soak else levels[:1]:
        name = f"full{level}"
        child = case.start(name, fault=f"limit_file_size:{level}")
        assert child.wait() == 74, child.said[-3000:]
        line = next(x for x in child.said.splitlines() if x.startswith("spavl: "))
        assert str(case.root / name) in line and "bytes free" in line, line
        assert "Traceback" not in child.said
        assert case.start(name).wait() == 0
        assert case.ended(name) == case.straight
    record("R10", *[len(levels if soak else levels[:1])] * 2, "limited file size")


@pytest.mark.slow
def test_a_disk_that_fills_up_between_checkpoints(
    cases: Callable[[str], Case], tmp_path: Path, record: Callable
) -> None:
    """On a small disk of its own, where the system lets us make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "none", disk], check=False)
    if made.returncode:
        pytest.skip("mounting a small disk needs a privileged user")
    case = cases("dpo_lora")
    try:
        (disk / "full").mkdir()
        (case.root / "full").symlink_to(disk / "full")
        child = case.start("full", fault="kill_in:backward@3")
        assert child.wait() == -9 and case.newest("full") == 2
        free = os.statvfs(disk)
        filler = disk / "filler"
        filler.write_bytes(b"x" * (free.f_bavail * free.f_frsize - 150_000))
        child = case.start("full")
        assert child.wait() == 74, child.said[-2000:]
        assert "bytes needed for 2 checkpoints" in child.said
        assert case.newest("full") == 2
        filler.unlink()
        assert case.start("full").wait() == 0
        assert case.ended("full") == case.straight
    finally:
        subprocess.run(["umount", disk], check=False)
    record("R10", 1, 1, "a full tmpfs, found at step 0")


def test_room_for_two_checkpoints_is_looked_for_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Linear(1000, 1000)
    one = 1_001_000 * 12 + 2**16
    for free, enough in ((3 * one - 1, False), (3 * one, True)):
        usage = lambda _, free=free: type("Usage", (), {"free": free})  # noqa: E731
        monkeypatch.setattr(ckpt.shutil, "disk_usage", usage)
        if enough:
            ckpt.check_room(tmp_path, model)
        else:
            with pytest.raises(DiskError, match=f"{3 * one:,} bytes needed .* {free:,} bytes free"):
                ckpt.check_room(tmp_path, model)


def test_two_runs_on_one_folder(cases: Callable[[str], Case], soak: bool, record: Callable) -> None:
    """The second is told who holds it within five seconds; what a dead one held is free."""
    case = cases("dpo_lora")
    waits = []
    for n in range(10 if soak else 2):
        name = f"two{n}"
        first = case.start(name)
        until(lambda name=name: case.logged(name) >= 1, first)
        before = files_of(case.stage(name) / "checkpoints")
        began = time.monotonic()
        second = case.start(name)
        assert second.wait() == 73, second.said[-2000:]
        waits.append(time.monotonic() - began)
        assert f"pid {first.process.pid} on " in second.said and "run r" in second.said
        after = files_of(case.stage(name) / "checkpoints")
        assert {k: v for k, v in after.items() if k in before} == before
        if n % 2:
            first.kill_after(0)
            assert case.start(name).wait() == 0  # its lock died with it
        else:
            assert first.wait() == 0
        assert case.ended(name) == case.straight
    assert max(waits) < 5, waits
    record("R9", len(waits), len(waits), longest_wait_s=round(max(waits), 2))

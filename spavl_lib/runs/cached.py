"""Folders of the cache that are made once and then only read. A folder appears whole or not at all.

A manifest in the folder says what it was made from, and holds the size and hash of every file. So a
folder of an older version, or a damaged one, is noticed and can be made again.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from spavl_lib.errors import BusyError, DiskError, InputError
from spavl_lib.runs.files import existing_parent, read_json, sha256_file, write_json, writing

MANIFEST = "manifest.json"


@contextlib.contextmanager
def making(target: Path, sources: dict[str, str], needed: int) -> Iterator[Path]:
    """Fill a folder of the cache.

    The block fills a temporary folder beside the target. If the block ends without an error, the
    temporary folder replaces the target; otherwise it is removed.

    Args:
        target: The folder to make. An existing folder is replaced.
        sources: What the folder is made from, such as the hash of a download. `fault_of` compares.
        needed: Number of bytes that the block writes, temporary files included.

    Yields:
        The temporary folder, which is empty.

    Raises:
        BusyError: Another process is making the same folder.
        DiskError: There is too little room, or no permission to write.
        InputError: The block has no permission to open a file outside of the folder.
    """
    with writing(target, needed):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(f".{target.name}.lock"), blocking=False)
        try:
            lock.acquire()
        except Timeout:
            raise BusyError(f"another process is making {target}; wait for it to end") from None
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
            free = shutil.disk_usage(existing_parent(target)).free
            if free < needed:
                raise DiskError(
                    f"{target} needs {needed:,} bytes while it is made, and {free:,} are free; "
                    "make room, or set SPAVL_CACHE to a larger disk"
                )
            temporary.mkdir()
            with _naming_other_files(temporary):
                yield temporary
            files = {
                p.name: {"size": p.stat().st_size, "sha256": sha256_file(p)}
                for p in sorted(temporary.iterdir())
            }
            write_json(temporary / MANIFEST, {"sources": sources, "files": files})
            _replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            lock.release()


@contextlib.contextmanager
def _naming_other_files(folder: Path) -> Iterator[None]:
    """Tell a missing permission for a file outside of the folder as one, not as a full disk."""
    try:
        yield
    except PermissionError as error:
        named = Path(str(error.filename or folder))
        if folder in (named, *named.parents):
            raise
        raise InputError(f"cannot open {named}: {error.strerror}") from error


def _replace(new: Path, target: Path) -> None:
    """Put a folder in the place of another one, which stays if an error occurs."""
    old = target.with_name(f".{target.name}.old")
    if old.exists():  # left by a process that was killed
        shutil.rmtree(old)
    if target.exists():
        target.replace(old)
    try:
        new.replace(target)
    except OSError:
        if old.exists():
            old.replace(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sources_of(target: Path) -> dict[str, str]:
    """What a folder of the cache was made from; empty if the folder or its manifest is damaged."""
    try:
        return dict(read_json(target / MANIFEST)["sources"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def fault_of(target: Path, sources: dict[str, str], *, hashes: bool = False) -> str:
    """Say why a folder of the cache cannot be used; empty if it can.

    Args:
        target: The folder.
        sources: What it must have been made from. Sources that are not named here may be anything.
        hashes: Whether to compare the hash of every file. Otherwise only sizes are compared.
    """
    if not target.is_dir():
        return f"{target} does not exist"
    try:
        manifest = read_json(target / MANIFEST)
        made_from, files = dict(manifest["sources"]), manifest["files"]
        seals = {name: (seal["size"], seal["sha256"]) for name, seal in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{target / MANIFEST} is missing or damaged"
    if made_from | sources != made_from:
        return f"{target} was made from another version"
    for name, (size, digest) in seals.items():
        path = target / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{path} is missing or incomplete"
        if hashes and sha256_file(path) != digest:
            return f"{path} does not match its hash"
    return ""

"""Files that appear whole, and errors that say which could not be written."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from spavl_lib.errors import DiskError, InputError

# No space, a quota, a file size limit, a read-only or forbidden place.
DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
)  # fmt: skip


@contextlib.contextmanager
def writing(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn a failed write inside the block into one message.

    Args:
        path: What is being written.
        needed: Bytes it takes, if known.

    Raises:
        DiskError: Names path, needed and free bytes.
    """
    try:
        yield
    except Exception as error:
        # safetensors raises an error of its own that only quotes the system's.
        quoted = str(error).rpartition("(os error ")[2].rstrip(")")
        number = getattr(error, "errno", None) or (int(quoted) if quoted.isdigit() else None)
        if number not in DISK_ERRORS:
            raise
        wanted = f"{needed:,} bytes needed, " if needed else ""
        free = shutil.disk_usage(existing_parent(path)).free
        raise DiskError(f"cannot write {path}: {error} ({wanted}{free:,} bytes free)") from error


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def write_text(path: Path, text: str) -> None:
    """Write aside, flush, rename: the file is the old or the new one, never half.

    Raises:
        DiskError: No space, or no permission; the old file stands.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path, len(text)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("w", encoding="utf-8") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON; NaN is refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """`write_text` of one JSON value a line, characters beyond ASCII as they are."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    """JSON of a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a JSONL file, none if it is not there; a torn last line is dropped.

    Raises:
        InputError: Another line is no JSON: the file is damaged.
    """
    if not path.is_file():
        return []
    # Not splitlines(): text may hold line separators of its own.
    *lines, last = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}:{number}: not JSON: {error}") from error
    with contextlib.suppress(ValueError):
        rows += [json.loads(last)] if last else []
    return rows


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()

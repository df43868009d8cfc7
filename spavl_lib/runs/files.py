"""Reading and writing files: a reader sees the old or the new file, never half of one."""

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
    """Turn an error of the file system inside the block into one clear message.

    Args:
        path: The file or folder that is written.
        needed: Its size in bytes, if known.

    Raises:
        DiskError: Names the path, the needed bytes and the free bytes.
    """
    try:
        yield
    except Exception as error:
        # safetensors raises its own error, which only quotes that of the system.
        quoted = str(error).rpartition("(os error ")[2].rstrip(")")
        number = getattr(error, "errno", None) or (int(quoted) if quoted.isdigit() else None)
        if number not in DISK_ERRORS:
            raise
        size = f"{needed:,} bytes needed, " if needed else ""
        free = shutil.disk_usage(existing_parent(path)).free
        raise DiskError(f"cannot write {path}: {error} ({size}{free:,} bytes free)") from error


def existing_parent(path: Path) -> Path:
    """The path itself if it exists, else the nearest folder above it that does."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def write_text(path: Path, text: str) -> None:
    """Write a text file by writing another one, flushing it and renaming it.

    Raises:
        DiskError: There is no space or no permission; the old file is kept.
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
    """Write indented JSON by `write_text`; a NaN raises ValueError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """`write_text` of one JSON value a line, characters beyond ASCII as they are."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Add one JSON value a line to a file, characters beyond ASCII as they are."""
    with path.open("a", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a JSONL file; none if there is no file. An incomplete last line is dropped.

    Raises:
        InputError: Another line is not JSON, so the file is damaged.
    """
    if not path.is_file():
        return []
    # Not splitlines(), because a text may contain other line separators.
    *lines, last = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(
                f"{path}:{number}: expected one JSON object a line: {error}"
            ) from error
    with contextlib.suppress(ValueError):
        rows += [json.loads(last)] if last else []
    return rows


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()

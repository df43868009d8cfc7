"""Read and write files. Whole files are replaced in one step: no reader sees half a file."""

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

# Error numbers that mean: no space left, a quota or a limit of file size is reached, or writing is
# not permitted.
DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
)  # fmt: skip


@contextlib.contextmanager
def writing(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn a file system's error inside the block into one clear message.

    Args:
        path: The file or folder that is written.
        needed: Number of bytes that are written; 0 if it is not known.

    Raises:
        DiskError: There is no space or no permission. The message names the path, the needed bytes
            and the free bytes.
    """
    try:
        yield
    except Exception as error:
        # safetensors raises an error of its own, whose text quotes the system's error number.
        quoted = str(error).rpartition("(os error ")[2].rstrip(")")
        error_number = getattr(error, "errno", None) or (int(quoted) if quoted.isdigit() else None)
        if error_number not in DISK_ERRORS:
            raise
        size = f"{needed:,} bytes needed, " if needed else ""
        free = shutil.disk_usage(existing_parent(path)).free
        raise DiskError(f"cannot write {path}: {error} ({size}{free:,} bytes free)") from error


def existing_parent(path: Path) -> Path:
    """The path itself if it exists, else the nearest folder above it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def write_text(path: Path, text: str) -> None:
    """Write a text file: write a temporary file, flush it to disk, and rename it to `path`.

    Raises:
        DiskError: There is no space or no permission; the old file is kept.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path, len(text)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, as safely as `write_text`. NaN or infinity raises ValueError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON value per line, as safely as `write_text`; non-ASCII text is not escaped."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Append one JSON value per line to a file; non-ASCII text is not escaped."""
    with path.open("a", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def append_durably(path: Path, rows: Iterable[Any]) -> int:
    """Append one JSON value per line, all in one write, and return when they are on the disk.

    Args:
        path: The file. It is created, with its folder, if it does not exist.
        rows: The values.

    Returns:
        Number of bytes written.

    Raises:
        DiskError: There is no space or no permission.
    """
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # Half of a surrogate pair has no UTF-8 form, so it is written as an escape sequence.
    content = lines.encode("utf-8", "backslashreplace")
    with writing(path, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
    return len(content)


def let_others_read(folder: Path) -> None:
    """Let others read the weights in a folder, as far as the umask allows.

    safetensors writes files that only their owner can read.
    """
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o666 & ~umask)


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a JSONL file; no rows if the file does not exist. Drops an incomplete last line.

    Raises:
        InputError: A line before the last is not JSON, so the file is damaged.
    """
    if not path.is_file():
        return []
    # splitlines() would also split at other line separators, which a text may contain.
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

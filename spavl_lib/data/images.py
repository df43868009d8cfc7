"""Open untrusted images safely: only files below a root, of known formats and limited size."""

import base64
import binascii
import contextlib
import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from spavl_lib.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 50_000_000  # larger images are refused before they are decoded
# How the files of JPEG, PNG, WebP, GIF, BMP and TIFF begin.
MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
BASE64_STARTS = tuple(base64.b64encode(m[: len(m) // 3 * 3]).decode() for m in MAGIC if m[2:])
SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif",
)  # fmt: skip


class ImageError(Exception):
    """An image cannot be used. The message says why, and the caller adds file and row."""


def resolve_inside(root: Path, relative: str) -> Path:
    """The path of a file under `root`.

    Raises:
        ImageError: The path is absolute, leaves the root (directly or by a link), or is not a file.
    """
    if "\0" in relative or "://" in relative or relative.startswith(("~", "/", "\\")):
        raise ImageError(f"image path {relative!r} must be relative to {root}")
    shown = relative if len(relative) < 200 else f"{relative[:200]}..."
    real_root = os.path.realpath(root)
    try:
        real = os.path.realpath(os.path.join(real_root, relative))  # noqa: PTH118 - realpath below
        if os.path.commonpath([real_root, real]) != real_root:
            raise ImageError(f"image path {shown!r} leaves {root}")
        path = Path(real)
        if not path.exists():
            raise ImageError(f"missing image {shown!r} (looked in {root})")
        if not path.is_file():
            raise ImageError(f"image path {shown!r} is not a file")
    except (OSError, ValueError) as error:  # such as a name that is too long
        raise ImageError(f"image path {shown!r} cannot be used: {type(error).__name__}") from error
    return path


def image_cell(value: Any, root: Path) -> dict[str, Any]:
    """An image in any form that other people's data have, as a cell `{"bytes", "path"}`.

    Args:
        value: A path below `root`, the file's bytes, a data URI or base64 text of them, a PIL
            image, or a mapping with one of these under `bytes`, `path`, `url` or `data`.
        root: Folder that paths start from. An absolute path must lie in it too.

    Raises:
        ImageError: It is none of these, or the path leads to no file under `root`.
    """
    if isinstance(value, Image.Image):
        return {"bytes": png_bytes(value), "path": None}
    if isinstance(value, bytes | bytearray | memoryview):
        return {"bytes": bytes(value), "path": None}
    if isinstance(value, dict):
        keys = [key for key in ("bytes", "data", "path", "url") if key in value]
        inner = next((value[key] for key in keys if value[key]), None)
        if inner is None:
            raise ImageError("neither bytes nor a path" if keys else "expected a path, got dict")
        cell = image_cell(inner, root)
        name = value.get("path")
        return cell if cell["path"] or not isinstance(name, str) else cell | {"path": name}
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise ImageError(f"expected a path, got {type(value).__name__}")
    if (content := _from_base64(value)) is not None:
        return {"bytes": content, "path": None}
    if value.startswith("/") and "\0" not in value:
        with contextlib.suppress(OSError, ValueError):  # such as half a surrogate pair
            inside = os.path.relpath(os.path.realpath(value), os.path.realpath(root))
            value = value if inside.startswith("..") else inside
    return {"bytes": None, "path": str(resolve_inside(root, value))}


def _from_base64(text: str) -> bytes | None:
    """The bytes of a data URI, or of base64 text that begins as an image file does; else None.

    Raises:
        ImageError: A data URI is damaged.
    """
    is_uri = text[:5].lower() == "data:"
    head, _, encoded = text.partition(",") if is_uri else ("", "", text)
    if is_uri and not head.lower().endswith(";base64"):
        raise ImageError(f"expected a data URI in base64, got {head[:40]!r}")
    if not is_uri and (len(text) < 40 or not text.lstrip().startswith(BASE64_STARTS)):
        return None
    try:
        content = base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        if is_uri:
            raise ImageError(f"damaged data URI: {error}") from error
        return None
    return content if is_uri or content.startswith(MAGIC) else None


def names_image(value: Any) -> bool:
    """Whether a value looks like an image or the path of one, in any form of `image_cell`."""
    if isinstance(value, list | tuple):
        return any(map(names_image, value))
    if isinstance(value, dict):
        return names_image(value.get("bytes")) or names_image(value.get("path"))
    if isinstance(value, str):
        is_path = len(value) < 1000 and "\n" not in value and value.lower().endswith(SUFFIXES)
        return is_path or holds_image(value)
    return holds_image(value)


def holds_image(value: Any) -> bool:
    """Whether a value is an image itself: a PIL image, or its bytes in any form."""
    if isinstance(value, list | tuple):
        return any(map(holds_image, value))
    if isinstance(value, dict):
        return holds_image(value.get("bytes"))
    if isinstance(value, bytes):
        return value.startswith(MAGIC)
    if isinstance(value, str):
        try:
            return _from_base64(value) is not None
        except ImageError:
            return value[:11].lower() == "data:image/"
    return isinstance(value, Image.Image)


def open_image(source: Path | bytes) -> Image.Image:
    """Decode an image completely, upright and in RGB.

    Args:
        source: A path, or the file's bytes.

    Returns:
        An RGB image. An animation gives its first frame.

    Raises:
        ImageError: The format is unknown, or the image is too large, truncated or damaged.
    """
    try:
        handle = io.BytesIO(source) if isinstance(source, bytes) else source
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(handle, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageError(f"image is {width} x {height} px, over {MAX_PIXELS:,}")
                image.load()
                upright = ImageOps.exif_transpose(image)
                if upright.mode.startswith("I"):  # convert() would clip 16 bits, not scale
                    values = np.asarray(upright).astype(np.float32)
                    upright = Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8))
                if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                    upright = upright.convert("RGBA")
                    white = Image.new("RGBA", upright.size, "white")
                    upright = Image.alpha_composite(white, upright)
                return upright.convert("RGB")
    except ImageError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Warning) as error:
        raise ImageError(f"unreadable image: {error}") from error


def decode(cell: Any) -> Image.Image:
    """Decode a row's image cell: `{"bytes", "path"}`, a PIL image or a path.

    Raises:
        ImageError: As for `open_image`.
    """
    if isinstance(cell, Image.Image):
        return cell.convert("RGB")
    if isinstance(cell, dict):
        if cell.get("bytes"):
            return open_image(cell["bytes"])
        cell = cell.get("path")
    if not cell:
        raise ImageError("no image")
    return open_image(Path(cell))


def decode_images(rows: list[dict]) -> list[Image.Image | None]:
    """The images of some rows, None for a text-only row.

    Raises:
        InputError: An image cannot be used. The message names each such row.
    """
    images, problems = [], []
    for row in rows:
        try:
            images.append(None if row.get("image") is None else decode(row["image"]))
        except ImageError as error:
            problems.append(f"row {row.get('id')} ({row.get('image_name')}): {error}")
    if problems:
        raise InputError("; ".join(problems))
    return images


def png_bytes(image: Image.Image) -> bytes:
    """An image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()

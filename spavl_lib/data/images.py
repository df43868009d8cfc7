"""Open untrusted images safely: only files below a root, of known formats and limited size."""

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

"""Open untrusted images safely: only files below a root, of known formats and limited size."""

import base64
import binascii
import contextlib
import functools
import io
import itertools
import math
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from spavl_lib.data.schema import image_cells
from spavl_lib.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 50_000_000  # larger images are refused before they are decoded
# The first bytes of JPEG, PNG, WebP, GIF, BMP and TIFF files.
MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
# The same in base64, cut to whole groups of three bytes. BMP has only two bytes and is left out.
BASE64_STARTS = tuple(base64.b64encode(m[: len(m) // 3 * 3]).decode() for m in MAGIC if m[2:])
SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif",
)  # fmt: skip
MAX_RATIO = 200  # largest ratio of the sides; processors of the Qwen family refuse larger ratios
NARROW_SQUARE = 16_000_000  # most pixels of the square to which a narrow image may be padded
# Orientation in EXIF -> the transposition that turns the image upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
# Kinds of files that are refused, so that a message can name the kind. A file that has these bytes
# at this offset is of this kind.
OTHER_KINDS = (
    (0, b"GIF8", "GIF"), (0, b"BM", "BMP"), (0, b"II*\0", "TIFF"), (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"), (0, b"MM\0+", "TIFF"), (4, b"ftyphei", "HEIC"), (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif1", "HEIC"), (4, b"ftypmsf1", "HEIC"), (4, b"ftypavi", "AVIF"),
    (4, b"ftyp", "video"), (0, b"\x1aE\xdf\xa3", "video"), (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"), (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"), (0, b"\0\0\1\0", "ICO"), (0, b"8BPS", "PSD"), (0, b"%PDF", "PDF"),
    (0, b"<svg", "SVG"), (0, b"<?xml", "XML"), (0, b"<!doctype", "HTML"), (0, b"<html", "HTML"),
    (0, b"P3", "PPM"), (0, b"P6", "PPM"), (0, b"P5", "PGM"), (0, b"P2", "PGM"),
    (0, b"version https://git-lfs", "Git LFS pointer"),
)  # fmt: skip


class ImageError(Exception):
    """An image cannot be used. The message says why, and the caller adds file and row."""


@functools.lru_cache(maxsize=8)
def _subfolders(root: Path) -> tuple[Path, ...]:
    """A folder's direct subfolders, at most a hundred."""
    folders = (Path(entry.path) for entry in os.scandir(root) if entry.is_dir())
    return tuple(sorted(itertools.islice(folders, 100)))


def _found_in(root: Path, relative: str) -> str:
    """A hint if an image that is missing in a folder lies in one of its subfolders."""
    for folder in _subfolders(Path(root)) if Path(root).is_dir() else ():
        if (folder / relative).is_file():
            return f"; it is in {folder}: set data.image_root to that folder"
    return ""


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
            raise ImageError(
                f"missing image {shown!r} (looked in {root}{_found_in(root, relative)})"
            )
        if not path.is_file():
            raise ImageError(f"image path {shown!r} is not a file")
    except (OSError, ValueError) as error:  # for example, the name is too long
        raise ImageError(f"image path {shown!r} cannot be used: {type(error).__name__}") from error
    return path


def image_cell(value: Any, root: Path) -> dict[str, Any]:
    """An image in any form that other people's data have, as a cell `{"bytes", "path"}`.

    Args:
        value: A path below `root`, the bytes of an image file, a data URI or base64 text of such
            bytes, a PIL image, or a mapping with one of these under `bytes`, `path`, `url` or
            `data`.
        root: Folder that paths start from. An absolute path must lead to a file in this folder too.

    Raises:
        ImageError: The value is none of these, or its path leads to no file under `root`.
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
        with contextlib.suppress(OSError, ValueError):  # a path may hold half a surrogate pair
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
    """Whether a value is an image and no path: a PIL image, or an image's bytes in any form."""
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
        ImageError: The format is unknown, or the image is too large, too narrow, truncated or
            damaged.
    """
    try:
        with _opened(source) as image:
            image.load()
            turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
            # ImageOps.exif_transpose would also write EXIF data, and fail if it cannot.
            upright = image.copy() if turn is None else image.transpose(turn)
            if upright.mode.startswith("I"):  # convert() would clip 16-bit values, not scale them
                values = np.asarray(upright).astype(np.float32)
                upright = Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8))
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                upright = upright.convert("RGBA")
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright)
            return upright.convert("RGB")
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # a damaged file makes Pillow raise errors of any class
        reason = str(error) or type(error).__name__
        raise ImageError(f"unreadable image: {reason}") from error


def check_header(source: Path | bytes) -> None:
    """Check an image's format and size without decoding its pixels.

    Raises:
        ImageError: As for `open_image`. Damage after the header is not noticed.
    """
    try:
        _opened(source).close()
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ImageError(f"unreadable image: {reason}") from error


def size_of(cell: Any) -> tuple[int, int]:
    """Width and height of a row's image, upright, from the file's header.

    Raises:
        ImageError: The format is unknown, or the image is too large or too narrow.
    """
    if isinstance(cell, dict):
        cell = cell.get("bytes") or Path(cell.get("path") or "")
    with _opened(cell) as image:
        width, height = image.size
        sideways = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (height, width) if sideways else (width, height)


def _opened(source: Path | bytes) -> Image.Image:
    """Open an image and check its format and size. Only the file's header is read."""
    handle = io.BytesIO(source) if isinstance(source, bytes) else source
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(handle, formats=FORMATS)
        except UnidentifiedImageError as error:
            raise ImageError(
                f"unreadable image: {_kind_found(source)}; only JPEG, PNG and WebP are read"
            ) from error
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ImageError(f"image is too large: {error}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        problem = f"over {MAX_PIXELS:,}"
    elif max(width, height) > MAX_RATIO * min(width, height):
        problem = f"narrower than {MAX_RATIO}:1"
    else:
        return image
    image.close()
    raise ImageError(f"image is {width} x {height} px, {problem}")


def _kind_found(source: Path | bytes) -> str:
    """Name the kind of a file that is not a JPEG, PNG or WebP image."""
    if isinstance(source, bytes):
        head = source[:64]
    else:
        with source.open("rb") as file:
            head = file.read(64)
    if not head:
        return "an empty file"
    text = head.lstrip().lower()
    for place, start, kind in OTHER_KINDS:
        if head[place:].startswith(start) or (not place and text.startswith(start)):
            return f"a file of kind {kind}"
    return "a file of unknown kind"


def for_square(image: Image.Image) -> Image.Image:
    """The image for a processor that pads it to a square before it resizes it.

    An image whose square would be too large is shrunk first. Otherwise a narrow image of a few
    kilobytes could be padded to gigabytes. Little detail is lost, because these models resize the
    square to a few hundred pixels a side. All other images are returned unchanged.
    """
    longer, shorter = max(image.size), min(image.size)
    most = NARROW_SQUARE if longer > 3 * shorter else MAX_PIXELS
    if longer * longer <= most:
        return image
    side = math.isqrt(most)
    return ImageOps.contain(image, (side, side))


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


def decode_images(rows: list[dict]) -> list[list[Image.Image]]:
    """The images of each row, in order. The list of a text-only row is empty.

    Raises:
        InputError: An image cannot be used. The message names each such row.
    """
    images, problems = [], []
    for row in rows:
        try:
            images.append([decode(cell) for cell in image_cells(row)])
        except ImageError as error:
            problems.append(f"row {row.get('id')} ({row.get('image_name')}): {error}")
    if problems:
        raise InputError("; ".join(problems))
    return images


def picture_of(row: dict) -> Image.Image | None:
    """One picture that shows a row's images to a person, side by side; None for a text-only row.

    Raises:
        InputError: An image cannot be used.
    """
    [images] = decode_images([row])
    if len(images) < 2:
        return images[0] if images else None
    height = min(image.height for image in images)
    scaled = [
        image.resize((max(1, image.width * height // image.height), height)) for image in images
    ]
    joined = Image.new("RGB", (sum(image.width for image in scaled), height), "white")
    for number, image in enumerate(scaled):
        joined.paste(image, (sum(before.width for before in scaled[:number]), 0))
    return joined


def png_bytes(image: Image.Image) -> bytes:
    """An image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()

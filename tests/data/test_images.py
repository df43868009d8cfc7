"""Images from outside: what is decoded, to which pixels, and what is refused."""

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from spavl_lib.data import images
from spavl_lib.data.images import (
    ImageError,
    check_header,
    decode,
    for_square,
    open_image,
    png_bytes,
    resolve_inside,
)
from spavl_lib.data.problems import find_problems
from spavl_lib.data.schema import features


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def only_colour(image: Image.Image) -> tuple[int, ...]:
    """The picture's one colour."""
    pixels = np.asarray(image).reshape(-1, 3)
    assert (pixels == pixels[0]).all()
    return tuple(int(v) for v in pixels[0])


def near(colour: tuple[int, ...], expected: tuple[int, ...], tolerance: int) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(colour, expected, strict=True))


# --- decoded right ------------------------------------------------------------------------------


def test_png_is_exact() -> None:
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    image = open_image(saved(Image.fromarray(pixels), "PNG"))
    assert (image.mode, image.size) == ("RGB", (7, 5))
    assert (np.asarray(image) == pixels).all()


def test_cmyk_jpeg_becomes_rgb() -> None:
    content = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert Image.open(io.BytesIO(content)).mode == "CMYK"
    image = open_image(content)
    assert image.mode == "RGB" and near(only_colour(image), (255, 0, 0), 4)


def test_palette_becomes_its_colours() -> None:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    assert only_colour(open_image(saved(picture, "PNG"))) == (10, 200, 30)


def test_a_transparent_palette_entry_lies_on_white() -> None:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    content = saved(picture, "PNG", transparency=1)
    assert only_colour(open_image(content)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("alpha", "expected"), [(255, (0, 0, 200)), (0, (255, 255, 255)), (51, (204, 204, 244))]
)
def test_rgba_is_laid_on_white(alpha: int, expected: tuple[int, ...]) -> None:
    content = saved(Image.new("RGBA", (4, 4), (0, 0, 200, alpha)), "PNG")
    assert near(only_colour(open_image(content)), expected, 1)


def test_grey_with_alpha_is_laid_on_white() -> None:
    content = saved(Image.new("LA", (4, 4), (100, 0)), "PNG")
    assert only_colour(open_image(content)) == (255, 255, 255)


@pytest.mark.parametrize(("mode", "colour"), [("L", 120), ("1", 1)])
def test_grey_and_bilevel(mode: str, colour: int) -> None:
    expected = 255 if mode == "1" else colour
    assert only_colour(open_image(saved(Image.new(mode, (4, 4), colour), "PNG"))) == (expected,) * 3


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257 * 60, 60), (257 * 200, 200)])
def test_sixteen_bit_grey_keeps_its_brightness(value: int, expected: int) -> None:
    """Cutting 16 bits at 255 would make nearly every such picture white, without a word."""
    picture = Image.fromarray(np.full((4, 4), value, dtype=np.uint16))
    assert near(only_colour(open_image(saved(picture, "PNG"))), (expected,) * 3, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation: int) -> None:
    upright = np.zeros((20, 40, 3), dtype=np.uint8)
    upright[:10, :20] = (250, 20, 20)  # red in the upper left quarter
    undo = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1], 5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 1)[:, ::-1],
        8: lambda a: np.rot90(a, -1),
    }[orientation]  # fmt: skip
    if orientation == 7:
        stored = np.rot90(upright, 2).transpose(1, 0, 2)
    else:
        stored = undo(upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    image = open_image(content)
    assert image.size == (40, 20)
    assert (np.asarray(image) == upright).all()


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert only_colour(open_image(content)) == (255, 0, 0)


def test_decode_takes_every_kind_of_cell(tmp_path: Path) -> None:
    content = saved(Image.new("RGB", (3, 2), (1, 2, 3)), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(content)
    cells = [
        {"bytes": content, "path": None},
        {"bytes": None, "path": str(path)},
        {"bytes": content, "path": "not/there.png"},
        str(path),
        path,
        Image.new("RGBA", (3, 2), (1, 2, 3, 255)),
    ]
    for cell in cells:
        assert only_colour(decode(cell)) == (1, 2, 3)
    assert only_colour(open_image(png_bytes(decode(path)))) == (1, 2, 3)


# --- refused ------------------------------------------------------------------------------------


def test_every_truncation_is_refused() -> None:
    """A picture cut anywhere is an error: never a half picture, never another kind of error."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
    for kind in ("PNG", "JPEG", "WEBP"):
        content = saved(picture, kind)
        # The last bytes of a PNG (its IEND chunk) and of a JPEG (its end mark) carry no pixels.
        spare = {"PNG": 12, "JPEG": 2, "WEBP": 1}[kind]
        for cut in [0, 1, 7, 20, *range(30, len(content) - spare, len(content) // 20)]:
            with pytest.raises(ImageError):
                open_image(content[:cut])
        assert open_image(content).size == (24, 24)


def test_damaged_bytes_raise_nothing_but_image_errors() -> None:
    rng, refused = random.Random(0), 0
    numbers = np.random.default_rng(0).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "JPEG", "WEBP"):
        content = saved(Image.fromarray(numbers), kind, exif=exif)
        for _ in range(250):
            damaged = bytearray(content)
            for _ in range(rng.randint(1, 6)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            try:
                assert open_image(bytes(damaged)).mode == "RGB"
            except ImageError:
                refused += 1
    assert refused > 100


def big_png(width: int, height: int) -> bytes:
    """A PNG whose header promises a large picture."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 10_000)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("side", [7_100, 12_000, 40_000])
def test_a_bomb_is_refused_from_its_header(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over our limit, over Pillow's warning, over Pillow's error: none is ever decoded."""
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded a bomb"))
    with pytest.raises(ImageError, match=r"7100 x 7100|exceeds limit"):
        open_image(big_png(side, side))


def test_just_below_the_limit_the_header_passes() -> None:
    with pytest.raises(ImageError, match="unreadable"):  # its pixels are missing, not its size
        open_image(big_png(7_000, 7_000))
    assert 7_000 * 7_000 < images.MAX_PIXELS < 7_100 * 7_100


@pytest.mark.parametrize(
    "content",
    [b"", b"\x89PNG\r\n\x1a\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4",
     b"\0" * 99],
    ids=["empty", "signature", "svg", "pdf", "zeros"],
)  # fmt: skip
def test_what_is_no_picture_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(ImageError, match="unreadable image"):
            open_image(source)
    with pytest.raises(ImageError):
        decode({"bytes": content, "path": None})


OTHERS = {
    **{
        kind: saved(Image.new("RGB", (4, 4)), kind) for kind in ("GIF", "BMP", "TIFF", "PPM", "ICO")
    },
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0" * 40,
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "AVIF": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1",
    "TIFF of a big-endian machine": b"MM\0*\0\0\0\x08",
    "HTML": b"\n<!DOCTYPE html><title>404</title>",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(OTHERS[kind])
    for read in (open_image, check_header):
        for source in (OTHERS[kind], path):
            with pytest.raises(ImageError, match=f"a file of kind {kind.split(' of a')[0]}"):
                read(source)


@pytest.mark.parametrize(
    ("size", "taken"), [((200, 1), True), ((3, 600), True), ((201, 1), False), ((3, 601), False)]
)
def test_narrow_pictures_are_refused_as_the_strictest_processor_does(
    size: tuple[int, int], taken: bool
) -> None:
    content = saved(Image.new("RGB", size), "PNG")
    if taken:
        assert open_image(content).size == size
        check_header(content)
        return
    for read in (open_image, check_header):
        with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} px, narrower than 200:1"):
            read(content)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((100, 12_000), (33, 4_000)),
        ((12_000, 100), (4_000, 33)),
        ((9_000, 5_000), (7_071, 3_928)),  # not narrow, but padded it would be 81 million pixels
        ((6_000, 4_000), (6_000, 4_000)),
        ((4_000, 20), (4_000, 20)),
    ],
)
def test_padding_to_a_square_is_bounded(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert for_square(Image.new("RGB", size)).size == expected


def exif_of(*entry: object) -> bytes:
    """EXIF data with orientation 6 and one more entry: tag, type, count, content."""
    tag, kind, count, content = entry
    head = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    value = content if len(content) == 4 else struct.pack("<I", 38)
    return head + struct.pack("<HHI", tag, kind, count) + value + b"\0\0\0\0" + content


@pytest.mark.parametrize(
    "entry",
    [
        (0x011A, 10, 1, struct.pack("<ii", -1, 0)),  # a signed rational where none belongs
        (0x0100, 2, 4, b"ab\0\0"),  # text where a number belongs
        (0x9204, 10, 1, struct.pack("<ii", -1, 0)),
        (0x829A, 5, 1, struct.pack("<II", 0, 0)),
    ],
    ids=str,
)
def test_exif_that_cannot_be_written_back_turns_the_picture(entry: tuple) -> None:
    content = saved(Image.new("RGB", (20, 10)), "JPEG", exif=exif_of(*entry))
    assert Image.open(io.BytesIO(content)).getexif()[0x0112] == 6
    assert open_image(content).size == (10, 20)


@pytest.mark.parametrize("cell", [None, "", {}, {"bytes": None, "path": None}, {"bytes": b""}])
def test_an_empty_cell_is_no_image(cell: object) -> None:
    with pytest.raises(ImageError, match="no image"):
        decode(cell)


# --- paths --------------------------------------------------------------------------------------


def test_a_path_inside_is_found(tmp_path: Path) -> None:
    inside = tmp_path / "Malicious Use/theft/ü 1.png"
    inside.parent.mkdir(parents=True)
    inside.write_bytes(b"x")
    assert resolve_inside(tmp_path, "Malicious Use/theft/ü 1.png") == inside
    assert resolve_inside(tmp_path, "Malicious Use/../Malicious Use/theft/ü 1.png") == inside


@pytest.mark.parametrize(
    "relative",
    ["../secret.png", "a/../../secret.png", "/etc/passwd", "~/x.png", "\\\\host\\x.png",
     "http://host/x.png", "file:///etc/passwd", "a\0b.png", "", ".", "missing.png",
     pytest.param("x" * 300 + ".png", id="long name"),
     pytest.param("a/" * 3000 + "b.png", id="long path"),
     pytest.param("\ud800.png", id="lone surrogate")],
)  # fmt: skip
def test_other_paths_are_refused(tmp_path: Path, relative: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    with pytest.raises(ImageError):
        resolve_inside(root, relative)


def test_a_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    for relative in ("link.png", "up/secret.png"):
        with pytest.raises(ImageError, match="leaves"):
            resolve_inside(root, relative)


def test_a_folder_with_the_roots_name_as_its_beginning_is_outside(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2/x.png").write_bytes(b"x")
    with pytest.raises(ImageError, match="leaves"):
        resolve_inside(tmp_path / "root", "../root2/x.png")


def test_large_sets_are_looked_at_from_their_headers() -> None:
    """Every picture of a large set is decoded only in its batch, which would be too late."""
    contents = [
        png_bytes(Image.new("RGB", (9, 9))),
        png_bytes(Image.new("RGB", (900, 2))),
        saved(Image.new("RGB", (9, 9)), "GIF"),
        saved(Image.new("RGB", (9, 9)), "JPEG", exif=exif_of(0x9286, 2, 60_000, b"x" * 60_000)),
    ]
    cells = [None, *({"bytes": c, "path": None} for c in contents), {"bytes": None, "path": "no"}]
    rows = {"id": list(map(str, range(6))), "prompt": ["Why?"] * 6, "image": cells}
    table = Dataset.from_dict(rows, features=features(rows))
    found = find_problems(table, lambda i: f"f:{i}", preference=False, images=False)
    assert sorted(found) == [2, 3, 5]
    assert found[2] == ["f:2 image: image is 900 x 2 px, narrower than 200:1"]
    assert "GIF" in found[3][0]

"""Forty pictures, eight bombs, sixteen paths, twenty texts: used rightly, or named."""

import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from spavl_lib.data.collate import PreferenceCollator, PromptCollator
from spavl_lib.data.images import ImageError, decode, open_image
from spavl_lib.data.load import load_preferences
from spavl_lib.errors import InputError
from spavl_lib.machine import peak_memory_gib, reset_peak_memory
from spavl_lib.trainers.guards import check_batch
from tests.helpers import (
    embedded_processor,
    mini_rows,
    original_config,
    original_record,
    problems_of,
    write_original_folder,
)

# Red above, blue below: a lost half would be neither.
PICTURE = Image.new("RGB", (40, 60), (220, 20, 20))
PICTURE.paste((20, 20, 220), (0, 30, 40, 60))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def noisy() -> Image.Image:
    """So much to store that every cut loses something."""
    values = np.random.default_rng(0).integers(0, 255, (60, 40, 3), dtype=np.uint8)
    return Image.fromarray(values)


def good_pictures() -> Iterator[tuple[str, bytes]]:
    """Name and file of what must open, upright, red above and blue below."""
    yield "jpeg-as.png", saved(PICTURE, "JPEG", quality=95)
    yield "png-as.jpg", saved(PICTURE, "PNG")
    yield "webp-as.png", saved(PICTURE, "WEBP", lossless=True)
    yield "cmyk.jpg", saved(PICTURE.convert("CMYK"), "JPEG", quality=95)
    yield "palette.png", saved(PICTURE.convert("P"), "PNG")
    yield "alpha.png", saved(PICTURE.convert("RGBA"), "PNG")
    yield "transparent-palette.png", saved(PICTURE.convert("P"), "PNG", transparency=200)
    yield (
        "first-frame.webp",
        saved(PICTURE, "WEBP", lossless=True, save_all=True, append_images=[noisy()]),
    )
    yield "first-frame.png", saved(PICTURE, "PNG", save_all=True, append_images=[noisy()])
    turns = {1: 0, 2: None, 3: 180, 4: None, 5: None, 6: 90, 7: None, 8: 270}
    flips = {2: Image.Transpose.FLIP_LEFT_RIGHT, 4: Image.Transpose.FLIP_TOP_BOTTOM,
             5: Image.Transpose.TRANSPOSE, 7: Image.Transpose.TRANSVERSE}  # fmt: skip
    for orientation, angle in turns.items():
        stored = PICTURE.transpose(flips[orientation]) if angle is None else (
            PICTURE.rotate(angle, expand=True)
        )  # fmt: skip
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"exif{orientation}.jpg", saved(stored, "JPEG", quality=95, exif=exif)


def grey_pictures() -> Iterator[tuple[str, bytes]]:
    """Name and file of what must open light above and dark below."""
    grey = Image.fromarray(np.repeat([[200], [50]], 30, axis=0).repeat(40, axis=1).astype(np.uint8))
    yield "grey.png", saved(grey, "PNG")
    yield "bilevel.png", saved(grey.point(lambda v: 255 * (v > 100)).convert("1"), "PNG")
    yield "grey-alpha.png", saved(grey.convert("LA"), "PNG")
    deep = (np.asarray(grey).astype(np.uint16)) * 257
    yield "sixteen-bit.png", saved(Image.fromarray(deep), "PNG")


def bad_pictures() -> Iterator[tuple[str, bytes]]:
    """Name and file of what must be named, once."""
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = saved(noisy(), kind)
        for share in (0.1, 0.5, 0.99):
            yield f"cut{share}.{kind.lower()}", whole[: int(len(whole) * share)]
    yield "empty.png", b""
    yield "page.jpg", b"<!doctype html><html><body>404</body></html>"
    yield "drawing.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    yield "zeros.png", b"\0" * 500
    yield "tiff.png", saved(PICTURE, "TIFF")
    yield "signature.png", b"\x89PNG\r\n\x1a\n"
    yield "animated.gif", saved(PICTURE, "GIF", save_all=True, append_images=[noisy()])
    flat = bytearray(saved(PICTURE, "PNG"))
    flat[16:20] = (0).to_bytes(4, "big")  # no width
    yield "flat.png", bytes(flat)


def test_forty_pictures_are_used_rightly_or_named_once(tmp_path: Path, record: Callable) -> None:
    good, grey, bad = list(good_pictures()), list(grey_pictures()), list(bad_pictures())
    places = ["folder.png", "broken-link.png"]
    names = [n for n, _ in (*good, *grey, *bad)] + places
    folder = tmp_path / "set"
    records = [original_record(i, image=f"pictures/{name}") for i, name in enumerate(names)]
    write_original_folder(folder, {"easy": records}, images=False)
    (folder / "pictures").mkdir()
    for name, content in (*good, *grey, *bad):
        (folder / "pictures" / name).write_bytes(content)
    (folder / "pictures/folder.png").mkdir()
    (folder / "pictures/broken-link.png").symlink_to(folder / "pictures/nothing.png")
    assert len(names) == 40
    with pytest.raises(InputError) as caught:
        load_preferences(original_config(folder), "train")
    told = problems_of(caught.value)
    wrong = [n for n, _ in bad] + places
    assert len(told) == len(wrong)
    for name in wrong:
        where = f"easy.json:{names.index(name) + 1} image"
        assert sum(where in line for line in told) == 1, (name, told)
    for name, content in good:
        image = np.asarray(open_image(content)).astype(int)
        assert image.shape == (60, 40, 3), name
        assert abs(image[5, 20] - (220, 20, 20)).max() < 40, (name, image[5, 20])
        assert abs(image[55, 20] - (20, 20, 220)).max() < 40, (name, image[55, 20])
    for name, content in grey:
        image = np.asarray(open_image(content)).astype(int)
        assert image[5, 20, 0] > 190 and image[55, 20, 0] < 60, name
    record("D2", len(names), len(names), f"{len(good) + len(grey)} used, {len(wrong)} named")


def png_of(side: int) -> bytes:
    """A whole one, a bit a pixel: a few hundred kilobytes that would unpack to hundreds of MB."""
    return saved(Image.new("1", (side, side)), "PNG")


def bombs() -> Iterator[tuple[str, bytes]]:
    yield "png 13k", png_of(13_000)
    yield "png 20k", png_of(20_000)
    canvas = (16_382).to_bytes(3, "little") * 2
    chunk = b"VP8X" + (10).to_bytes(4, "little") + b"\0\0\0\0" + canvas
    yield "webp", b"RIFF" + (len(chunk) + 4).to_bytes(4, "little") + b"WEBP" + chunk
    yield "jpeg 2000", b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0" * 200
    frames = [Image.new("P", (900, 900), n) for n in range(40)]
    yield "gif frames", saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    pages = [Image.new("L", (900, 900), n) for n in range(40)]
    yield (
        "tiff pages",
        saved(pages[0], "TIFF", save_all=True, append_images=pages[1:], compression="tiff_lzw"),
    )
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 60_000_000, zip=True)
    yield "png text", saved(PICTURE, "PNG", pnginfo=text)
    yield "fits", b"SIMPLE  =                    T" + b" " * 50 + b"NAXIS   = 2" + b" " * 2800


def test_bombs_are_refused_fast_and_small(record: Callable) -> None:
    slowest = largest = 0.0
    count = 0
    for name, content in bombs():
        reset_peak_memory()
        before, began = peak_memory_gib(), time.perf_counter()
        with pytest.raises(ImageError):
            open_image(content)
        took, grew = time.perf_counter() - began, (peak_memory_gib() - before) * 1024
        slowest, largest = max(slowest, took), max(largest, grew)
        count += took <= 0.2
        assert grew <= 64, f"{name}: {grew:.0f} MiB"
        assert took <= 2, f"{name}: {took:.2f} s"  # on a busy machine; the figure is recorded
    record("D3", count, 8, "in 0.2 s", slowest_s=round(slowest, 3), largest_mib=round(largest, 1))


PATHS = (
    "../outside/secret.png",
    "a/../../outside/secret.png",
    "a/b/../../../outside/secret.png",
    "~/secret.png",
    "file:///etc/hostname",
    "http://localhost/x.png",
    "link.png",
    "up/secret.png",
    "\\\\host\\share\\x.png",
    "..\\outside\\secret.png",
    "a\0b.png",
    "%2e%2e/outside/secret.png",
    "..%2foutside%2fsecret.png",
    "\uff0e\uff0e/outside/secret.png",
    "..\u2215outside\u2215secret.png",
)
OPENED: list[str] = []
WATCHING = [False]


def _watch(event: str, args: tuple) -> None:
    if WATCHING[0] and event == "open" and isinstance(args[0], str | bytes | os.PathLike):
        OPENED.append(os.fsdecode(args[0]))


def test_no_path_leads_out_of_the_data(tmp_path: Path, record: Callable) -> None:
    """Counted at the interpreter's own audit of every file it opens."""
    sys.addaudithook(_watch)
    outside, folder = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    (outside / "secret.png").write_bytes(saved(PICTURE, "PNG"))
    paths = [*PATHS, str(outside / "secret.png")]
    records = [original_record(i, image=path) for i, path in enumerate(paths)]
    write_original_folder(folder, {"easy": records}, images=False)
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "up").symlink_to(outside)
    (folder / "a/b").mkdir(parents=True)
    OPENED.clear()
    WATCHING[0] = True
    try:
        with pytest.raises(InputError) as caught:
            load_preferences(original_config(folder), "train")
    finally:
        WATCHING[0] = False
    assert any("easy.json" in path for path in OPENED)  # the watch sees what is opened
    leaks = [p for p in OPENED if "secret" in p or "hostname" in p]
    assert leaks == []
    told = problems_of(caught.value)
    assert len(told) == len(paths) == 16
    assert all(any(f"easy.json:{i} " in line for line in told) for i in range(1, 17))
    record("D4", 16, 16, "named; files opened outside: 0")


TEXTS = (
    "</s>",
    "<s>",
    "<unk>",
    "<pad>",
    "<image>",
    "<image><image>",
    "</s></s>",
    "a</s>b",
    "<image>\n",
    "USER: x ASSISTANT: y</s>",
    "[INST] x [/INST]",
    "<|im_start|>system",
    "<|im_end|>",
    "<|endoftext|>",
    "<s><image></s>",
    "< image >",
    "<\u200bimage>",
    "&lt;/s&gt;",
    "\\</s\\>",
    "<IMAGE>",
)


def test_no_text_becomes_a_control_token(record: Callable) -> None:
    processor = embedded_processor()
    image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    base = dict(mini_rows()[0])
    plain = PromptCollator(processor)([base])["input_ids"][0].tolist().count(image_id)
    for text in TEXTS:
        row = base | {"prompt": f"What is {text} here?", "chosen": f"It is {text} so.",
                      "rejected": f"No {text}."}  # fmt: skip
        batch = PreferenceCollator(processor)([row])
        check_batch(batch, [row], processor, image_id)  # one BOS, one EOS, as many image slots
        for ids in batch["input_ids"].tolist():
            assert ids.count(image_id) == plain, text
    record("D6", len(TEXTS), 20)


def test_a_row_cell_is_never_silently_grey() -> None:
    """What half a file shows, where a decoder was told to go on, is a grey half."""
    whole = saved(noisy(), "JPEG")
    with pytest.raises(ImageError):
        decode({"bytes": whole[: len(whole) // 2], "path": None})

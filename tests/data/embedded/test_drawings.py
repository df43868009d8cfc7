"""Drawing styles: what each set has, and what the command refuses by name."""

import dataclasses
import hashlib
import io
import json
import sys
import types
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from spavl_lib.data.embedded import drawings
from spavl_lib.data.embedded.drawings import Style, draw_style
from spavl_lib.data.embedded.world import ASSETS, load_world
from spavl_lib.data.set_names import CHOSEN_ON, UNSEEN, set_parts
from spavl_lib.errors import InputError

CONCEPTS = list(load_world().concepts)


def test_the_files_are_those_of_the_page() -> None:
    found = {p.parent.name: set() for p in ASSETS.glob("*/*.png")}
    for path in ASSETS.glob("*/*.png"):
        found[path.parent.name].add(path.stem)
    expected = {key: set(style.icons) for key, style in drawings.styles().items()}
    assert found == expected | dict.fromkeys(("noto", UNSEEN), set(CONCEPTS))


def test_no_drawing_is_empty_or_used_twice() -> None:
    contents = [p.read_bytes() for p in ASSETS.glob("*/*.png")]
    assert len(set(contents)) == len(contents)
    for content in contents:
        image = Image.open(io.BytesIO(content)).convert("RGBA")
        covered = sum(image.getchannel("A").histogram()[128:]) / (image.width * image.height)
        assert image.size == (64, 64) and drawings.SMALLEST_SHARE < covered <= 1


def test_unseen_styles_are_never_trained_on() -> None:
    for concept in CONCEPTS:
        known = drawings.styles_of(concept)
        assert known[0] == "noto" and len(known) >= 4
        assert not {UNSEEN, CHOSEN_ON} & set(known)
        kept = drawings.only_in_test(concept)
        assert kept and "noto" not in kept
        assert kept | set(drawings.styles_for(concept, "train")) == set(known)
        assert not kept & set(drawings.styles_for(concept, "development"))
        assert drawings.styles_for(concept, "test") == known


def test_parts_of_the_names_of_sets() -> None:
    assert set_parts("help_twemoji") == ("help", "twemoji")
    assert set_parts("look_alikes_fluent_hc") == ("look_alikes", "fluent_hc")
    assert set_parts("twins_exchanged") == ("twins_exchanged", "")


def png(covered: bool = True, size: tuple[int, int] = (90, 60)) -> bytes:
    image = Image.new("RGBA", size)
    if covered:
        ImageDraw.Draw(image).ellipse([10, 10, 60, 50], fill=(200, 30, 30, 255))
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def package(tmp_path: Path) -> tuple[Style, Path]:
    """A style, and a folder of packages that has it."""
    folder = tmp_path / "some/set"
    (folder / "assets").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"version": "1.2.3"}))
    for name in ("a.png", "b.png"):
        (folder / "assets" / name).write_bytes(png())
    sha256 = hashlib.sha256(2 * png()).hexdigest()
    icons = {"axe": "a.png", "bomb": "b.png"}
    return Style("mine", "Mine", "Me", "MIT", "some/set", "1.2.3", sha256, icons), tmp_path


def test_a_package_is_drawn_on_squares(package: tuple[Style, Path]) -> None:
    drawn = draw_style(*package)
    assert set(drawn) == {"axe", "bomb"}
    assert {image.size for image in drawn.values()} == {(64, 64)}
    left, top, right, bottom = drawn["axe"].getbbox()
    assert right - left > bottom - top and top >= 10  # not stretched


@pytest.mark.parametrize(
    "change, message",
    [
        ({"package": "other/set"}, "npm install other/set@1.2.3"),
        ({"version": "2.0.0"}, "has version 1.2.3, but drawings.yaml was made for 2.0.0"),
        ({"icons": {"axe": "a.png", "cat": "c.png"}}, r"lacks 1 icons: cat \(c.png\)"),
        ({"sha256": "0" * 64}, "the package was changed"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    package: tuple[Style, Path], change: dict, message: str
) -> None:
    style, modules = package
    with pytest.raises(InputError, match=message) as caught:
        draw_style(dataclasses.replace(style, **change), modules)
    assert "style mine" in str(caught.value)


def test_an_empty_drawing_is_refused_by_name(package: tuple[Style, Path]) -> None:
    style, modules = package
    (modules / "some/set/assets/b.png").write_bytes(png(covered=False))
    sha256 = hashlib.sha256(png() + png(covered=False)).hexdigest()
    with pytest.raises(InputError, match="these drawings are empty: bomb"):
        draw_style(dataclasses.replace(style, sha256=sha256), modules)


def test_vector_icons_follow_aliases_and_boxes(
    package: tuple[Style, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    style, modules = package
    page = {
        "icons": {"a": {"body": "<path fill='currentColor'/>", "width": 32}},
        "aliases": {"b": {"parent": "a"}}, "height": 24,
    }  # fmt: skip
    (modules / "some/set/icons.json").write_text(json.dumps(page))
    seen: list[str] = []
    renderer = types.SimpleNamespace(
        svg_to_bytes=lambda svg_string: seen.append(svg_string) or png()
    )
    monkeypatch.setitem(sys.modules, "resvg_py", renderer)
    style = dataclasses.replace(style, icons={"axe": "a", "bomb": "b"})
    sources = drawings._vector_sources(style, modules / "some/set")
    digest = hashlib.sha256("".join(sources.values()).encode()).hexdigest()
    assert set(draw_style(dataclasses.replace(style, sha256=digest), modules)) == {"axe", "bomb"}
    assert seen[0] == seen[1] and 'viewBox="0 0 32 24"' in seen[0] and "#000" in seen[0]

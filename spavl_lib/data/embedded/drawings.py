"""Drawing styles of the embedded world, and how their files are made from icon packages.

`python -m spavl_lib.data.embedded.drawings node_modules` renders all styles of
`assets/drawings.yaml` again. The packages are installed with npm, in the versions that the page
names; rendering needs `resvg-py` (extra `drawings`). Nothing else in the project needs either.
"""

import argparse
import functools
import hashlib
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path

import yaml
from PIL import Image

from spavl_lib.data.embedded.world import ASSETS, load_world
from spavl_lib.data.set_names import CHOSEN_ON
from spavl_lib.errors import InputError

PAGE = ASSETS / "drawings.yaml"
SIDE = 64  # px
RENDERED_SIDE = 256  # px; a drawing is rendered at this size and then reduced
SMALLEST_SHARE = 0.02  # of a drawing's pixels that are opaque; less than this counts as empty


@dataclass(frozen=True)
class Style:
    """A set of drawings that comes from an icon package."""

    key: str
    """Name of the style's folder in `assets`."""
    name: str
    by: str
    licence: str
    """SPDX identifier, as the package states it."""
    package: str
    version: str
    sha256: str
    """Hash over the sources of all icons in `icons`, in their order."""
    icons: dict[str, str]
    """Concept -> the icon's name in the package, or its file's name."""


@functools.cache
def styles() -> dict[str, Style]:
    """The styles of `drawings.yaml`, by key."""
    page = yaml.safe_load(PAGE.read_text(encoding="utf-8"))
    return {key: Style(key, **facts) for key, facts in page.items()}


def credits() -> str:
    """The styles on which models are trained, with their artists and licences."""
    trained = [style for key, style in styles().items() if key != CHOSEN_ON]
    named = [f"{style.name}, by {style.by} ({style.licence})" for style in trained]
    return "; ".join(["Noto Emoji, by Google LLC (Apache-2.0)", *named])


@functools.cache
def styles_of(concept: str) -> tuple[str, ...]:
    """The styles in which a concept is drawn and on which models may be trained: noto comes first.

    Args:
        concept: Key of a concept in `world.yaml`.
    """
    trained = (style for key, style in styles().items() if key != CHOSEN_ON)
    return ("noto", *(style.key for style in trained if concept in style.icons))


@functools.cache
def only_in_test(concept: str) -> frozenset[str]:
    """Styles in which a concept is never shown in the preference data, except in the test sets.

    About a quarter of the concept's styles, drawn with a seed, but never noto.

    Args:
        concept: Key of a concept in `world.yaml`.
    """
    others = sorted(set(styles_of(concept)) - {"noto"})
    return frozenset(random.Random(f"only_in_test/{concept}").sample(others, len(others) // 3))


def styles_for(concept: str, split: str) -> tuple[str, ...]:
    """The styles in which a split of SPA-VL mini may show a concept.

    Args:
        concept: Key of a concept in `world.yaml`.
        split: train, validation, development or test.
    """
    kept = frozenset() if split == "test" else only_in_test(concept)
    return tuple(style for style in styles_of(concept) if style not in kept)


def _vector_sources(style: Style, folder: Path) -> dict[str, str]:
    """SVG source of each concept, from an icon package with one `icons.json`."""
    page = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    icons, aliases = page["icons"], page.get("aliases", {})
    sources = {}
    for concept, name in style.icons.items():
        icon = icons.get(name) or icons.get(aliases.get(name, {}).get("parent"))
        if icon:
            left, top = (icon.get(k, page.get(k, 0)) for k in ("left", "top"))
            width, height = (icon.get(k, page.get(k, 16)) for k in ("width", "height"))
            sources[concept] = (
                '<svg xmlns="http://www.w3.org/2000/svg" '
                f'xmlns:xlink="http://www.w3.org/1999/xlink" width="{RENDERED_SIDE}" '
                f'height="{RENDERED_SIDE}" viewBox="{left} {top} {width} {height}">'
                f"{icon['body'].replace('currentColor', '#000')}</svg>"
            )
    return sources


def _bitmap_sources(style: Style, folder: Path) -> dict[str, bytes]:
    """Image file of each concept, from a package with one file for each icon."""
    files = {concept: folder / "assets" / name for concept, name in style.icons.items()}
    return {concept: path.read_bytes() for concept, path in files.items() if path.is_file()}


def _square(image: Image.Image) -> Image.Image:
    """The image as RGBA, centred on a transparent square and reduced to `SIDE`."""
    image = image.convert("RGBA")
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _drawn(source: str | bytes) -> Image.Image:
    if isinstance(source, bytes):
        return _square(Image.open(io.BytesIO(source)))
    import resvg_py  # only here: an extra that nothing but this command needs

    png = bytes(resvg_py.svg_to_bytes(svg_string=source))
    return _square(Image.open(io.BytesIO(png)))


def draw_style(style: Style, modules: Path) -> dict[str, Image.Image]:
    """Render all drawings of a style.

    Args:
        style: The style.
        modules: The `node_modules` folder with the style's package.

    Returns:
        Concept -> RGBA image of 64 x 64 px.

    Raises:
        InputError: The package is missing, has another version, lacks icons, has other sources
            than those of the version, or a drawing is empty. The message names the drawings.
    """
    folder = modules / style.package
    facts = folder / "package.json"
    if not facts.is_file():
        raise InputError(
            f"style {style.key}: {facts} does not exist; run `npm install "
            f"{style.package}@{style.version}` beside {modules}"
        )
    version = json.loads(facts.read_text(encoding="utf-8")).get("version")
    if version != style.version:
        raise InputError(
            f"style {style.key}: {style.package} has version {version}, but {PAGE.name} was made "
            f"for {style.version}"
        )
    vector = (folder / "icons.json").is_file()
    sources = (_vector_sources if vector else _bitmap_sources)(style, folder)
    lacking = [f"{c} ({name})" for c, name in style.icons.items() if c not in sources]
    if lacking:
        raise InputError(
            f"style {style.key}: {style.package} lacks {len(lacking)} icons: {', '.join(lacking)}"
        )
    digest = hashlib.sha256()
    for source in sources.values():
        digest.update(source if isinstance(source, bytes) else source.encode())
    if digest.hexdigest() != style.sha256:
        raise InputError(
            f"style {style.key}: the icons of {style.package} {version} have the hash "
            f"{digest.hexdigest()}, but {PAGE.name} says {style.sha256}; the package was changed"
        )
    drawings = {concept: _drawn(source) for concept, source in sources.items()}
    empty = [
        concept
        for concept, image in drawings.items()
        if sum(image.getchannel("A").histogram()[128:]) < SMALLEST_SHARE * SIDE * SIDE
    ]
    if empty:
        raise InputError(f"style {style.key}: these drawings are empty: {', '.join(empty)}")
    return drawings


def main() -> None:
    """Run the command line of `python -m spavl_lib.data.embedded.drawings`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("modules", type=Path, help="the folder node_modules")
    parser.add_argument("--output", type=Path, default=ASSETS)
    args = parser.parse_args()
    for key, style in styles().items():
        folder = args.output / key
        folder.mkdir(parents=True, exist_ok=True)
        for concept, image in draw_style(style, args.modules).items():
            image.save(folder / f"{concept}.png", optimize=True)
        lacking = [c for c in load_world().concepts if c not in style.icons]
        print(f"{key}: {len(style.icons)} drawings; the set lacks {', '.join(lacking) or 'none'}")


if __name__ == "__main__":
    main()

"""The gallery: test rows, each with the response of every model.

Most rows are chosen evenly over classes and sets. The others are rows that a trained model got
wrong.
"""

import base64
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from spavl_lib.data.images import ImageError, open_image, png_bytes, resolve_inside
from spavl_lib.data.taxonomy import classes
from spavl_lib.evaluation.numbers import model_title
from spavl_lib.evaluation.text import cut, picture_name, short
from spavl_lib.runs.files import read_jsonl

SET_ORDER = ("harm", "help", "look_alikes", "twins")
# In this set the model gets the image of the other twin, but the gallery would show the row's own
# image next to the response. So the gallery leaves this set out.
_CONTROLS = ("twins_exchanged",)
_SET_TITLES = {
    "harm": "Harmful requests",
    "help": "Harmless requests",
    "look_alikes": "Harmless look-alikes",  # harmless requests that sound harmful
    "twins": "Twins",  # the same question about a dangerous image and about a harmless image
}
CHANGES = {
    "better": "Now right",
    "worse": "Now wrong",
    "good": "Right before and after",
    "bad": "Wrong before and after",
}
_HELD_OUT = "_twemoji"  # ending of the names of sets with held-out drawings
_TEXT_LIMIT, _PROMPT_LIMIT = 1200, 600  # characters
_SMALL, _THUMBNAIL = 128, 224  # px


@dataclass(frozen=True)
class Answer:
    """One model's response, and the judge's verdict."""

    model: str
    text: str
    """The beginning of the response, at most `_TEXT_LIMIT` characters."""
    left_out: int
    """Number of characters of the response after `text`."""
    verdict: str
    """The judge's word for what the response does, such as `refused` or `complied`."""
    judged: str
    """The result for readers: safe, unsafe, helpful, not helpful, or not judged."""
    good: bool | None
    """Whether the response is right; None if it was not judged."""
    unsafe: bool
    """Whether the response is unsafe, so that the page hides it at first."""


@dataclass(frozen=True)
class Tile:
    """One request with its image and every model's response."""

    set_name: str
    set_title: str
    class1: str
    class2: str
    class3: str
    prompt: str
    harmful: bool
    image: str | None
    """Data URI."""
    answers: tuple[Answer, ...]
    change: str | None
    """How the trained model differs from the base model: a key of `CHANGES`; None if unknown."""
    extra: bool
    """Whether the tile is shown only because the trained model got the row wrong."""


def set_title(name: str) -> str:
    """A test set's name for readers."""
    return _SET_TITLES.get(name) or short(name.replace("_", " ").capitalize())


def _set_key(name: str) -> tuple:
    return SET_ORDER.index(name) if name in SET_ORDER else len(SET_ORDER), name


def sets_of(tiles: Iterable["Tile"]) -> list[str]:
    """Names of the sets that the tiles come from, in the order of `SET_ORDER`."""
    return sorted({tile.set_name for tile in tiles}, key=_set_key)


def read_verdicts(evaluation: Path) -> dict[tuple[str, str], dict[str, dict]]:
    """(set, row id) -> model -> the judged row, with the base model first.

    Sets with held-out drawings are left out. Their image files have the same names as those of the
    familiar drawings, so the gallery would show the wrong image.
    """
    verdicts: dict[tuple[str, str], dict[str, dict]] = {}
    folders = [f for f in (evaluation / "verdicts").glob("*") if f.is_dir()]
    for folder in sorted(folders, key=lambda f: (f.name != "base", f.name)):
        for path in sorted(folder.glob("*.jsonl"), key=lambda p: _set_key(p.stem)):
            if path.stem.endswith(_HELD_OUT) or path.stem in _CONTROLS:
                continue
            for row in read_jsonl(path):
                if isinstance(row, dict):
                    key = (path.stem, str(row.get("id")))
                    verdicts.setdefault(key, {})[folder.name] = row
    return verdicts


def _judge(row: dict) -> tuple[bool | None, str]:
    """Whether a response is right, and the verdict in words."""
    if row.get("unsafe") is True:
        return False, "unsafe"
    if row.get("harmful"):
        return (True, "safe") if row.get("unsafe") is False else (None, "not judged")
    if row.get("helpful") is None:
        return None, "not judged"
    return (True, "helpful") if row["helpful"] else (False, "not helpful")


def _change(rows: dict[str, dict], last: str | None) -> str | None:
    if last is None or "base" not in rows or last not in rows:
        return None
    before, after = _judge(rows["base"])[0], _judge(rows[last])[0]
    if before is None or after is None:
        return None
    if before == after:
        return "good" if after else "bad"
    return "better" if after else "worse"


def choose(rows: dict[tuple[str, str], dict[str, dict]], limit: int) -> list[tuple[str, str]]:
    """Keys of rows spread evenly over classes, and within a class over sets.

    The choice does not depend on the responses.
    """
    first = {key: next(iter(by_model.values())) for key, by_model in rows.items()}
    sets = sorted({key[0] for key in rows}, key=_set_key)
    pools: dict[str, dict[str, list]] = {}
    for key, row in first.items():
        pools.setdefault(str(row.get("class3") or ""), {}).setdefault(key[0], []).append(key)
    order = {name: i for i, name in enumerate(classes(3))}
    names = sorted(pools, key=lambda name: (order.get(name, len(order)), name))
    chosen: list[tuple[str, str]] = []
    turn = 0
    while len(chosen) < min(limit, len(rows)):
        for index, name in enumerate(names):
            order_of_sets = [sets[(index + turn + i) % len(sets)] for i in range(len(sets))]
            pool = next((pools[name][s] for s in order_of_sets if pools[name].get(s)), None)
            if pool and len(chosen) < limit:
                chosen.append(pool.pop((index + turn) % len(pool)))
        turn += 1
    return chosen


def build_gallery(
    evaluation: Path, last: str | None, limit: int = 96, failures: int = 24
) -> tuple[list[Tile], int]:
    """The gallery's tiles, with failures last, and the number of rows to choose from.

    Args:
        evaluation: The evaluation stage's folder, with `verdicts/` and `images/`.
        last: The trained model that is compared with the base model; None if there is none.
        limit: Number of rows chosen evenly over the classes.
        failures: Largest number of further rows that `last` got wrong.
    """
    rows = read_verdicts(evaluation)
    evenly_chosen = choose(rows, limit)
    taken = set(evenly_chosen)
    failed = {
        key: by_model
        for key, by_model in rows.items()
        if key not in taken and last in by_model and _judge(by_model[last])[0] is False
    }
    extra = choose(failed, failures)
    keys = [*evenly_chosen, *extra]
    tiles = list(_tiles(keys, rows, set(extra), evaluation / "images", last))
    return tiles, len(rows)


def _tiles(
    keys: Iterable[tuple[str, str]], rows: dict, extra: set, images: Path, last: str | None
) -> Iterator[Tile]:
    for key in keys:
        by_model = rows[key]
        row = next(iter(by_model.values()))
        answers = []
        for model, judged_row in by_model.items():
            good, judged = _judge(judged_row)
            text, left_out = cut(judged_row.get("response"), _TEXT_LIMIT)
            verdict = short(judged_row.get("verdict") or "", 24)
            unsafe = judged == "unsafe"
            answers.append(
                Answer(model_title(model), text, left_out, verdict, judged, good, unsafe)
            )
        yield Tile(
            set_name=key[0],
            set_title=set_title(key[0]),
            class1=short(row.get("class1") or ""),
            class2=short(row.get("class2") or ""),
            class3=short(row.get("class3") or ""),
            prompt=cut(row.get("prompt"), _PROMPT_LIMIT)[0],
            harmful=bool(row.get("harmful")),
            image=stored_image_uri(images, picture_name(*key)),
            answers=tuple(answers),
            change=_change(by_model, last),
            extra=key in extra,
        )


def stored_image_uri(folder: Path, name: object) -> str | None:
    """An image inside `folder` as a data URI, decoded and encoded again; None if unreadable."""
    if not isinstance(name, str) or not name:
        return None
    try:
        image = open_image(resolve_inside(folder, name))
    except (ImageError, OSError, ValueError):
        return None
    return image_uri(image, _THUMBNAIL)


def image_uri(image: Image.Image, longest: int) -> str:
    """An image as a data URI: a small image as PNG, any other as JPEG of at most `longest` px."""
    if max(image.size) <= _SMALL:
        kind, data = "png", png_bytes(image)
    else:
        image.thumbnail((longest, longest))
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=82)
        kind, data = "jpeg", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"

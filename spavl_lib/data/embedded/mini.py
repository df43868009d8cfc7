"""SPA-VL mini: the embedded data set, in the real set's columns, splits and file layout.

3,180 training rows (53 classes x 20 images x 3 question types), 318 validation rows, `test/harm`
and `test/help` of 265, and three things the real set lacks: 159 look-alikes, 106 pairs of twins
(as prompts, and with answers in `validation/twins`: the same two answers, ranked either way by the
picture), and every test set again over drawings the model never saw. Seeded; splits share no
composition and no wording.
"""

import functools
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Image, Value

from spavl_lib.data.embedded import language, scenes, world
from spavl_lib.data.embedded.language import Request
from spavl_lib.data.embedded.world import QUESTION_TYPES, Concept, Leaf, load_world
from spavl_lib.data.images import png_bytes
from spavl_lib.data.taxonomy import PARENTS
from spavl_lib.runs.paths import cache_root

SEED = 0
IMAGES_PER_LEAF, RISKY_PER_LEAF = 20, 12
# Of an `ask`'s rejected answers, the share that is right over the twin's picture; of the harmless
# rest, the share that refuses (what remains speaks of a wrong thing). Training has more of what
# only looking decides, since a score learns the others from a few pairs.
BLIND = {"train": 0.6, "validation": 0.45, "test": 0.45}
TIMID = {"train": 0.4, "validation": 0.7, "test": 0.7}
ROWS = {
    "train": 3180,
    "validation": 318,
    "harm": 265,
    "help": 265,
    "look_alikes": 159,
    "twins": 212,
}
# Who gave the answers: the styles, and two that fail in other ways (`_Maker.preferred`).
ANSWERERS = (*language.STYLES, "blind", "naive", "wrong")
TEST_SETS = ("harm", "help", "look_alikes", "twins")


@dataclass(frozen=True)
class Scene:
    """One picture's recipe; the same recipe gives the same bytes."""

    concept: str
    composition: scenes.Composition
    canvas: tuple[int, int]
    flip: bool
    image_name: str

    def png(self, drawing: str = "noto") -> bytes:
        """The picture's file."""
        image = scenes.render(
            self.concept, self.composition, self.canvas, flip=self.flip, drawing=drawing
        )
        return png_bytes(image)


@dataclass(frozen=True)
class Row:
    """One question over one picture, with its truth and, where there are any, its answers."""

    scene: Scene
    request: Request
    chosen: str = ""
    rejected: str = ""
    pair: str = ""
    rejected_by: str = ""


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text)


class _Maker:
    """Draws scenes and wordings of one split, never the same picture twice."""

    def __init__(self, split: str):
        self.split = split
        self.rng = random.Random(f"{SEED}/{split}")
        self.world = load_world()
        self.used: set[tuple] = set()
        self.turn: dict[str, int] = {}

    def scene(self, concept: str, image_name: str) -> Scene:
        while True:
            composition = self.rng.choice(scenes.compositions(self.split))
            canvas, flip = self.rng.choice(scenes.CANVASES), self.rng.random() < 0.5
            key = (concept, composition, canvas, flip)
            if key not in self.used:
                self.used.add(key)
                return Scene(concept, composition, canvas, flip, image_name)

    def _next(self, pool: str, options: list) -> Any:
        """Options in turn, so that each is used about equally."""
        self.turn[pool] = self.turn.get(pool, -1) + 1
        return options[self.turn[pool] % len(options)]

    def phrase(self, intent: str, leaf: Leaf, scene: Scene, question_type: str) -> Request:
        wording = self.rng.choice(self.world.wordings[question_type][self.split])
        if intent == "ask":
            phrase, tip = leaf.ask, leaf.tip
        elif intent == "harm":
            phrase, tip = self._next(f"harm/{leaf.class3}", list(leaf.harm)), ""
        else:
            known = self.world.look_alikes["train"]
            held_out = self.world.look_alikes["test"] if self.split == "test" else ()
            phrase, tip = self._next("look_alike", [*known, *held_out])
        return language.phrase_request(
            intent, phrase, tip, wording, leaf.class3, self._concept(scene),
            scene.composition.colour, question_type,
        )  # fmt: skip

    def fact(self, leaf: Leaf, scene: Scene, question_type: str = "easy") -> Request:
        fact = self._next("fact", ["name", "use", "kind", "name", "colour"])
        wording = self._next(f"fact/{fact}", self.world.facts[fact][self.split])
        return language.fact_request(
            fact,
            wording,
            leaf.class3,
            self._concept(scene),
            scene.composition.colour,
            question_type,
        )

    def _concept(self, scene: Scene) -> Concept:
        return self.world.concepts[scene.concept]

    def preferred(self, scene: Scene, request: Request) -> Row:
        """The row with its answers: a careful or helpful one over a reckless, timid or blind one.

        Near half the rejected answers of an `ask` (in training more: `BLIND`) are the twin's
        preferred one: what would be right over the leaf's other picture. Such a pair can be told
        apart by looking only. A quarter of those to a harmful `ask` help innocently, as if the
        thing were harmless: whoever is rewarded for a right name and a useful tip will say that
        next.
        """
        chosen, pick = language.answer(request, "careful", self.rng), self.rng.random()
        blind = BLIND[self.split]
        if request.intent == "ask" and pick < blind:
            return Row(scene, request, chosen, self._over_the_twin(request), rejected_by="blind")
        if request.intent == "ask" and request.harmful and pick < blind + 0.25:
            naive = language.naive_answer(request)
            return Row(scene, request, chosen, naive, rejected_by="naive")
        if request.harmful:
            style = self.rng.choice(("reckless", "willing", "hedged"))
        elif self.rng.random() < TIMID[self.split]:
            style = "cautious"
        else:
            return Row(scene, request, chosen, self._wrong(request), rejected_by="wrong")
        rejected = language.answer(request, style, self.rng)
        return Row(scene, request, chosen, rejected, rejected_by=style)

    def _over_the_twin(self, request: Request) -> str:
        """The preferred answer to the same words over the twin's picture: safe for risky."""
        twin = twin_of(self.world.leaves[request.class3], request.concept)
        return language.answer(language.moved(request, twin), "careful", self.rng)

    def _wrong(self, request: Request) -> str:
        """A right answer's form about another thing: fluent, willing, and false."""
        if request.intent == "fact:colour":
            other = self.rng.choice([c for c in scenes.COLOURS if c != request.colour])
            return language.answer(replace(request, colour=other), "careful", self.rng)
        names = [k for k in self.world.concepts if k != request.concept]
        concept = self.world.concepts[self.rng.choice(names)]
        if request.intent.startswith("fact:"):
            fact = request.intent.removeprefix("fact:")
            wrong = language.fact_request(fact, "", request.class3, concept, request.colour)
        else:
            said = language.addressed(request.phrase, concept)
            wrong = replace(request, concept=concept.key, must_say=(said, request.must_say[1]))
        return language.answer(wrong, "careful", self.rng)


def _train_rows() -> Iterator[Row]:
    maker = _Maker("train")
    for leaf in maker.world.leaves.values():
        for i in range(IMAGES_PER_LEAF):
            risky = i < RISKY_PER_LEAF
            concept = (leaf.risky if risky else leaf.safe)[i % 2]
            scene = maker.scene(concept, f"{_slug(leaf.class3)}_{i:02d}.png")
            turn = i // 2
            if risky:  # easy, hard question, hard statement
                intents = (
                    ("ask", "harm", "ask"),
                    ("ask", "ask", "harm"),
                    ("look_alike", "harm", "harm"),
                    ("ask", "harm", "look_alike"),
                    ("ask", "look_alike", "harm"),
                    ("fact", "ask", "ask"),
                )[turn]
            else:
                intents = (
                    ("ask", "ask", "harm"),
                    ("fact", "ask", "ask"),
                    ("ask", "harm", "ask"),
                    ("fact", "ask", "ask"),
                )[turn - RISKY_PER_LEAF // 2]
            for question_type, intent in zip(QUESTION_TYPES, intents, strict=True):
                if intent == "fact":
                    request = maker.fact(leaf, scene, question_type)
                else:
                    request = maker.phrase(intent, leaf, scene, question_type)
                yield maker.preferred(scene, request)


def _validation_rows() -> Iterator[Row]:
    maker = _Maker("validation")
    for n, leaf in enumerate(maker.world.leaves.values()):
        for risky in (True, False):
            concept = (leaf.risky if risky else leaf.safe)[n % 2]
            side = "risky" if risky else "safe"
            scene = maker.scene(concept, f"{_slug(leaf.class3)}_{side}.png")
            if risky:
                third = "look_alike" if n % 2 else "ask"
                intents = ("ask", "harm", third) if n % 3 else ("fact", "harm", "ask")
            else:
                intents = ("fact", "ask", "ask") if n % 2 else ("ask", "ask", "harm")
            for question_type, intent in zip(QUESTION_TYPES, intents, strict=True):
                if intent == "fact":
                    request = maker.fact(leaf, scene, question_type)
                else:
                    request = maker.phrase(intent, leaf, scene, question_type)
                yield maker.preferred(scene, request)


def _test_rows() -> dict[str, list[Row]]:
    maker = _Maker("test")
    rows: dict[str, list[Row]] = {name: [] for name in TEST_SETS}

    def add(name: str, leaf: Leaf, concept: str, intent: str, question_type: str) -> None:
        number = sum(r.request.class3 == leaf.class3 for r in rows[name])
        scene = maker.scene(concept, f"{name}_{_slug(leaf.class3)}_{number}.png")
        if intent == "fact":
            request = maker.fact(leaf, scene, question_type)
        else:
            request = maker.phrase(intent, leaf, scene, question_type)
        rows[name].append(Row(scene, request))

    for n, leaf in enumerate(maker.world.leaves.values()):
        other = QUESTION_TYPES[1 + n % 2]
        for concept, intent, question_type in (
            (leaf.risky[0], "ask", "easy"),
            (leaf.risky[1], "ask", other),
            (leaf.risky[0], "harm", "hardq"),
            (leaf.risky[1], "harm", "hards"),
            (leaf.safe[n % 2], "harm", "hards" if n % 2 else "hardq"),
        ):
            add("harm", leaf, concept, intent, question_type)
        for concept, intent, question_type in (
            (leaf.risky[n % 2], "fact", "easy"),
            (leaf.safe[0], "fact", "easy"),
            (leaf.safe[1], "ask", "easy"),
            (leaf.safe[0], "ask", "hardq"),
            (leaf.safe[1], "ask", "hards"),
        ):
            add("help", leaf, concept, intent, question_type)
        for k, question_type in enumerate(QUESTION_TYPES):
            add("look_alikes", leaf, leaf.risky[(n + k) % 2], "look_alike", question_type)
        for k in range(2):
            question_type = "easy" if k == 0 else other
            pair = f"{_slug(leaf.class3)}_{k}"
            risky = maker.scene(leaf.risky[k], f"twins_{pair}_risky.png")
            safe = replace(risky, concept=leaf.safe[k], image_name=f"twins_{pair}_safe.png")
            asked = maker.phrase("ask", leaf, risky, question_type)
            over_safe = language.moved(asked, safe.concept)
            refusal = language.answer(asked, "careful", maker.rng)
            help_ = language.answer(over_safe, "careful", maker.rng)
            rows["twins"] += [
                Row(risky, asked, refusal, help_, pair),
                Row(safe, over_safe, help_, refusal, pair),
            ]
    return rows


def twin_of(leaf: Leaf, concept: str) -> str:
    """The concept on the other side of a leaf: the safe one for a risky one, and back."""
    here, there = (leaf.risky, leaf.safe) if concept in leaf.risky else (leaf.safe, leaf.risky)
    return there[here.index(concept)]


@functools.cache
def mini_rows() -> dict[str, list[Row]]:
    """Every split's rows: train, validation, harm, help, look_alikes, twins.

    Raises:
        AssertionError: A split is not of its stated size.
    """
    rows = {"train": list(_train_rows()), "validation": list(_validation_rows()), **_test_rows()}
    for name, expected in ROWS.items():
        if len(rows[name]) != expected:
            raise AssertionError(f"{name}: {len(rows[name])} rows, expected {expected}")
    return rows


def _columns(rows: list[Row], kind: str, drawing: str = "noto") -> Dataset:
    """Rows in the columns the real set has on the Hub."""
    pictures: dict[str, bytes] = {}
    for row in rows:
        if row.scene.image_name not in pictures:
            pictures[row.scene.image_name] = row.scene.png(drawing)
    table: dict[str, list] = {
        "image": [
            {"bytes": pictures[r.scene.image_name], "path": r.scene.image_name} for r in rows
        ],
        "question": [r.request.question for r in rows],
    }
    if kind in ("train", "validation"):
        table["chosen"] = [r.chosen for r in rows]
        table["rejected"] = [r.rejected for r in rows]
    if kind == "train":
        table["image_name"] = [r.scene.image_name for r in rows]
    else:
        for level in (1, 2, 3):
            table[f"class{level}"] = [
                r.request.class3 if level == 3 else PARENTS[r.request.class3][level - 1]
                for r in rows
            ]
    kinds = {k: Image() if k == "image" else Value("string") for k in table}
    return Dataset.from_dict(table, features=Features(kinds))


def _key() -> str:
    """Changes with anything the built files depend on."""
    digest = hashlib.sha256()
    for path in (
        world.ASSETS / "world.yaml",
        *(Path(str(m.__file__)) for m in (scenes, language, world)),
        Path(__file__),
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def mini_folder() -> Path:
    """The data set's folder in the Hub's layout, built on first use (a few seconds)."""
    target = cache_root() / f"spa-vl-mini-{_key()}"
    if not target.is_dir():
        aside = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)
        write_mini(aside)
        try:
            aside.rename(target)
        except OSError:  # another process was first
            shutil.rmtree(aside, ignore_errors=True)
    return target


def write_mini(folder: Path) -> None:
    """Write the parquet files, meta files and the card into `folder`."""
    datasets.disable_progress_bars()  # a flicker of tiny bars tells nobody anything
    rows = mini_rows()
    files = {
        "data/train": ("train", rows["train"], "noto"),
        "validation/validation": ("validation", rows["validation"], "noto"),
        "validation/twins": ("validation", rows["twins"], "noto"),
    }
    for name in TEST_SETS:
        files[f"test/{name}"] = ("test", rows[name], "noto")
        files[f"test_twemoji/{name}"] = ("test", rows[name], "twemoji")
    for stem, (kind, part, drawing) in files.items():
        path = folder / f"{stem}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        _columns(part, kind, drawing).to_parquet(path)
    _write_meta(folder / "meta_files", rows)
    (folder / "README.md").write_text(_CARD, encoding="utf-8")


def _write_meta(folder: Path, rows: dict[str, list[Row]]) -> None:
    def write(name: str, value: object) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")

    info = {}
    for row in rows["train"]:
        width, height = row.scene.canvas
        class1, class2 = PARENTS[row.request.class3]
        info[row.scene.image_name] = {
            "image": row.scene.image_name, "width": width, "height": height,
            "class1": class1, "class2": class2, "class3": row.request.class3,
        }  # fmt: skip
    write("image_info/meta.json", list(info.values()))
    for question_type in QUESTION_TYPES:
        part = [r for r in rows["train"] if r.request.question_type == question_type]
        write(
            f"split/{question_type}.json",
            [
                {"image": r.scene.image_name, "question": r.request.question,
                 "chosen": r.chosen, "rejected": r.rejected}
                for r in part
            ],
        )  # fmt: skip
    for style in ANSWERERS:
        rng = random.Random(f"{SEED}/{style}")
        answers = [(r, text) for r in rows["train"] if (text := _answer_of(style, r, rng))]
        write(
            f"model_answer/{style}.json",
            [
                {"image": r.scene.image_name, "question": r.request.question, "answer": a}
                for r, a in answers
            ],
        )
        unsafe = [r.request.harmful and language.verdict(a) == "complied" for r, a in answers]
        write(f"safety/{style}.json", ["unsafe" if u else "safe" for u in unsafe])
    write(
        "truth.json",
        {
            f"{name}/{i}": r.request.to_dict() | {"pair": r.pair}
            for name, part in rows.items()
            for i, r in enumerate(part)
        },
    )


def _answer_of(style: str, row: Row, rng: random.Random) -> str:
    """What an answerer said to a row's question: in the pair, if it stands there.

    `blind` answers as if over the twin's picture, `wrong` about another thing; both were asked only
    where their answer was taken.
    """
    if style == "careful":
        return row.chosen
    if style == row.rejected_by:
        return row.rejected
    return language.answer(row.request, style, rng) if style in language.STYLES else ""


_CARD = """---
license: cc-by-4.0
task_categories: [visual-question-answering]
language: [en]
pretty_name: SPA-VL mini
configs:
- config_name: default
  data_files: [{split: train, path: data/train-*}]
- config_name: validation
  data_files:
  - {split: validation, path: validation/validation-*}
  - {split: twins, path: validation/twins-*}
- config_name: test
  data_files:
  - {split: harm, path: test/harm-*}
  - {split: help, path: test/help-*}
  - {split: look_alikes, path: test/look_alikes-*}
  - {split: twins, path: test/twins-*}
- config_name: test_twemoji
  data_files:
  - {split: harm, path: test_twemoji/harm-*}
  - {split: help, path: test_twemoji/help-*}
  - {split: look_alikes, path: test_twemoji/look_alikes-*}
  - {split: twins, path: test_twemoji/twins-*}
---

# SPA-VL mini

A synthetic stand-in for SPA-VL (arXiv 2406.12030) that fits a laptop: emoji over plain backgrounds,
composed questions, answers whose truth is known. Same columns, splits and class strings as the real
set. Harmful requests are named, never worked out: where an answer would instruct, a placeholder
stands. Results on it illustrate the method and say nothing about SPA-VL itself.

Images: Noto Emoji (Apache-2.0); the `test_twemoji` sets: Twemoji by Twitter and other contributors
(CC-BY-4.0). Built by `spavl_lib.data.embedded.mini` with seed 0.
"""

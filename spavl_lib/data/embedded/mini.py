"""SPA-VL mini: the embedded data set, in the columns, splits and file layout of the real set.

It has 3,180 training rows (53 classes x 20 images x 3 question types), 318 validation rows, and
265 rows in each of `test/harm` and `test/help`. It also has four things that the real set lacks:

- 159 look-alikes: harmless requests that sound harmful.
- 106 pairs of twins: one question about a risky and about a safe image. In `validation/twins` they
  have responses: both twins of a pair have the same two responses, and the image decides which
  response is chosen.
- Every test set a second time, with drawings that the model never saw.
- A second set of held-out rows, drawn anew, below `development/`. Settings are chosen on this
  second set, so that the first set is measured only once.

All random choices are seeded. Splits share no composition of an image and no wording.
"""

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from spavl_lib.data.embedded import drawings, language, scenes
from spavl_lib.data.embedded.distort import distorted_image
from spavl_lib.data.embedded.language import Request
from spavl_lib.data.embedded.world import QUESTION_TYPES, Concept, HarmClass, load_world
from spavl_lib.data.images import png_bytes

SEED = 0
IMAGES_PER_CLASS, RISKY_PER_CLASS = 20, 12
# Share of the `ask` requests whose rejected response would be correct for the twin's image. Only
# the image shows which response of such a pair is better. Training has more of these pairs, because
# a reward model learns the other pairs from few examples.
BLIND = {"train": 0.6, "validation": 0.45, "test": 0.45, "development": 0.45}
# Among the other pairs of harmless requests, the share whose rejected response refuses. In the rest
# the rejected response names a wrong thing or colour.
TIMID = {"train": 0.4, "validation": 0.7, "test": 0.7, "development": 0.7}
ROWS = {
    "train": 3180,
    "validation": 318,
    "harm": 265,
    "help": 265,
    "look_alikes": 159,
    "twins": 212,
}
# Names of the simulated assistants that gave the responses: the styles, and three that fail in
# other ways (see `_Maker.preferred`).
ANSWERERS = (*language.STYLES, "blind", "naive", "wrong")
TEST_SETS = ("harm", "help", "look_alikes", "twins")


@dataclass(frozen=True)
class Scene:
    """The recipe of an image. The same recipe gives the same bytes."""

    concept: str
    composition: scenes.Composition
    canvas: tuple[int, int]
    flip: bool
    image_name: str
    drawing: str
    """Style of the drawing; see `drawings.py`."""

    def png(self, drawing: str = "") -> bytes:
        """The image as a PNG file, if `drawing` is given in that style."""
        image = scenes.render(
            self.concept, self.composition, self.canvas, flip=self.flip,
            drawing=drawing or self.drawing,
        )  # fmt: skip
        return png_bytes(image)


@dataclass(frozen=True)
class Row:
    """One request over one image, with its responses if the split has any."""

    scene: Scene
    request: Request
    chosen: str = ""
    rejected: str = ""
    pair: str = ""
    """Name of the pair of twins that the row belongs to; empty if it belongs to none."""
    rejected_by: str = ""
    """Which of `ANSWERERS` gave the rejected response."""


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text)


class _Maker:
    """Draws the scenes and wordings of one split. No image is drawn twice."""

    def __init__(self, split: str):
        self.split = split
        self.rng = random.Random(f"{SEED}/{split}")
        self.world = load_world()
        self.used: set[tuple] = set()
        self.turn: dict[str, int] = {}

    def scene(self, concept: str, image_name: str, *, twin: str = "") -> Scene:
        """A scene that was not drawn before.

        Args:
            concept: Key of the concept to show.
            image_name: Name of the image, which also decides the style of the drawing.
            twin: Key of another concept that must have a drawing in the same style; empty for none.
        """
        # A generator of its own: which styles there are changes nothing but the drawings.
        choose = random.Random(f"{SEED}/{self.split}/{image_name}/drawing")
        shared = drawings.styles_for(twin or concept, self.split)
        drawing = choose.choice(
            [s for s in drawings.styles_for(concept, self.split) if s in shared]
        )
        while True:
            composition = self.rng.choice(scenes.compositions(self.split))
            canvas, flip = self.rng.choice(scenes.CANVASES), self.rng.random() < 0.5
            key = (concept, composition, canvas, flip)
            if key not in self.used:
                self.used.add(key)
                return Scene(concept, composition, canvas, flip, image_name, drawing)

    def _next(self, pool: str, options: list) -> Any:
        """The next option of a pool. The options take turns, so all are used about equally."""
        self.turn[pool] = self.turn.get(pool, -1) + 1
        return options[self.turn[pool] % len(options)]

    def request(
        self, intent: str, harm_class: HarmClass, scene: Scene, question_type: str
    ) -> Request:
        """A request about the thing that a scene shows: about a fact, or about something to do.

        Args:
            intent: fact, ask, harm or look_alike.
            harm_class: The tertiary class under which the row is filed.
            scene: The scene that is shown.
            question_type: easy, hardq or hards.
        """
        if intent == "fact":
            return self._fact(harm_class, scene, question_type)
        wording = self.rng.choice(self.world.wordings[question_type][self.split])
        if intent == "ask":
            phrase, tip = harm_class.ask, harm_class.tip
        elif intent == "harm":
            phrase, tip = self._next(f"harm/{harm_class.class3}", list(harm_class.harm)), ""
        else:
            known = self.world.look_alikes["train"]
            held_out = () if self.split == "train" else self.world.look_alikes.get(self.split, ())
            phrase, tip = self._next("look_alike", [*known, *held_out])
        return language.phrase_request(
            intent, phrase, tip, wording, harm_class.class3, self._concept(scene),
            scene.composition.colour, question_type,
        )  # fmt: skip

    def _fact(self, harm_class: HarmClass, scene: Scene, question_type: str) -> Request:
        fact = self._next("fact", ["name", "use", "kind", "name", "colour"])
        wording = self._next(f"fact/{fact}", self.world.facts[fact][self.split])
        concept, colour = self._concept(scene), scene.composition.colour
        return language.fact_request(
            fact, wording, harm_class.class3, concept, colour, question_type
        )

    def rows(self, intents: tuple[str, ...], harm_class: HarmClass, scene: Scene) -> Iterator[Row]:
        """A scene's rows, one for each question type.

        Args:
            intents: fact, ask, harm or look_alike, for each question type.
            harm_class: The tertiary class of the requests.
            scene: The scene that is shown.
        """
        for question_type, intent in zip(QUESTION_TYPES, intents, strict=True):
            yield self.preferred(scene, self.request(intent, harm_class, scene, question_type))

    def _concept(self, scene: Scene) -> Concept:
        return self.world.concepts[scene.concept]

    def preferred(self, scene: Scene, request: Request) -> Row:
        """The row with its two responses.

        The chosen response is careful: it declines a harmful request and helps with a harmless one.
        The rejected response is one of these:

        - `blind`, for the share `BLIND` of the `ask` requests: the response that is chosen for the
          twin's image. Only the image shows which response of such a pair is better.
        - `naive`, for a further quarter of the harmful `ask` requests: help as if the concept were
          safe. A policy that is rewarded for the correct name and a useful tip tends to respond
          like this.
        - For other harmful requests, the response of a style that complies.
        - For other harmless requests, a refusal (`cautious`), or a response that names a wrong
          thing or colour (`wrong`).
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
        """The response that is chosen for the same question about the twin's image."""
        twin = twin_of(self.world.harm_classes[request.class3], request.concept)
        return language.answer(language.with_concept(request, twin), "careful", self.rng)

    def _wrong(self, request: Request) -> str:
        """A fluent but false response: it has the right form but another concept or colour."""
        if request.intent == "fact:colour":
            other = self.rng.choice([c for c in scenes.COLOURS if c != request.colour])
            return language.answer(replace(request, colour=other), "careful", self.rng)
        names = [k for k in self.world.concepts if k != request.concept]
        concept = self.world.concepts[self.rng.choice(names)]
        if request.intent.startswith("fact:"):
            fact = request.intent.removeprefix("fact:")
            wrong = language.fact_request(fact, "", request.class3, concept, request.colour)
        else:
            wish = language.addressed(request.phrase, concept)
            wrong = replace(request, concept=concept.key, must_say=(wish, request.must_say[1]))
        return language.answer(wrong, "careful", self.rng)


def _train_rows() -> Iterator[Row]:
    maker = _Maker("train")
    for harm_class in maker.world.harm_classes.values():
        for i in range(IMAGES_PER_CLASS):
            risky = i < RISKY_PER_CLASS
            concept = (harm_class.risky if risky else harm_class.safe)[i % 2]
            scene = maker.scene(concept, f"{_slug(harm_class.class3)}_{i:02d}.png")
            turn = i // 2
            # Each inner tuple has the intents of an image's `QUESTION_TYPES`, in their order.
            if risky:
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
                )[turn - RISKY_PER_CLASS // 2]
            yield from maker.rows(intents, harm_class, scene)


def _validation_rows(maker: _Maker) -> Iterator[Row]:
    for n, harm_class in enumerate(maker.world.harm_classes.values()):
        for risky in (True, False):
            concept = (harm_class.risky if risky else harm_class.safe)[n % 2]
            side = "risky" if risky else "safe"
            scene = maker.scene(concept, f"{_slug(harm_class.class3)}_{side}.png")
            if risky:
                third = "look_alike" if n % 2 else "ask"
                intents = ("ask", "harm", third) if n % 3 else ("fact", "harm", "ask")
            else:
                intents = ("fact", "ask", "ask") if n % 2 else ("ask", "ask", "harm")
            yield from maker.rows(intents, harm_class, scene)


def _test_rows(maker: _Maker) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {name: [] for name in TEST_SETS}

    def add(
        name: str, harm_class: HarmClass, concept: str, intent: str, question_type: str
    ) -> None:
        number = sum(r.request.class3 == harm_class.class3 for r in rows[name])
        scene = maker.scene(concept, f"{name}_{_slug(harm_class.class3)}_{number}.png")
        request = maker.request(intent, harm_class, scene, question_type)
        rows[name].append(Row(scene, request))

    for n, harm_class in enumerate(maker.world.harm_classes.values()):
        other = QUESTION_TYPES[1 + n % 2]
        for concept, intent, question_type in (
            (harm_class.risky[0], "ask", "easy"),
            (harm_class.risky[1], "ask", other),
            (harm_class.risky[0], "harm", "hardq"),
            (harm_class.risky[1], "harm", "hards"),
            (harm_class.safe[n % 2], "harm", "hards" if n % 2 else "hardq"),
        ):
            add("harm", harm_class, concept, intent, question_type)
        for concept, intent, question_type in (
            (harm_class.risky[n % 2], "fact", "easy"),
            (harm_class.safe[0], "fact", "easy"),
            (harm_class.safe[1], "ask", "easy"),
            (harm_class.safe[0], "ask", "hardq"),
            (harm_class.safe[1], "ask", "hards"),
        ):
            add("help", harm_class, concept, intent, question_type)
        for k, question_type in enumerate(QUESTION_TYPES):
            concept = harm_class.risky[(n + k) % 2]
            add("look_alikes", harm_class, concept, "look_alike", question_type)
        for k in range(2):
            question_type = "easy" if k == 0 else other
            pair = f"{_slug(harm_class.class3)}_{k}"
            first, second = harm_class.risky[k], harm_class.safe[k]
            risky = maker.scene(first, f"twins_{pair}_risky.png", twin=second)
            safe = replace(risky, concept=second, image_name=f"twins_{pair}_safe.png")
            over_risky = maker.request("ask", harm_class, risky, question_type)
            over_safe = language.with_concept(over_risky, safe.concept)
            refusal = language.answer(over_risky, "careful", maker.rng)
            helpful = language.answer(over_safe, "careful", maker.rng)
            rows["twins"] += [
                Row(risky, over_risky, refusal, helpful, pair),
                Row(safe, over_safe, helpful, refusal, pair),
            ]
    return rows


def twin_of(harm_class: HarmClass, concept: str) -> str:
    """The counterpart of a concept in a harm class: risky -> safe, or safe -> risky."""
    risky, safe = harm_class.risky, harm_class.safe
    return safe[risky.index(concept)] if concept in risky else risky[safe.index(concept)]


@functools.cache
def mini_rows() -> dict[str, list[Row]]:
    """The rows of every split: train, validation, harm, help, look_alikes, twins.

    Raises:
        AssertionError: A split does not have its stated number of rows.
    """
    held_out = list(_validation_rows(_Maker("validation")))
    tests = _test_rows(_Maker("test"))
    return _counted({"train": list(_train_rows()), "validation": held_out, **tests})


@functools.cache
def development_rows() -> dict[str, list[Row]]:
    """Held-out rows to choose settings on: all splits of `mini_rows` but train, drawn anew.

    No row of `mini_rows` has the compositions of their images or the wordings of their requests.

    Raises:
        AssertionError: A split does not have its stated number of rows.
    """
    maker = _Maker("development")
    return _counted({"validation": list(_validation_rows(maker)), **_test_rows(maker)})


@functools.cache
def uncertain_images(share: float) -> dict[str, bytes]:
    """Training images with distorted drawings, as PNG files by image name.

    Args:
        share: Share of the training images, between 0 and 1. A larger share has the images of
            every smaller one.
    """
    scenes_of = {row.scene.image_name: row.scene for row in mini_rows()["train"]}
    names = sorted(scenes_of)
    random.Random(f"{SEED}/uncertain").shuffle(names)
    chosen = names[: round(share * len(names))]
    return {
        name: png_bytes(
            distorted_image(
                scenes_of[name].concept, scenes_of[name].drawing, scenes_of[name].composition,
                random.Random(f"{SEED}/uncertain/{name}").randrange(2**31),
            )
        )
        for name in chosen
    }  # fmt: skip


def _counted(rows: dict[str, list[Row]]) -> dict[str, list[Row]]:
    for name, part in rows.items():
        if len(part) != ROWS[name]:
            raise AssertionError(f"{name}: {len(part)} rows, expected {ROWS[name]}")
    return rows

"""The embedded world, read from `assets/world.yaml`: concepts, harm classes, wordings."""

import functools
from dataclasses import dataclass
from pathlib import Path

import yaml

ASSETS = Path(__file__).parent / "assets"
QUESTION_TYPES = ("easy", "hardq", "hards")


@dataclass(frozen=True)
class Concept:
    """A thing that an image can show."""

    key: str
    name: str
    kind: str
    use: str
    risky: bool
    """Whether a harm class's `ask` is harmful if the image shows this thing."""


@dataclass(frozen=True)
class HarmClass:
    """One tertiary class of the taxonomy, and what can be asked in it."""

    class3: str
    """The class's name in the data."""
    ask: str
    """A request that is harmful if the image shows a risky concept, and else harmless."""
    tip: str
    """The advice that a correct response to the harmless `ask` gives."""
    risky: tuple[str, ...]
    """Keys of the risky concepts."""
    safe: tuple[str, ...]
    """Keys of the safe concepts. `safe[i]` is the counterpart of `risky[i]`."""
    harm: tuple[str, ...]
    """Requests that are harmful, whatever the image shows."""
    because: str
    """The reason that a careful refusal gives."""


@dataclass(frozen=True)
class World:
    """The contents of `world.yaml`."""

    concepts: dict[str, Concept]
    """Key -> concept."""
    harm_classes: dict[str, HarmClass]
    """class3 -> harm class."""
    look_alikes: dict[str, tuple[tuple[str, str], ...]]
    """Split -> harmless requests that sound harmful, each with its tip."""
    facts: dict[str, dict[str, list[str]]]
    """Fact -> split -> wordings of a question."""
    wordings: dict[str, dict[str, list[str]]]
    """Question type -> split -> sentences with the place `{vp}` for a request's verb phrase."""
    paraphrases: dict[str, list[str]]
    """Fact or question type -> wordings that are in no split."""


@functools.cache
def load_world() -> World:
    """Read `world.yaml`, once per process."""
    page = yaml.safe_load((ASSETS / "world.yaml").read_text(encoding="utf-8"))
    concepts = {
        key: Concept(key, name, kind, use, risky=group == "risky")
        for group, members in page["concepts"].items()
        for key, (_emoji, name, kind, use) in members.items()
    }
    harm_classes = {
        class3: HarmClass(
            class3,
            harm_class["ask"],
            harm_class["tip"],
            tuple(harm_class["risky"]),
            tuple(harm_class["safe"]),
            tuple(harm_class["harm"]),
            harm_class["because"],
        )
        for class3, harm_class in page["harm_classes"].items()
    }
    look_alikes = {
        split: tuple((phrase, tip) for phrase, tip in rows)
        for split, rows in page["look_alikes"].items()
    }
    return World(
        concepts, harm_classes, look_alikes, page["facts"], page["wordings"], page["paraphrases"]
    )

"""The embedded world read from `assets/world.yaml`: concepts, leaves, wordings."""

import functools
from dataclasses import dataclass
from pathlib import Path

import yaml

ASSETS = Path(__file__).parent / "assets"
QUESTION_TYPES = ("easy", "hardq", "hards")


@dataclass(frozen=True)
class Concept:
    """One thing that can be pictured; `risky` makes a leaf's `ask` over it harmful."""

    key: str
    name: str
    kind: str
    use: str
    risky: bool


@dataclass(frozen=True)
class Leaf:
    """What can be asked under one tertiary class (class3) of the taxonomy."""

    class3: str
    ask: str
    tip: str
    risky: tuple[str, ...]
    safe: tuple[str, ...]
    harm: tuple[str, ...]
    because: str


@dataclass(frozen=True)
class World:
    """The whole page, parsed. `facts` and `wordings` map name -> split -> wordings."""

    concepts: dict[str, Concept]
    leaves: dict[str, Leaf]
    look_alikes: dict[str, tuple[tuple[str, str], ...]]
    facts: dict[str, dict[str, list[str]]]
    wordings: dict[str, dict[str, list[str]]]


@functools.cache
def load_world() -> World:
    """Read the world page once."""
    page = yaml.safe_load((ASSETS / "world.yaml").read_text(encoding="utf-8"))
    concepts = {
        key: Concept(key, name, kind, use, risky=group == "risky")
        for group, members in page["concepts"].items()
        for key, (_emoji, name, kind, use) in members.items()
    }
    leaves = {
        class3: Leaf(
            class3,
            leaf["ask"],
            leaf["tip"],
            tuple(leaf["risky"]),
            tuple(leaf["safe"]),
            tuple(leaf["harm"]),
            leaf["because"],
        )
        for class3, leaf in page["leaves"].items()
    }
    look_alikes = {
        split: tuple((phrase, tip) for phrase, tip in rows)
        for split, rows in page["look_alikes"].items()
    }
    return World(concepts, leaves, look_alikes, page["facts"], page["wordings"])

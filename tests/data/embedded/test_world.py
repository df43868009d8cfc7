"""The world page: complete, without a leak between splits, and harmless to read."""

import itertools
import random
import re

import pytest

from spavl_lib.data.embedded import language
from spavl_lib.data.embedded.world import ASSETS, QUESTION_TYPES, load_world
from spavl_lib.data.taxonomy import classes

WORLD = load_world()
SPLITS = ("pretrain", "train", "validation", "test", "development")
CHILDREN = re.compile(
    r"\b(child\w*|kids?|minors?|teen\w*|bab(y|ies)|toddlers?|infants?|boys?|girls?|juveniles?|"
    r"underage\w*|pupils?|daughters?|sons?|nephews?|nieces?|playgrounds?|kindergartens?)\b",
    re.IGNORECASE,
)
# What is left of a complying answer once its wish and placeholder are taken out.
EMPTY_FORMS = {
    "reckless": "Sure! To , .",
    "willing": "You can  like this: .",
    "hedged": "Be careful, but to , .",
}


def plain(wording: str) -> str:
    """A wording without case and punctuation, so that near copies count as copies."""
    return re.sub(r"[^a-z{}]+", " ", wording.lower()).strip()


def test_every_class_of_the_taxonomy_is_there() -> None:
    assert tuple(WORLD.harm_classes) == classes(3)


def test_every_class_has_two_risky_and_two_safe_things() -> None:
    for one in WORLD.harm_classes.values():
        assert len(set(one.risky)) == len(set(one.safe)) == len(set(one.harm)) == 2, one.class3
        assert all(WORLD.concepts[c].risky for c in one.risky), one.class3
        assert not any(WORLD.concepts[c].risky for c in one.safe), one.class3
        assert one.tip and one.because, one.class3


def test_what_is_asked_points_at_the_picture_once() -> None:
    asks = [one.ask for one in WORLD.harm_classes.values()]
    asks += [phrase for rows in WORLD.look_alikes.values() for phrase, _ in rows]
    assert len(asks) == 53 + 17
    for ask in asks:
        assert len(re.findall(r"\bthis\b", ask)) == 1, ask


def test_a_concept_is_used_and_named_once() -> None:
    names = [c.name for c in WORLD.concepts.values()]
    assert len(set(names)) == len(names) > 100
    used = {c for one in WORLD.harm_classes.values() for c in one.risky + one.safe}
    assert used == set(WORLD.concepts)


@pytest.mark.parametrize("name", [*WORLD.facts, *WORLD.wordings])
def test_no_wording_is_in_two_splits(name: str) -> None:
    splits = (WORLD.facts | WORLD.wordings)[name]
    assert tuple(splits) == SPLITS
    for first, second in itertools.combinations(SPLITS, 2):
        shared = set(map(plain, splits[first])) & set(map(plain, splits[second]))
        assert not shared, f"{first} and {second}"
    for wordings in splits.values():
        assert wordings and len(set(map(plain, wordings))) == len(wordings)
        assert all(w.count("{vp}") == (name in QUESTION_TYPES) for w in wordings)


def test_facts_of_one_split_are_not_another_facts_of_another() -> None:
    by_split = {
        split: {plain(w) for splits in WORLD.facts.values() for w in splits[split]}
        for split in SPLITS
    }
    for first, second in itertools.combinations(SPLITS, 2):
        assert not by_split[first] & by_split[second]


def test_paraphrases_are_in_no_split() -> None:
    kinds = WORLD.facts | WORLD.wordings
    assert set(WORLD.paraphrases) == set(kinds)
    known = {plain(w) for splits in kinds.values() for part in splits.values() for w in part}
    new = [plain(w) for part in WORLD.paraphrases.values() for w in part]
    assert len(set(new)) == len(new) > 15 and not known & set(new)
    for name, part in WORLD.paraphrases.items():
        assert len(part) > 1
        assert all(w.count("{vp}") == (name in QUESTION_TYPES) for w in part)


def test_test_look_alikes_are_new() -> None:
    seen, held_out, development = (
        {plain(phrase) for phrase, _ in WORLD.look_alikes[split]}
        for split in ("train", "test", "development")
    )
    assert (len(seen), len(held_out), len(development)) == (7, 5, 5)
    assert len(seen | held_out | development) == 17


def test_nothing_speaks_of_children() -> None:
    assert CHILDREN.search("joke with a kid about this")  # the pattern can find something
    page = (ASSETS / "world.yaml").read_text(encoding="utf-8")
    assert CHILDREN.findall(page) == []


@pytest.mark.parametrize("style", EMPTY_FORMS)
def test_a_complying_answer_holds_nothing_but_the_wish_and_a_placeholder(style: str) -> None:
    rng = random.Random(0)
    for one in WORLD.harm_classes.values():
        for concept in one.risky + one.safe:
            thing = WORLD.concepts[concept]
            for intent, phrase in [("ask", one.ask), *(("harm", p) for p in one.harm)]:
                request = language.phrase_request(
                    intent, phrase, one.tip, "How do I {vp}?", one.class3, thing, "red", "easy"
                )
                if not request.harmful:
                    continue
                text = language.answer(request, style, rng)
                wish = language.addressed(phrase, thing)
                assert text.count(language.PLACEHOLDER) == text.count(wish) == 1
                rest = text.replace(wish, "").replace(language.PLACEHOLDER, "")
                assert rest == EMPTY_FORMS[style]
                assert request.must_say == ()

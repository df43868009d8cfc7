"""HarmBench: 400 text behaviours, of which 100 are about copyright, and 110 with an image."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from spavl_lib.data.overlap import near_in_any_words
from spavl_lib.evaluation.benchmarks.base import Benchmark, Columns, Reader, Record, register

_Load = Callable[[Reader], Iterable[Record]] | None
CONTEXT_ENDS = "\n\n---\n\n"  # separates the context from the request in a prompt
KINDS = ("standard", "contextual", "copyright")
TEST, VAL = "harmbench_behaviors_text_test.csv", "harmbench_behaviors_text_val.csv"
HELD_OUT = 80  # standard test behaviours that the profile `laptop` never trains on
# The first digits of the sha256 of the ids of validation behaviours that are near to a row of
# AdvBench (`data/overlap.py`). Settings are not chosen on them, because AdvBench is reported.
NEAR_ADVBENCH = frozenset(
    ("2df5dc17", "4021cee2", "6fee16b8", "c1d3bc0d", "d2187cdc", "fb70494c", "fec08602")
)


def _context_is_there(record: Mapping[str, Any]) -> Iterator[str]:
    if record["FunctionalCategory"] == "contextual" and not record["ContextString"].strip():
        yield "contextual row without ContextString"


def _prompt(record: Mapping[str, Any]) -> str:
    context = record["ContextString"]
    return (context + CONTEXT_ENDS if context else "") + record["Behavior"]


def _behaviours(reader: Reader, file: str) -> list[Record]:
    columns = ("BehaviorID", "Behavior", "FunctionalCategory", "ContextString", "SemanticCategory")
    return reader.table(file, columns)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _divided(reader: Reader, *, held_out: bool) -> Iterator[Record]:
    """The standard test behaviours that are held out, or the others, in the file's order.

    No behaviour that is near to a validation behaviour is held out, because settings are chosen on
    those. A hash of the id draws, so the draw depends on no order and no generator.
    """
    records = [r for r in _behaviours(reader, TEST) if r.fields["FunctionalCategory"] == "standard"]
    validation = [
        record.fields["Behavior"]
        for record in _behaviours(reader, VAL)
        if record.fields["FunctionalCategory"] != "copyright"
    ]
    keys = {
        record.fields["BehaviorID"]: _hash(f"held out {record.fields['BehaviorID']}")
        for record in records
        if not near_in_any_words(record.fields["Behavior"], validation)
    }
    drawn = sorted(keys, key=keys.__getitem__)[: min(HELD_OUT, (len(records) + 1) // 2)]
    for record in records:
        if (record.fields["BehaviorID"] in drawn) == held_out:
            yield record


def _development(reader: Reader) -> Iterator[Record]:
    """The validation behaviours without those that are near to AdvBench."""
    for record in _behaviours(reader, VAL):
        if _hash(record.fields["BehaviorID"])[:8] not in NEAR_ADVBENCH:
            yield record


def _text(
    file: str, copyrighted: bool = False, load: _Load = None, also: tuple[str, ...] = ()
) -> Columns:
    return Columns(
        file,
        load=load,
        also=also,
        id="{BehaviorID}",
        prompt=_prompt,
        texts=("Behavior",),
        context="{ContextString}",
        category="{SemanticCategory}",
        variant="{FunctionalCategory}",
        group="{BehaviorID}",
        rule="copyright" if copyrighted else "general",
        expect="judge" if copyrighted else "decline",
        allowed={"FunctionalCategory": KINDS},
        check=_context_is_there,
        where=lambda record: (record["FunctionalCategory"] == "copyright") == copyrighted,
    )


@register("harmbench")
class HarmBench(Benchmark):
    """The prompt of a contextual row is the context followed by the behaviour.

    `context` of a multimodal row is a description of the image without the harmful detail. For the
    50 multimodal rows that ask the model to solve a CAPTCHA, `variant` is `captcha`: report rates
    with and without these rows. `held_out` and `for_training` divide the standard behaviours of
    `test`: the profile `laptop` trains on the latter only. `development` are the validation
    behaviours on which its settings are chosen. Rows about copyright are read only if
    their subset is named. No judge here can tell whether responses to them do harm, because that
    takes HarmBench's own hashes, which are pickle files.
    """

    title = "HarmBench: 300 text behaviours and 110 with an image (copyright: 100)"
    licence = "MIT; images have licences of their own"
    homepage = "centerforaisafety/HarmBench"
    subsets = {
        "text": _text("harmbench_behaviors_text_all.csv"),
        "copyright": _text("harmbench_behaviors_text_all.csv", copyrighted=True),
        "test": _text(TEST),
        "held_out": _text(TEST, load=functools.partial(_divided, held_out=True), also=(VAL,)),
        "for_training": _text(TEST, load=functools.partial(_divided, held_out=False), also=(VAL,)),
        "val": _text(VAL),
        "development": _text(VAL, load=_development),
        "multimodal": Columns(
            "harmbench_behaviors_multimodal_all.csv",
            id="{BehaviorID}",
            prompt="{Behavior}",
            image="multimodal_behavior_images/{ImageFileName}",
            context="{RedactedImageDescription}",
            category="{SemanticCategory}",
            variant=lambda r: "captcha" if "captcha" in r["BehaviorID"].lower() else "",
            group="{Behavior}",
        ),
    }
    default = ("text", "multimodal")

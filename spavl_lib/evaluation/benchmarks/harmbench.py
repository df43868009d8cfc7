"""HarmBench: 400 text behaviours, of which 100 are about copyright, and 110 with an image."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from spavl_lib.evaluation.benchmarks.base import Benchmark, Columns, Reader, Record, register

_Load = Callable[[Reader], Iterable[Record]] | None
CONTEXT_ENDS = "\n\n---\n\n"  # separates the context from the request in a prompt
KINDS = ("standard", "contextual", "copyright")
TEST = "harmbench_behaviors_text_test.csv"
HELD_OUT = 80  # standard test behaviours that the profile `laptop` never trains on


def _context_is_there(record: Mapping[str, Any]) -> Iterator[str]:
    if record["FunctionalCategory"] == "contextual" and not record["ContextString"].strip():
        yield "contextual row without ContextString"


def _prompt(record: Mapping[str, Any]) -> str:
    context = record["ContextString"]
    return (context + CONTEXT_ENDS if context else "") + record["Behavior"]


def _divided(reader: Reader, *, held_out: bool) -> Iterator[Record]:
    """The standard test behaviours that are held out, or the others, in the file's order.

    A hash of the id draws them, so the draw depends on no order and no generator.
    """
    columns = ("BehaviorID", "Behavior", "FunctionalCategory", "ContextString", "SemanticCategory")
    records = [
        record
        for record in reader.table(TEST, columns)
        if record.fields["FunctionalCategory"] == "standard"
    ]
    keys = [
        hashlib.sha256(f"held out {record.fields['BehaviorID']}".encode()).digest()
        for record in records
    ]
    drawn = set(sorted(keys)[: min(HELD_OUT, (len(keys) + 1) // 2)])
    for record, key in zip(records, keys, strict=True):
        if (key in drawn) == held_out:
            yield record


def _text(file: str, copyrighted: bool = False, load: _Load = None) -> Columns:
    return Columns(
        file,
        load=load,
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
    `test`: the profile `laptop` trains on the latter only. Rows about copyright are read only if
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
        "held_out": _text(TEST, load=functools.partial(_divided, held_out=True)),
        "for_training": _text(TEST, load=functools.partial(_divided, held_out=False)),
        "val": _text("harmbench_behaviors_text_val.csv"),
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

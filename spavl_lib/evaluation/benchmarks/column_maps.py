"""Benchmarks that need little more than the names of their columns."""

import base64
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from spavl_lib.evaluation.benchmarks.base import Benchmark, Columns, Reader, Record, register

Fields = Mapping[str, Any]
OPTIONS = "ABCD"
OR_BENCH_CATEGORIES = (
    "deception", "harassment", "harmful", "hate", "illegal", "privacy", "self-harm", "sexual",
    "unethical", "violence",
)  # fmt: skip


def _known_option(record: Fields) -> Iterator[str]:
    options = record["options"] if isinstance(record["options"], dict) else {}
    if missing := [letter for letter in OPTIONS if letter not in options]:
        yield f"no option {', '.join(missing)}"
    if record["correct_option"] not in options:
        yield f"correct_option {record['correct_option']!r} is not among the options"


@register("siuo")
class SIUO(Benchmark):
    """The text alone and the image alone are harmless. `choice` asks for one of four answers."""

    title = "SIUO: 167 questions to answer (gen), and as multiple choice (choice)"
    licence = "CC BY-NC 4.0, as its README says: not for commercial use"
    homepage = "sinwang20/SIUO"
    subsets = {
        "gen": Columns(
            "siuo_gen.json", id="{question_id}", prompt="{question}", image="images/{image}",
            category="{category}", reference="{reference_answer}", group="{question_id}",
            expect="judge", rule="safe_and_helpful", columns=("safety_warning",),
        ),
        "choice": Columns(
            "siuo_mcqa.json", id="{question_id}", image="images/{image}", category="{category}",
            prompt="{question}\n" + "\n".join(f"{x}. {{options[{x}]}}" for x in OPTIONS),
            reference="{correct_option}", group="{question_id}", expect="answer", rule="choice",
            check=_known_option,
        ),
    }  # fmt: skip


@register("vlsbench")
class VLSBench(Benchmark):
    """The text does not give away what the image shows. One published instruction is empty."""

    title = "VLSBench: 2,240 instructions on 1,957 images (one more is empty)"
    licence = "Apache-2.0, as its page on the Hub says"
    homepage = "hf:Foreshhh/vlsbench"
    known_faults = ("data.json: row 1685 (1685)",)
    subsets = {
        "full": Columns(
            "data.json", id="{instruction_id}", prompt="{instruction}", image="{image_path}",
            category="{category}/{sub_category}", context="{image_description}",
            group="{image_path}", expect="judge", rule="warn_or_decline",
        )
    }  # fmt: skip


def _type_fits(record: Fields) -> Iterator[str]:
    if record["image_safe"] is not (record["type"][0] == "S"):
        yield f"type {record['type']} but image_safe is {record['image_safe']!r}"


@register("holisafe")
class HoliSafe(Benchmark):
    """A row's type has three letters: they say whether the image, the text, and both together are
    safe (S) or unsafe (U). A good model answers if the last letter is S, and declines if it is
    U."""

    title = "HoliSafe: 4,031 pairs of text and image, of five types"
    licence = "CC BY-NC 4.0; access on the Hub is granted on request"
    homepage = "hf:etri-vilab/holisafe-bench"
    subsets = {
        "full": Columns(
            "holisafe_bench.json", id="{id}", prompt="{query}", image="images/{image}",
            category="{category}/{subcategory}", variant="{type}", group="{image}",
            expect=lambda record: "answer" if record["type"][2] == "S" else "decline",
            rule=lambda record: "answer" if record["type"][2] == "S" else "general",
            allowed={"type": ("SSS", "SSU", "USU", "UUU", "SUU")}, columns=("image_safe",),
            check=_type_fits,
        )
    }  # fmt: skip


def _or_bench(name: str, expect: str, rule: str) -> Columns:
    return Columns(
        f"or-bench-{name}.csv", category="{category}", expect=expect, rule=rule,
        allowed={"category": OR_BENCH_CATEGORIES},
    )  # fmt: skip


@register("orbench")
class ORBench(Benchmark):
    """Text only. `toxic` has harmful requests, which show whether a model answers everything."""

    title = "OR-Bench: harmless requests that look harmful (hard 1k, 80k), and harmful ones (toxic)"
    licence = "CC BY 4.0"
    homepage = "hf:bench-llm/or-bench"
    subsets = {
        "hard": _or_bench("hard-1k", "answer", "answer"),
        "80k": _or_bench("80k", "answer", "answer"),
        "toxic": _or_bench("toxic", "decline", "general"),
    }
    default = ("hard",)


_JAILBREAKV = Columns(
    "JailBreakV_28K.csv", id="{id}", prompt="{jailbreak_query}", image="{image_path}",
    category="{policy}", variant="{format}", group="{redteam_query}",
    allowed={"selected_mini": ("True", "False")},
)  # fmt: skip


@register("jailbreakv")
class JailBreakV(Benchmark):
    """A group holds all attacks that use the same harmful request."""

    title = "JailBreakV-28K: 28,000 attacks with images (mini: about 280; redteam: 2,000 requests)"
    licence = "MIT"
    homepage = "hf:JailbreakV-28K/JailBreakV-28k"
    roots = ("", "JailBreakV_28K")
    subsets = {
        "full": _JAILBREAKV,
        "mini": dataclasses.replace(_JAILBREAKV, where=lambda r: r["selected_mini"] == "True"),
        "redteam": Columns("RedTeam_2K.csv", id="{id}", prompt="{question}", category="{policy}"),
    }
    default = ("full",)


def _categories(reader: Reader) -> Iterator[Record]:
    paths = [
        p for r in reader.roots for p in sorted((reader.folder / r).glob("*_evaluation.jsonl"))
    ]
    if not paths:
        reader.problem("*_evaluation.jsonl", "file", "is not there")
    for path in paths:
        for number, record in enumerate(reader.lines(path.name)):
            yield record.having(_id=f"{path.name.removesuffix('_evaluation.jsonl')}/{number}")


@register("beavertails_v")
class BeaverTailsV(Benchmark):
    """There is one file for each category. Preferences between two answers are checked, but not
    used."""

    title = "BeaverTails-V: 1,180 requests with images in 20 categories (evaluation split)"
    licence = "CC BY-NC 4.0: not for commercial use"
    homepage = "hf:saferlhf-v/BeaverTails-V"
    subsets = {
        "evaluation": Columns(
            "", load=_categories, id="{_id}", prompt="{question}", image="images/{image}",
            category="{category}", group="{image}", expect="judge",
            columns=("response_1", "response_2"),
            allowed=dict.fromkeys(("safer_response_id", "more_helpful_response_id"), ("1", "2")),
        )
    }  # fmt: skip


def _has_warning(record: Fields) -> Iterator[str]:
    if record["safety type"] == "unsafe" and not record.get("safety warning"):
        yield "unsafe row without 'safety warning'"


@register("salad")
class SaLAD(Benchmark):
    """A good response to an unsafe row warns or declines; a good response to a safe row just
    helps."""

    title = "SaLAD: everyday requests, safe or dangerous because of the image"
    licence = "Apache-2.0"
    homepage = "xinyuelou/SaLAD"
    subsets = {
        "full": Columns(
            "data.json", prompt="{query}", image="images/{image}", category="{category}",
            variant="{safety type}", group="{image}",
            expect=lambda record: "answer" if record["safety type"] == "safe" else "judge",
            rule=lambda record: "answer" if record["safety type"] == "safe" else "warn_or_decline",
            allowed={"safety type": ("safe", "unsafe")}, check=_has_warning,
        )
    }  # fmt: skip


def _is_list(record: Fields) -> Iterator[str]:
    if not isinstance(record["capability"], list):
        yield f"capability is {record['capability']!r}, not a list"


@register("mmvet")
class MMVet(Benchmark):
    """This benchmark is not about safety. `<AND>` and `<OR>` in a reference join its parts."""

    title = "MM-Vet: 218 questions about images, with short references"
    licence = "Apache-2.0 (code), CC BY-NC 4.0 (data): not for commercial use"
    homepage = "yuweihao/MM-Vet"
    subsets = {
        "full": Columns(
            "mm-vet.json", keyed="", id="{_key}", prompt="{question}", image="images/{imagename}",
            category=lambda record: "/".join(record["capability"]), reference="{answer}",
            group="{imagename}", expect="answer", rule="reference", columns=("capability",),
            check=_is_list,
        )
    }  # fmt: skip


def _sides(subset: str, reader: Reader) -> Iterator[Record]:
    """Each request with each of its two images."""
    file, value = reader.document("combined.json")
    items = value.get(subset) if isinstance(value, dict) else None
    if value is not None and not isinstance(items, list):
        reader.problem(file, "line 1", f"an object with a list {subset!r} expected")
    for index, item in enumerate(items if isinstance(items, list) else ()):
        fields = item if isinstance(item, dict) else {}
        record = Record(reader, file, f"{subset} row {index}", fields)
        images, requests = ("{}_image_path", "queries") if subset == "chat" else (
            "{}", "{}_instructions"
        )  # fmt: skip
        texts = {side: record.listed(requests.format(side)) for side in ("safe", "unsafe")}
        if len(texts["safe"]) != len(texts["unsafe"]):
            record.problem(f"{len(texts['safe'])} safe, {len(texts['unsafe'])} unsafe requests")
        for side, prompts in texts.items():
            image = record.text(images.format(side))
            for number, text in enumerate(prompts):
                yield record.having(
                    _id=f"{index}/{number}:{side}", _side=side, _text=text, _pair=index,
                    _image=f"{subset}/{image}", _kind=fields.get("Type", fields.get("category")),
                )  # fmt: skip


def _mssbench(subset: str) -> Columns:
    return Columns(
        "combined.json", load=functools.partial(_sides, subset), id="{_id}", prompt="{_text}",
        image="{_image}", category="{_kind}", variant="{_side}", group=subset + "-{_pair}",
        expect=lambda record: "answer" if record["_side"] == "safe" else "judge",
        rule=lambda record: "answer" if record["_side"] == "safe" else "warn_or_decline",
    )  # fmt: skip


@register("mssbench")
class MSSBench(Benchmark):
    """Each request has two rows: one with an image that makes the request safe, and one with an
    image that makes it dangerous. If one of the images is missing, both rows count as without
    image."""

    title = "MSSBench: requests with a safe and an unsafe image each (chat and embodied)"
    licence = "MIT"
    homepage = "eric-ai-lab/MSSBench"
    whole_groups = True
    subsets = {"chat": _mssbench("chat"), "embodied": _mssbench("embodied")}


def _of_tsv(reader: Reader) -> Iterator[Record]:
    """The records of every TSV file, each with its image."""
    paths = sorted(reader.folder.glob("*.tsv"))
    if not paths:
        reader.problem("*.tsv", "file", "is not there")
    for path in paths:
        records = reader.table(path.name, ("index", "image", "question"))
        texts = {record.fields["index"]: record.fields["image"] for record in records}
        for record in records:
            text = record.fields["image"]
            if len(text) <= 64:  # too short for an image: the text is the index of another row
                text = texts.get(text, "")
            if len(text) <= 64:
                index = record.fields["image"]
                record.problem(f"image refers to index {index}, which has no image")
                continue
            try:
                image = reader.stored_image(base64.b64decode(text, validate=True), record)
            except ValueError as error:
                record.problem(f"image is not base64: {error}")
                continue
            yield record.having(
                _id=f"{path.stem}/{record.fields['index']}", _image=image or "",
                _digest=hashlib.sha256(text.encode()).hexdigest()[:12],
            )  # fmt: skip


@register("vlmevalkit_tsv")
class VLMEvalKitTSV(Benchmark):
    """Files in VLMEvalKit's form, `NAME.tsv`. The column `image` holds an image as base64 text, or
    the index of another row that holds the image."""

    title = "Data sets in VLMEvalKit's TSV form, such as MME.tsv"
    licence = "each data set has its own"
    homepage = "open-compass/VLMEvalKit"
    subsets = {
        "all": Columns(
            "", load=_of_tsv, id="{_id}", prompt="{question}",
            image=lambda record: record["_image"], group="{_digest}", expect="answer",
            category=lambda record: record.get("category", ""), rule="reference",
            reference=lambda record: record.get("answer", ""),
        )
    }  # fmt: skip

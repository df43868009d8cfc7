"""MM-SafetyBench: 13 scenarios. Each question exists as text, and with three kinds of images.

The ids of scenarios 05 and 08 have gaps, so an image is found by its name only, never by its
position. The variants of a question have different texts; only `SD_TYPO` and `TYPO` share one.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from spavl_lib.evaluation.benchmarks.base import Benchmark, Columns, Reader, Record, register

SCENARIOS = (
    "01-Illegal_Activitiy", "02-HateSpeech", "03-Malware_Generation", "04-Physical_Harm",
    "05-EconomicHarm", "06-Fraud", "07-Sex", "08-Political_Lobbying", "09-Privacy_Violence",
    "10-Legal_Opinion", "11-Financial_Advice", "12-Health_Consultation", "13-Gov_Decision",
)  # fmt: skip
# Variant -> the key of its text. An image's folder has the variant's name.
TEXTS = {
    "text_only": "Changed Question",
    "SD": "Rephrased Question(SD)",
    "SD_TYPO": "Rephrased Question",
    "TYPO": "Rephrased Question",
}
# The authors judge these scenarios by rules of their own, and all others by the general one.
RULE_OF = {
    "08": "decline_only", "10": "advice_with_caution", "11": "advice_with_caution",
    "12": "advice_with_caution", "13": "decline_only",
}  # fmt: skip
TINY = "TinyVersion_ID_List.json"


def _questions(reader: Reader) -> Iterator[Record]:
    """The questions of all scenarios, each once per variant."""
    present = [name for name in SCENARIOS if reader.find(_file(name))]
    if not present:
        reader.problem("processed_questions", "folder", "no file of any scenario is there")
    # The authors name the folder of images `imgs`, and some copies `img`.
    roots = [reader.folder / root for root in reader.roots]
    images = "img" if any((root / "img").is_dir() for root in roots) else "imgs"
    has_images = any((root / images).is_dir() for root in roots)
    stored = {} if has_images else _hub_images(reader)
    for name in SCENARIOS:
        if name not in present:
            reader.changes.append(f"{_file(name)} is not there")
            continue
        for record in reader.objects(_file(name), keyed="id"):
            for variant, key in TEXTS.items():
                text, image = record.text(key), ""
                if not text.strip():
                    continue  # `record.text` has noted the problem
                if variant != "text_only":
                    place = (name[3:], variant, record.fields["_key"])
                    question, image = stored.get(
                        place, (text, f"{images}/{name}/{variant}/{place[2]}.jpg")
                    )
                    if question != text:
                        record.problem(f"{key} differs from the question of {'/'.join(place)}")
                yield record.having(
                    _scenario=name, _number=name[:2], _variant=variant, _text=text, _image=image
                )


def _hub_images(reader: Reader) -> dict[tuple[str, str, str], tuple[str, Any]]:
    """(scenario, variant, id) -> question and image, from parquet files as on the Hub: one folder
    per scenario, named without its number, and one file per variant."""
    stored: dict[tuple[str, str, str], tuple[str, Any]] = {}
    for root in reader.roots:
        for path in sorted((reader.folder / root).glob("*/*.parquet")):
            scenario, variant = path.parent.name, path.name.partition("-")[0]
            if variant not in TEXTS or scenario not in [name[3:] for name in SCENARIOS]:
                continue  # another file, such as the split `Text_only`, which has no images
            for record in reader.parquet(f"{scenario}/{path.name}", ["id", "question", "image"]):
                content = (record.fields["image"] or {}).get("bytes")
                image = reader.stored_image(content, record) if content else None
                key = (scenario, variant, str(record.fields["id"]))
                if key in stored:
                    record.problem(f"id {key[2]} twice")
                if image is None:
                    record.problem("no image")
                stored[key] = (str(record.fields["question"]), image or "")
    return stored


def _tiny_questions(reader: Reader) -> Iterator[Record]:
    """The questions of the tiny list."""
    records = list(_questions(reader))
    known = {(r.fields["_scenario"], r.fields["_key"]) for r in records}
    chosen = set()
    file, value = reader.document(TINY)
    if value is not None and not isinstance(value, list):
        reader.problem(file, "line 1", "a list expected")
    for entry in value if isinstance(value, list) else ():
        name = entry.get("Scenario") if isinstance(entry, dict) else entry
        ids = entry.get("Sampled_ID_List") if isinstance(entry, dict) else None
        if not isinstance(ids, list):
            reader.problem(file, str(name), "no Sampled_ID_List")
            continue
        for number in ids:
            if (name, str(number)) not in known:
                reader.problem(file, f"{name} id {number}", "id not in the question file")
        chosen |= {(name, str(number)) for number in ids}
    yield from (r for r in records if (r.fields["_scenario"], r.fields["_key"]) in chosen)


def _file(scenario: str) -> str:
    return f"processed_questions/{scenario}.json"


def _rule(record: Mapping[str, Any]) -> str:
    return RULE_OF.get(record["_number"], "general")


def _columns(**load: Any) -> Columns:
    return Columns(
        "",
        id="{_number}/{_key}:{_variant}",
        prompt="{_text}",
        image=lambda record: record["_image"],
        category="{_scenario}",
        variant="{_variant}",
        group="{_scenario} {Question}",
        expect=lambda record: "judge" if _rule(record) == "advice_with_caution" else "decline",
        rule=_rule,
        **load,
    )


@register("mm_safetybench")
class MMSafetyBench(Benchmark):
    """Every question gives one row per variant. All rows of a question share a group, and so do
    questions of a scenario with the same words. No row is harmless: a model that always declines
    scores perfectly. The SPA-VL paper reports `tiny`."""

    title = "MM-SafetyBench: 1,680 questions in 13 scenarios (tiny: 168), 4 variants of each"
    licence = "CC BY-NC 4.0, as its README says: not for commercial use"
    homepage = "isXinLiu/MM-SafetyBench"
    subsets = {
        "full": _columns(load=_questions),
        "tiny": _columns(load=_tiny_questions, also=(TINY,)),
    }
    default = ("full",)

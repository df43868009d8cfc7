"""MM-SafetyBench: 13 scenarios; each question as text, and with three kinds of images.

The ids of scenarios 05 and 08 have gaps, so an image belongs to a row by its name only, never by
its position. Every variant has a text of its own.
"""

from collections.abc import Iterator

from spavl_lib.evaluation.benchmarks.base import (
    Benchmark,
    BenchmarkRow,
    Reader,
    Record,
    register_benchmark,
)

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
# The authors judge these scenarios by rules of their own; all others are `general`.
DECLINE_ONLY, ADVICE = ("08", "13"), ("10", "11", "12")
TINY = "TinyVersion_ID_List.json"


@register_benchmark("mm_safetybench")
class MMSafetyBench(Benchmark):
    """Every question gives one row per variant. All of them share a group, as do the repeated
    questions of a scenario. No row is harmless: a model that always declines scores perfectly."""

    title = "MM-SafetyBench: 1,680 questions in 13 scenarios (tiny: 168), 4 variants of each"
    licence = "CC BY-NC 4.0, as its README says: not for commercial use"
    homepage = "isXinLiu/MM-SafetyBench"
    default = ("full",)

    def subset_names(self) -> tuple[str, ...]:
        """`full`, and `tiny`, which the SPA-VL paper reports."""
        return "full", "tiny"

    def needed_files(self, subset: str) -> tuple[str, ...]:
        """The list of the tiny subset; the scenarios' files are looked for one by one."""
        return (TINY,) if subset == "tiny" else ()

    def rows(self, subset: str, reader: Reader) -> Iterator[BenchmarkRow]:
        """The rows, scenario by scenario."""
        questions = {name: _questions(name, reader) for name in SCENARIOS}
        present = [name for name in SCENARIOS if reader.find(_file(name))]
        if not present:
            reader.problem("processed_questions", "folder", "no file of any scenario is there")
        if subset == "tiny":
            questions = _tiny(questions, reader)
        for name in present:
            for key, record in questions[name].items():
                yield from self._variants(subset, name, key, record)

    def _variants(
        self, subset: str, scenario: str, key: str, record: Record
    ) -> Iterator[BenchmarkRow]:
        number = scenario[:2]
        rule, expect = "general", "decline"
        if number in DECLINE_ONLY:
            rule = "decline_only"
        elif number in ADVICE:
            rule, expect = "advice_with_caution", "judge"
        question = record.text("Question")
        for variant, text in TEXTS.items():
            image = None
            if variant != "text_only":
                image = record.reader.image(_image(scenario, variant, key, record), record)
            yield self.row(
                subset,
                record.reader.sha(_file(scenario)),
                native=f"{number}/{key}",
                prompt=record.text(text),
                image=image,
                variant=variant,
                expect=expect,
                category=scenario,
                rule=rule,
                group=f"{scenario} {question}",
                shared_id=True,
            )


def _file(scenario: str) -> str:
    return f"processed_questions/{scenario}.json"


def _image(scenario: str, variant: str, key: str, record: Record) -> str:
    """The image's path: the authors use `imgs/`, and some copies `img/`."""
    copies = (record.reader.folder / root / "img" for root in record.reader.roots)
    folder = "img" if any(path.is_dir() for path in copies) else "imgs"
    return f"{folder}/{scenario}/{variant}/{key}.jpg"


def _questions(scenario: str, reader: Reader) -> dict[str, Record]:
    """Id -> question, with its texts checked."""
    if reader.find(_file(scenario)) is None:
        reader.changes.append(f"{_file(scenario)} is not there")
        return {}
    return dict(reader.objects(_file(scenario), keyed="id"))


def _tiny(questions: dict[str, dict[str, Record]], reader: Reader) -> dict[str, dict[str, Record]]:
    """The questions of the tiny list."""
    file, value = reader.document(TINY)
    chosen: dict[str, dict[str, Record]] = {name: {} for name in questions}
    for entry in value if isinstance(value, list) else ():
        name = str(entry.get("Scenario")) if isinstance(entry, dict) else str(entry)
        ids = entry.get("Sampled_ID_List") if isinstance(entry, dict) else None
        if name not in questions or not isinstance(ids, list):
            reader.problem(file, name, "a known scenario with its Sampled_ID_List expected")
            continue
        for number in ids:
            if str(number) in questions[name]:
                chosen[name][str(number)] = questions[name][str(number)]
            else:
                reader.problem(file, f"{name} id {number}", "id not in the question file")
    if value is not None and not isinstance(value, list):
        reader.problem(file, "line 1", "a list expected")
    return chosen

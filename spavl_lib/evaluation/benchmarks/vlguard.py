"""VLGuard's test set: 1,000 images, three subsets of prompts."""

from collections.abc import Iterator

from spavl_lib.evaluation.benchmarks.base import (
    Benchmark,
    BenchmarkRow,
    Reader,
    Record,
    register_benchmark,
)

# Test rows whose image is in the training set too. A model that was trained on it has seen them.
IN_TRAIN = (
    "Ads_295003", "HOD_img_hod_008677", "HOD_img_hod_001282", "HOD_img_hod_004405", "harm-p_3785",
    "harm-p_3364", "harm-p_1283", "harm-p_2833",
)  # fmt: skip
# Subset -> key of its prompt. A safe image has the first two, an unsafe one the last.
KEYS = {
    "safe_safe": "safe_instruction",
    "safe_unsafe": "unsafe_instruction",
    "unsafe": "instruction",
}
REFERENCES = "gpt4_safe_safes.json"


@register_benchmark("vlguard")
class VLGuard(Benchmark):
    """`variant` is `in_train` for the rows of `IN_TRAIN`. Rows of one image share a group."""

    title = "VLGuard test: 558 safe, 558 unsafe prompts on safe images; 442 on unsafe images"
    licence = "none in its repository; access on the Hub is granted on request"
    homepage = "hf:ys-zong/VLGuard"

    def subset_names(self) -> tuple[str, ...]:
        """`safe_safe`, `safe_unsafe` and `unsafe`: the image's side, then the prompt's."""
        return tuple(KEYS)

    def needed_files(self, subset: str) -> tuple[str, ...]:
        """One file has all three subsets."""
        return ("test.json",)

    def rows(self, subset: str, reader: Reader) -> Iterator[BenchmarkRow]:
        """The rows of one subset."""
        references = _references(reader) if subset == "safe_safe" else {}
        for _, record in reader.objects("test.json", id_key="id"):
            prompts = _prompts(record)
            if KEYS[subset] not in prompts:
                continue
            native, category = str(record.fields.get("id")), "safe"
            if subset == "unsafe":
                category = "/".join(
                    record.text(f"harmful_{level}") for level in ("category", "subcategory")
                )
            yield self.row(
                subset,
                reader.sha("test.json"),
                native=native,
                prompt=prompts[KEYS[subset]],
                image=reader.image(f"test/{record.text('image')}", record),
                variant="in_train" if native in IN_TRAIN else "",
                expect="answer" if subset == "safe_safe" else "decline",
                category=category,
                rule="answer" if subset == "safe_safe" else "general",
                reference=references.get(native, ""),
                group=native,
            )

    def notes(self, subset: str, reader: Reader) -> Iterator[str]:
        """Says how many images are in the training set too, and which references lack."""
        yield (
            f"{len(IN_TRAIN)} images are in VLGuard's training set too (variant in_train): leave "
            "their rows out for a model that was trained on it"
        )
        if subset == "safe_safe" and reader.find(REFERENCES):
            empty = sum(not text for text in _references(reader).values())
            yield f"{empty} rows of safe_safe have no reference answer"


def _prompts(record: Record) -> dict[str, str]:
    """Key of each prompt of an image -> the prompt. Notes a problem if they are not as expected."""
    safe = record.choice("safe", (True, False))
    turns = [turn for turn in record.listed("instr-resp") if isinstance(turn, dict)]
    prompts = {key: turn[key] for turn in turns for key in KEYS.values() if key in turn}
    expected = ("safe_instruction", "unsafe_instruction") if safe else ("instruction",)
    if isinstance(safe, bool):
        for key in expected:
            if key not in prompts:
                record.problem(f"{'safe' if safe else 'unsafe'} row without {key}")
        if extra := [key for key in prompts if key not in expected]:
            record.problem(f"{'safe' if safe else 'unsafe'} row with {', '.join(extra)}")
    for key, text in prompts.items():
        if not isinstance(text, str) or not text.strip():
            record.problem(f"empty {key}")
    return {key: text for key, text in prompts.items() if isinstance(text, str)}


def _references(reader: Reader) -> dict[str, str]:
    """Id -> GPT-4's answer to the safe prompt; empty answers are published too."""
    if reader.find(REFERENCES) is None:
        return {}
    pairs = reader.objects(REFERENCES, id_key="id")
    return {
        str(record.fields.get("id")): record.text("output", may_be_empty=True)
        for _, record in pairs
    }

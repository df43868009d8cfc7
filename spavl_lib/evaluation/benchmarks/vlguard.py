"""VLGuard's test set: 1,000 images, three subsets of prompts."""

from collections.abc import Iterator
from typing import Any

from spavl_lib.evaluation.benchmarks.base import Benchmark, Columns, Reader, Record, register

# Test rows whose image is in the training set too. A model that was trained on VLGuard has seen
# these images.
IN_TRAIN = (
    "Ads_295003", "HOD_img_hod_008677", "HOD_img_hod_001282", "HOD_img_hod_004405", "harm-p_3785",
    "harm-p_3364", "harm-p_1283", "harm-p_2833",
)  # fmt: skip
SAFE, UNSAFE = ("safe_instruction", "unsafe_instruction"), ("instruction",)
REFERENCES = "gpt4_safe_safes.json"


def _prompts(reader: Reader) -> Iterator[Record]:
    """Each prompt of each image, with GPT-4's answer to it if there is one."""
    references = _references(reader)
    for record in reader.objects("test.json", id_key="id"):
        safe = record.choice("safe", (True, False))
        expected = SAFE if safe else UNSAFE
        turns = [turn for turn in record.listed("instr-resp") if isinstance(turn, dict)]
        prompts = {key: turn[key] for turn in turns for key in SAFE + UNSAFE if key in turn}
        if not isinstance(safe, bool):
            continue
        for key in set(expected) ^ set(prompts):
            how = "without" if key in expected else "with"
            record.problem(f"{'safe' if safe else 'unsafe'} row {how} {key}")
        levels = ["safe"] if safe else [record.text(f"harmful_{x}category") for x in ("", "sub")]
        for key, text in prompts.items():
            reference = references.get(record.fields.get("id"), "") if key == SAFE[0] else ""
            yield record.having(
                _key=key, _text=text, _category="/".join(levels), _reference=reference
            )


def _references(reader: Reader) -> dict[Any, str]:
    """Id -> GPT-4's answer to the safe prompt. Some of the published answers are empty."""
    if reader.find(REFERENCES) is None:
        return {}
    records = reader.objects(REFERENCES, id_key="id")
    return {r.fields.get("id"): r.text("output", may_be_empty=True) for r in records}


def _columns(key: str, expect: str = "decline", rule: str = "general") -> Columns:
    return Columns(
        "test.json",
        load=lambda reader: (r for r in _prompts(reader) if r.fields["_key"] == key),
        id="{id}",
        prompt="{_text}",
        image="test/{image}",
        category="{_category}",
        variant=lambda record: "in_train" if record["id"] in IN_TRAIN else "",
        reference="{_reference}",
        group="{id}",
        expect=expect,
        rule=rule,
    )


@register("vlguard")
class VLGuard(Benchmark):
    """A subset's name says first whether the image is safe, then whether the prompt is safe; unsafe
    images have no safe prompts. The rows of `IN_TRAIN` have the variant `in_train`."""

    title = "VLGuard test: 558 safe, 558 unsafe prompts on safe images; 442 on unsafe images"
    licence = "none in its repository; access on the Hub is granted on request"
    homepage = "hf:ys-zong/VLGuard"
    subsets = {
        "safe_safe": _columns("safe_instruction", "answer", "answer"),
        "safe_unsafe": _columns("unsafe_instruction"),
        "unsafe": _columns("instruction"),
    }

    def notes(self, subset: str, reader: Reader) -> Iterator[str]:
        """Says how many images are in the training set too, and how many references are empty."""
        yield (
            f"{len(IN_TRAIN)} images are in VLGuard's training set too (variant in_train): leave "
            "their rows out for a model that was trained on VLGuard"
        )
        empty = sum(not text for text in _references(reader).values())
        if subset == "safe_safe" and empty:
            yield f"{empty} rows of safe_safe have an empty reference answer"

"""MSTS: 200 cases of a text and an image that are dangerous only together, in 11 languages."""

from collections.abc import Iterator
from pathlib import Path

from spavl_lib.evaluation.benchmarks.base import (
    Benchmark,
    BenchmarkRow,
    Reader,
    Record,
    register_benchmark,
)

LANGUAGES = (
    "english", "arabic", "chinese", "farsi", "french", "german", "hindi", "italian", "korean",
    "russian", "spanish",
)  # fmt: skip
COLUMNS = ("hazard_category", "case_id", "prompt_text", "prompt_type")
IMAGES = "images/unsafe_images.csv"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@register_benchmark("msts")
class MSTS(Benchmark):
    """Images are published as addresses only: download them to `images/IMAGE_ID.jpg`. The two
    prompts of a case (one asks, one states an intention) share a group, in every language."""

    title = "MSTS: 400 English prompts on 200 images (textonly: 400; 10 more languages: 200 each)"
    licence = "CC BY 4.0; each image has a licence of its own"
    homepage = "paul-rottger/msts-multimodal-safety"
    default = ("english",)

    def subset_names(self) -> tuple[str, ...]:
        """The languages, and `textonly`, which describes the image in English."""
        return (*LANGUAGES, "textonly")

    def needed_files(self, subset: str) -> tuple[str, ...]:
        """The prompts, and for multimodal ones the table of images."""
        return (_file(subset),) if subset == "textonly" else (_file(subset), IMAGES)

    def rows(self, subset: str, reader: Reader) -> Iterator[BenchmarkRow]:
        """The rows of one language."""
        has_image = subset != "textonly"
        columns = (*COLUMNS, "unsafe_image_id") if has_image else COLUMNS
        records = reader.table(_file(subset), (*columns, "unsafe_image_description"))
        known = _known_images(reader) if has_image else {}
        rows = []
        for record in records:
            case, kind = record.text("case_id"), record.text("prompt_type")
            image_id = record.fields.get("unsafe_image_id", "")
            if has_image and known.get(image_id) != case:
                record.problem(
                    f"{image_id} is not in {IMAGES}"
                    if image_id not in known
                    else f"{image_id} belongs to {known[image_id]}, not to {case}"
                )
                continue
            rows.append(((case, kind), record))
            yield self.row(
                subset,
                reader.sha(_file(subset)),
                native=f"{case}/{kind}",
                prompt=record.text("prompt_text"),
                image=_image(image_id, record) if has_image else None,
                variant=kind,
                context=record.text("unsafe_image_description") if has_image else "",
                expect="judge",
                category=record.text("hazard_category"),
                rule="advise_against",
                group=case,
            )
        reader.unique(rows, "case and type")


def _file(subset: str) -> str:
    return f"prompts/{'english_textonly' if subset == 'textonly' else subset + '_multimodal'}.csv"


def _known_images(reader: Reader) -> dict[str, str]:
    """Image id -> the case that it belongs to."""
    records = reader.table(IMAGES, ("case_id", "unsafe_image_id", "unsafe_image_url"))
    return {r.text("unsafe_image_id"): r.text("case_id") for r in records}


def _image(image_id: str, record: Record) -> Path | None:
    names = [f"images/{image_id}{suffix}" for suffix in SUFFIXES]
    present = (name for name in names if record.reader.find(name))
    return record.reader.image(next(present, names[0]), record)

"""MSTS: 200 cases of a text and an image that are dangerous only together, in 11 languages."""

import functools
from collections.abc import Iterator

from spavl_lib.evaluation.benchmarks.base import Benchmark, Columns, Reader, Record, register

LANGUAGES = (
    "english", "arabic", "chinese", "farsi", "french", "german", "hindi", "italian", "korean",
    "russian", "spanish",
)  # fmt: skip
COLUMNS = (
    "hazard_category", "case_id", "unsafe_image_id", "unsafe_image_description", "prompt_text",
    "prompt_type",
)  # fmt: skip
IMAGES = "images/unsafe_images.csv"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def _with_images(file: str, reader: Reader) -> Iterator[Record]:
    """The prompts of a file, each with the path of its case's image."""
    images = reader.table(IMAGES, ("case_id", "unsafe_image_id", "unsafe_image_url"))
    case_of = {r.fields["unsafe_image_id"]: r.fields["case_id"] for r in images}
    for record in reader.table(file, COLUMNS):
        image, case = record.fields["unsafe_image_id"], record.fields["case_id"]
        if image not in case_of:
            record.problem(f"{image} is not in {IMAGES}")
        elif case_of[image] != case:
            record.problem(f"{image} belongs to {case_of[image]}, not to {case}")
        names = [f"images/{image}{suffix}" for suffix in SUFFIXES]
        yield record.having(_image=next((n for n in names if reader.find(n)), names[0]))


_TEXT_ONLY = Columns(
    "prompts/english_textonly.csv", id="{case_id}/{prompt_type}", prompt="{prompt_text}",
    category="{hazard_category}", variant="{prompt_type}", group="{case_id}", expect="judge",
    rule="advise_against",
)  # fmt: skip


def _columns(language: str) -> Columns:
    file = f"prompts/{language}_multimodal.csv"
    return Columns(
        file, load=functools.partial(_with_images, file), also=(IMAGES,), id=_TEXT_ONLY.id,
        prompt="{prompt_text}", image="{_image}", context="{unsafe_image_description}",
        category="{hazard_category}", variant="{prompt_type}", group="{case_id}", expect="judge",
        rule="advise_against",
    )  # fmt: skip


@register("msts")
class MSTS(Benchmark):
    """The authors publish only the addresses of the images: download the images to
    `images/IMAGE_ID.jpg`. The two prompts of a case (one asks, one states an intention) share a
    group, in every language. In `textonly` the English prompt describes the image."""

    title = "MSTS: 400 English prompts on 200 images (textonly: 400; 10 more languages: 200 each)"
    licence = "CC BY 4.0; each image has a licence of its own"
    homepage = "paul-rottger/msts-multimodal-safety"
    subsets = {**{name: _columns(name) for name in LANGUAGES}, "textonly": _TEXT_ONLY}
    default = ("english",)

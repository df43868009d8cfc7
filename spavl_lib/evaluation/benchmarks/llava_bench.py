"""LLaVA-Bench: open questions about images, with GPT-4's answers as reference."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from spavl_lib.evaluation.benchmarks.base import (
    Benchmark,
    BenchmarkRow,
    Reader,
    register_benchmark,
)


@dataclass(frozen=True)
class _Files:
    questions: str
    references: str
    contexts: str
    images: str


_COCO = "playground/data/coco2014_val_qa_eval/"
_FILES = {
    "wild": _Files("questions.jsonl", "answers_gpt4.jsonl", "context.jsonl", "images"),
    "coco": _Files(
        f"{_COCO}qa90_questions.jsonl",
        f"{_COCO}qa90_gpt4_answer.jsonl",
        "llava/eval/table/caps_boxes_coco2014_val_80.jsonl",
        "val2014",
    ),
}


@register_benchmark("llava_bench")
class LLaVABench(Benchmark):
    """`context` is what the authors' judge is told of the image: its captions, joined by line
    breaks. The authors pair questions with references by line; here the ids must agree too."""

    title = "LLaVA-Bench: in the wild (wild, 60 questions) and COCO (coco, 90)"
    licence = "Apache-2.0; the COCO images have licences of their own"
    homepage = "hf:liuhaotian/llava-bench-in-the-wild"

    def subset_names(self) -> tuple[str, ...]:
        """`wild` and `coco`."""
        return tuple(_FILES)

    def needed_files(self, subset: str) -> tuple[str, ...]:
        """Questions, references and captions."""
        files = _FILES[subset]
        return files.questions, files.references, files.contexts

    def rows(self, subset: str, reader: Reader) -> Iterator[BenchmarkRow]:
        """The rows of one set."""
        files = _FILES[subset]
        questions = reader.lines(files.questions)
        references = reader.lines(files.references)
        if len(questions) != len(references):
            reader.problem(
                files.references,
                "end of file",
                f"{len(references)} references for {len(questions)} questions",
            )
        contexts = {
            str(record.fields.get("image")): _captions(record.fields)
            for record in reader.lines(files.contexts)
        }
        reader.unique(((r.fields.get("question_id"), r) for r in questions), "question_id")
        # Lengths that differ are a problem already, so that nothing is lost silently.
        for question, reference in zip(questions, references, strict=False):
            number = question.fields.get("question_id")
            if reference.fields.get("question_id") != number:
                found = reference.fields.get("question_id")
                reference.problem(f"question_id {found} beside question {number}")
            name = question.text("image")
            if name not in contexts:
                question.problem(f"{files.contexts} says nothing of image {name}")
            yield self.row(
                subset,
                reader.sha(files.questions),
                native=str(number),
                prompt=question.text("text"),
                image=reader.image(f"{files.images}/{name}", question),
                context=contexts.get(name, ""),
                expect="answer",
                category=question.text("category"),
                rule="reference",
                reference=reference.text("text"),
                group=name,
            )


def _captions(fields: Mapping[str, Any]) -> str:
    captions = fields.get("caption", fields.get("captions", ""))
    return "\n".join(captions) if isinstance(captions, list) else str(captions)

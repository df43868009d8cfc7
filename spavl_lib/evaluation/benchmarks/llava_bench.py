"""LLaVA-Bench: open questions about images, with GPT-4's answers as reference."""

from collections.abc import Iterator

from spavl_lib.evaluation.benchmarks.base import Benchmark, Columns, Reader, Record, register

COCO = "playground/data/coco2014_val_qa_eval"


def _columns(questions: str, references: str, contexts: str, images: str) -> Columns:
    def load(reader: Reader) -> Iterator[Record]:
        asked, answered = reader.lines(questions), reader.lines(references)
        if len(asked) != len(answered):
            why = f"{len(answered)} references for {len(asked)} questions"
            reader.problem(references, "end of file", why)
        captions = {r.fields.get("image"): _captions(r) for r in reader.lines(contexts)}
        # If the lengths differ, the problem is noted already, so no row is lost silently.
        for question, reference in zip(asked, answered, strict=False):
            number, other = question.fields.get("question_id"), reference.fields.get("question_id")
            if number != other:
                reference.problem(f"question_id {other} beside question {number}")
            name = question.fields.get("image")
            if name not in captions:
                question.problem(f"{contexts} says nothing of image {name}")
            yield question.having(
                _context=captions.get(name, ""), _reference=reference.text("text")
            )

    return Columns(
        questions, load=load, also=(references, contexts), id="{question_id}", prompt="{text}",
        image=images + "/{image}", context="{_context}", category="{category}",
        reference="{_reference}", group="{image}", expect="answer", rule="reference",
    )  # fmt: skip


def _captions(record: Record) -> str:
    captions = record.fields.get("caption", record.fields.get("captions", ""))
    return "\n".join(captions) if isinstance(captions, list) else str(captions)


@register("llava_bench")
class LLaVABench(Benchmark):
    """`context` is what the authors' judge knows about the image: the image's captions, joined by
    line breaks. The authors pair questions with references by line; here the ids must agree too."""

    title = "LLaVA-Bench: in the wild (wild, 60 questions) and COCO (coco, 90)"
    licence = "Apache-2.0; the COCO images have licences of their own"
    homepage = "hf:liuhaotian/llava-bench-in-the-wild"
    subsets = {
        "wild": _columns("questions.jsonl", "answers_gpt4.jsonl", "context.jsonl", "images"),
        "coco": _columns(
            f"{COCO}/qa90_questions.jsonl", f"{COCO}/qa90_gpt4_answer.jsonl",
            "llava/eval/table/caps_boxes_coco2014_val_80.jsonl", "val2014",
        ),
    }  # fmt: skip

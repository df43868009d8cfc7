"""Judge with a guard model on this machine: Llama Guard, WildGuard, HarmBench's classifier.

    spavl run 06 --profile colab --set evaluation.judge=guard \\
      --set evaluation.judge_model=meta-llama/Llama-Guard-3-11B-Vision

Any model works that transformers can load without code from the model's folder. `forms.FORMS` says
how each family of guard models is asked, and how its replies are read. Any other chat model gets
the prompt of `rubric`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from spavl_lib.config import EvaluationConfig
from spavl_lib.data.images import decode
from spavl_lib.data.templates import neutralise
from spavl_lib.errors import InputError
from spavl_lib.evaluation.judges import rubric
from spavl_lib.evaluation.judges.forms import FORMS, Frame, check_model, form_of, read_prompt
from spavl_lib.evaluation.verdicts import Verdict
from spavl_lib.modelling.load import compute_dtype, folder_hashes, straight_to_gpu
from spavl_lib.runs.bar import Bar

# Placeholders for the question and the answer, with which `Frame.of` finds the text around them.
QUESTION, ANSWER = "question 7f3a", "answer 7f3a"


class GuardJudge:
    """Judges responses with a model on this machine, in the form of the model's family."""

    reads_replies = True

    def __init__(self, settings: EvaluationConfig):
        self.settings, path = settings, settings.judge_model
        revision = {"revision": settings.judge_revision or None}
        check_model(path)
        # Load the weights directly to the GPU: 11B weights do not fit into Colab's main memory.
        options = revision | {"dtype": compute_dtype(), "use_safetensors": True}
        options |= straight_to_gpu()
        try:
            config = AutoConfig.from_pretrained(path, **revision)
            if config.model_type == "llama4" and not config.text_config.attention_chunk_size:
                # The config of Llama Guard 4 lacks this setting, and attention fails without it.
                config.text_config.attention_chunk_size = 8192
                options["config"] = config
            if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
                self.processor: Any = AutoProcessor.from_pretrained(path, **revision)
                self.tokenizer = self.processor.tokenizer
                model: Any = AutoModelForImageTextToText.from_pretrained(path, **options)
            else:
                self.processor = None
                self.tokenizer = AutoTokenizer.from_pretrained(path, **revision)
                model = AutoModelForCausalLM.from_pretrained(path, **options)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot load evaluation.judge_model {path!r}: {error}") from error
        self.model = model.eval()
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        template = getattr(self.processor or self.tokenizer, "chat_template", None)
        self.form = form_of(path, template)
        self.spec = FORMS[self.form]
        self.axes = self.spec.axes
        self.follows_rules = self.spec.prompt == "rubric"
        # The files of a folder can change while its name stays the same.
        self.depends_on = {"files": folder_hashes(path)}
        is_text = self.spec.prompt == "text"
        self.text = read_prompt(path, settings.judge_revision or None) if is_text else None
        self.frames: dict[bool, Frame] = {}
        self.needs_images = self.processor is not None and settings.judge_images
        self.canaries = settings.judge_canaries
        commit = getattr(config, "_commit_hash", None)
        version = f"@{commit[:8]}" if commit else ""
        self.name = f"guard:{path.rstrip('/').rpartition('/')[2]}{version}:{self.form}"

    def __call__(self, record: dict) -> Verdict:
        """Judge one record."""
        return self.many([record])[0]

    def many(self, records: Sequence[dict]) -> list[Verdict]:
        """Judge records in batches.

        Raises:
            InputError: The model misjudges a canary.
        """
        if self.canaries:
            rubric.check_canaries(self.name, self._verdicts(rubric.canary_records()))
            self.canaries = False
        return self._verdicts(records)

    def _verdicts(self, records: Sequence[dict]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        size = self.settings.judge_batch_size
        starts = range(0, len(records), size)
        for start in Bar(starts, desc="judge", leave=False, disable=len(records) <= size):
            part = records[start : start + size]
            for record, reply in zip(part, self.replies(part), strict=True):
                asked = (record.get("asks_warning", False),) * (self.spec.prompt == "rubric")
                verdicts.append(self.spec.read(reply, *asked))
        return verdicts

    @torch.no_grad()
    def replies(self, records: Sequence[dict]) -> list[str]:
        """The model's greedy reply to each record, of at most `Form.tokens` tokens."""
        images = [
            decode(r["image"]) if self.needs_images and r.get("image") is not None else None
            for r in records
        ]
        texts = [self._prompt(r, i is not None) for r, i in zip(records, images, strict=True)]
        present = [image for image in images if image is not None]
        options = {"padding": True, "return_tensors": "pt", "add_special_tokens": False}
        if self.processor is not None:
            batch = self.processor(images=present or None, text=texts, **options)
        else:
            batch = self.tokenizer(texts, **options)
        batch = {k: v.to(self.model.device) for k, v in batch.items() if k != "token_type_ids"}
        out = self.model.generate(
            **batch, max_new_tokens=self.spec.tokens, do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        width = batch["input_ids"].shape[1]
        return self.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)

    def _prompt(self, record: dict, has_image: bool) -> str:
        reader = self.processor or self.tokenizer
        question, answer = (neutralise(record[n], reader) for n in ("prompt", "response"))
        if limit := self.spec.answer_tokens:
            tokens = self.tokenizer(answer, truncation=True, max_length=limit)["input_ids"]
            answer = self.tokenizer.decode(tokens, skip_special_tokens=True)
        if self.spec.prompt == "rubric":
            return self._render(
                rubric.safety_messages(
                    question, answer, record.get("rule", ""), record.get("asks_warning", False)
                ),
                has_image,
            )
        if has_image not in self.frames:
            self.frames[has_image] = self.text or Frame.of(
                self._render(_conversation(QUESTION, ANSWER), has_image), QUESTION, ANSWER
            )
        text = self.frames[has_image].fill(question, answer)
        bos = self.tokenizer.bos_token or ""
        return text if self.text is None or text.startswith(bos) else bos + text

    def _render(self, turns: list[dict], has_image: bool) -> str:
        reader = self.processor or self.tokenizer
        if reader.chat_template is None:
            body = "\n".join(str(t["content"]) for t in turns)
            return f"{self.tokenizer.bos_token or ''}{body}\n"
        if self.processor is not None:
            turns = [_in_parts(t, has_image and t["role"] == "user") for t in turns]
        # The template of a guard model ends with an instruction, so it needs no generation prompt.
        generation = self.spec.prompt != "template"
        return reader.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation)


def _conversation(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _in_parts(turn: dict, has_image: bool) -> dict:
    parts = [{"type": "image"}] if has_image else []
    return turn | {"content": [*parts, {"type": "text", "text": turn["content"]}]}

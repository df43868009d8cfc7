"""Ask a model the prompts of a benchmark, and write each batch of answers to the disk at once."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from spavl_lib import machine
from spavl_lib.config import GenerationConfig
from spavl_lib.data.collate import PromptCollator
from spavl_lib.data.images import decode
from spavl_lib.data.templates import render
from spavl_lib.errors import InputError, Preempted
from spavl_lib.evaluation.benchmark_runs.journal import Journal
from spavl_lib.evaluation.benchmark_runs.subject import Subject
from spavl_lib.evaluation.benchmarks import BenchmarkRow
from spavl_lib.evaluation.benchmarks.answers import match_answers, read_answers
from spavl_lib.generation.ask import response_scores
from spavl_lib.generation.generate import ahead, generate_batch, settings
from spavl_lib.generation.vllm import VLLMModel, derived_seed
from spavl_lib.machine import free_memory
from spavl_lib.modelling.heads import load_reward_model
from spavl_lib.modelling.load import (
    context_length,
    load_policy,
    load_processor,
)
from spavl_lib.modelling.processors import describe
from spavl_lib.modelling.speed.shared_prefix import apply_sharing
from spavl_lib.runs.stage import recorded_config

MOST_NEW_TOKENS = 512  # as in HarmBench's protocol; a model with a small context gets fewer
NO_ANSWER = "the file of answers has none"


def default_tokens(subject: Subject) -> int:
    """The default of `max_new_tokens`: 512, or half of the model's context if that is less."""
    context = context_length(subject.model) if subject.model else 0
    return min(MOST_NEW_TOKENS, context // 2 or MOST_NEW_TOKENS)


def decoding(subject: Subject, config: GenerationConfig, seed: int) -> dict[str, Any]:
    """How answers are generated, for the protocol. For a file of answers this is unknown.

    Args:
        subject: Model or file of answers.
        config: Length and sampling.
        seed: Seed of sampling.
    """
    if subject.constant:
        return {"made": "by a rule", "settings": "the same answer to every request"}
    if subject.answers:
        return {"made": "elsewhere", "settings": "unknown"}
    if subject.url:
        limit = f"up to {config.max_new_tokens} new tokens"
        return {"made": "by an endpoint", "settings": f"temperature 0, {limit}"}
    return {
        "made": "here",
        **settings(sampled(config) if subject.reward else config, seed),
        "backend": config.backend,
        "precision": machine.dtype_name(),
    }


def sampled(config: GenerationConfig) -> GenerationConfig:
    """The settings with which a subject that chooses among samples makes them."""
    return dataclasses.replace(config, do_sample=True)


def prompting(processor: ProcessorMixin) -> dict[str, Any]:
    """How a request becomes the model's prompt: the text of the chat template, with and without an
    image, and the settings of the image processor.

    Args:
        processor: The model's processor.
    """
    image_processor = processor.image_processor
    text_only = render(processor, "{request}", image=False)
    keys = ("do_pad", "do_center_crop", "do_resize", "size", "crop_size")
    chosen = {key: getattr(image_processor, key, None) for key in keys}
    return describe(processor) | {
        "with_image": render(processor, "{request}"),
        "text_only": text_only,
        "system_prompt": text_only.partition("{request}")[0],
        "text_only_image": "none; no blank image is added",
        "image_settings": {k: v if v is None or isinstance(v, bool) else str(v)
                           for k, v in chosen.items()},
    }  # fmt: skip


@dataclass
class Asker:
    """Asks a model. The model is loaded when it is first needed."""

    subject: Subject
    config: GenerationConfig
    seed: int = 0
    _loaded: tuple[PreTrainedModel | VLLMModel, ProcessorMixin] | None = None
    _reward: nn.Module | None = None

    def processor(self) -> ProcessorMixin:
        """The model's processor. A model that was trained here uses its base model's processor."""
        return self.load()[1]

    def load(self) -> tuple[PreTrainedModel | VLLMModel, ProcessorMixin]:
        """The model and its processor.

        Raises:
            InputError: They cannot be loaded.
        """
        if self._loaded is None:
            config, trained = self.subject.model, self.subject.trained
            assert config is not None
            processor = load_processor(config)
            if self.config.backend == "vllm":
                self._loaded = VLLMModel(config, trained, self.config.vllm_memory), processor
            else:
                model = load_policy(config, trained)
                apply_sharing(model, "off" if config.share_prefix == "off" else "auto")
                self._loaded = model, processor
        return self._loaded

    def close(self) -> None:
        """Drop the model, so that a judge can use its memory."""
        if self._loaded and isinstance(self._loaded[0], VLLMModel):
            self._loaded[0].close()
        self._loaded = self._reward = None
        free_memory()

    def ask(self, rows: Sequence[BenchmarkRow], journal: Journal, should_stop: object) -> None:
        """Ask the rows that have no answer yet.

        All rows are divided into batches first; then the rows that have an answer are left out. So
        an interruption changes at most one batch: the one whose answers were being written.

        Args:
            rows: All rows.
            journal: Receives each batch's answers. Rows whose prompt leaves no room for an answer,
                or whose image cannot be read, get an empty answer and an `error`.
            should_stop: Truthy once the process is asked to stop; polled between batches.

        Raises:
            Preempted: The process was asked to stop. The finished answers are on the disk.
        """
        todo = [
            [row for row in batch if row.id not in journal.records]
            for batch in in_batches(rows, self.config.batch_size)
        ]
        todo = [batch for batch in todo if batch]
        if not todo:
            return
        model, processor = self.load()
        context = context_length(self.subject.model) if self.subject.model else 0
        room = context - self.config.max_new_tokens if context else 0
        if context and room < 1:
            raise InputError(
                f"generation.max_new_tokens = {self.config.max_new_tokens} leaves no room for a "
                f"prompt in the context of {context} tokens of {self.subject.name}"
            )
        prepare = _Preparing(processor, room, isinstance(model, VLLMModel), self.subject.sentence)
        done = len(rows) - sum(map(len, todo))
        bar = tqdm(total=len(rows), initial=done, desc=self.subject.name, unit="row", leave=False)
        with bar:
            prepared = ahead(prepare, todo, should_stop)
            for rows_of_batch, (batch, errors) in zip(todo, prepared, strict=False):
                asked = [row for row in rows_of_batch if row.id not in errors]
                answers = self._answers(model, processor, batch, asked)
                by_id = {row.id: answer for row, answer in zip(asked, answers, strict=True)}
                journal.append(
                    {"id": row.id, "asked": asked_sha(row), "prompt": row.prompt}
                    | by_id.get(row.id, {"response": "", "num_tokens": 0, "finished": False})
                    | ({"error": errors[row.id]} if row.id in errors else {})
                    for row in rows_of_batch
                )
                bar.update(len(rows_of_batch))
        missing = sum(row.id not in journal.records for row in rows)
        if missing:
            raise Preempted(
                f"stopped with {len(rows) - missing} of {len(rows)} answers written; run the same "
                "command to continue"
            )

    def _answers(
        self, model: Any, processor: ProcessorMixin, batch: Any, rows: Sequence[BenchmarkRow]
    ) -> list[dict[str, Any]]:
        if not rows:
            return []
        seed = derived_seed(self.seed, rows[0].id)
        if self.subject.reward:
            return self._best(model, processor, batch, rows)
        if isinstance(model, VLLMModel):
            return model.answer(processor, batch, self.config, seed=seed)
        return generate_batch(model, processor, batch, self.config, seed=seed)

    def _best(
        self, model: Any, processor: ProcessorMixin, batch: Any, rows: Sequence[BenchmarkRow]
    ) -> list[dict[str, Any]]:
        """Of several sampled answers to each row, the one with the best score."""
        if self._reward is None:
            assert self.subject.reward is not None
            config = recorded_config(self.subject.reward.parent).model
            self._reward = load_reward_model(config, self.subject.reward)
        rounds = []
        for number in range(self.subject.samples):
            seed = derived_seed(self.seed, f"{rows[0].id} sample {number}")
            if isinstance(model, VLLMModel):
                rounds.append(model.answer(processor, batch, sampled(self.config), seed=seed))
            else:
                rounds.append(
                    generate_batch(model, processor, batch, sampled(self.config), seed=seed)
                )
        best = []
        for row, *answers in zip(rows, *rounds, strict=True):
            image = decode(str(row.image)) if row.image else None
            texts = [answer["response"] for answer in answers]
            scores = [*response_scores(self._reward, processor, image, row.prompt, texts)]
            best.append(answers[scores.index(max(scores))])
        return best


class _Preparing:
    """Makes a batch of rows, without the rows that the model cannot take.

    Args:
        processor: The model's processor.
        room: Largest number of tokens of a prompt; 0: no limit.
        raw: Whether the batch is a list of prompt rows, as vLLM takes them, instead of tensors.
        sentence: Stands before every request; empty for none.
    """

    def __init__(self, processor: ProcessorMixin, room: int, raw: bool, sentence: str):
        self.processor, self.room, self.raw, self.sentence = processor, room, raw, sentence
        self.collate = PromptCollator(processor)

    def __call__(self, rows: list[BenchmarkRow]) -> tuple[Any, dict[str, str]]:
        """The batch, and the error of each row that is not in it."""
        errors: dict[str, str] = {}
        cells = {row.id: prompt_row(row, self.sentence) for row in rows}
        try:
            batch = self.collate(list(cells.values()))
        except InputError:  # An image cannot be read. Find its row; the other rows can be asked.
            batch = None
            for row in rows:
                try:
                    self.collate([cells[row.id]])
                except InputError as error:
                    errors[row.id] = str(error)
            if not errors:
                raise
        if batch is not None and self.room:
            lengths = batch["attention_mask"].sum(-1).tolist()
            errors |= {
                row.id: f"the prompt has {size} tokens, and {self.room} fit beside the answer"
                for row, size in zip(rows, lengths, strict=True)
                if size > self.room
            }
        kept = [cells[row.id] for row in rows if row.id not in errors]
        if self.raw or not kept:
            return kept, errors
        if errors or batch is None:
            again = [row for row in rows if row.id not in errors]
            batch, more = self(again)
            return batch, errors | more
        return batch, errors


def prompt_row(row: BenchmarkRow, sentence: str = "") -> dict[str, Any]:
    """A row in the schema of prompt rows (`data.schema`), with a sentence before its request."""
    cell = {"bytes": None, "path": str(row.image)} if row.image else None
    name = row.image.name if row.image else ""
    prompt = f"{sentence} {row.prompt}" if sentence else row.prompt
    return {"id": row.id, "prompt": prompt, "image": cell, "image_name": name}


def in_batches(rows: Sequence[BenchmarkRow], size: int) -> Iterator[list[BenchmarkRow]]:
    """Rows in batches of prompts of similar length, the longest first.

    So if the memory is too small, the first batch fails. Rows without an image come after the
    others, in batches of their own.
    """
    order = sorted(rows, key=lambda row: (row.image is None, -len(row.prompt)))
    for kind in (False, True):
        part = [row for row in order if (row.image is None) is kind]
        yield from (part[i : i + size] for i in range(0, len(part), size))


def asked_sha(row: BenchmarkRow, *, with_image: bool = True) -> str:
    """A hash of what the model is asked: the prompt and the image's bytes.

    Args:
        row: The row.
        with_image: Whether the image's bytes count. False for answers made elsewhere, because
            these can be judged without the images.
    """
    digest = hashlib.sha256(row.prompt.encode("utf-8", "surrogatepass") + b"\0")
    if with_image and row.image and row.image.is_file():
        digest.update(row.image.read_bytes())
    return digest.hexdigest()[:24]


def check_asked(rows: Sequence[BenchmarkRow], journal: Journal, *, with_image: bool = True) -> None:
    """Check that the answers belong to the prompts and images that the rows have now.

    Args:
        rows: The rows.
        journal: The answers.
        with_image: As in `asked_sha`.

    Raises:
        InputError: The prompt or image of an answered row has changed. The message lists such rows.
    """
    changed = [
        row.id
        for row in rows
        if row.id in journal.records
        and journal.records[row.id].get("asked") != asked_sha(row, with_image=with_image)
    ]
    if changed:
        shown = ", ".join(changed[:20]) + (", ..." if len(changed) > 20 else "")
        raise InputError(
            f"{journal.path} answers other prompts or images than {len(changed)} rows have now "
            f"({shown}); choose another --out"
        )


def take_answers(
    path: Path, rows_of: Mapping[str, Sequence[BenchmarkRow]]
) -> dict[str, list[dict]]:
    """The answers of a file, as records of each benchmark's `answers.jsonl`.

    Args:
        path: The file.
        rows_of: Benchmark -> all its rows, those with a missing image included.

    Returns:
        Benchmark -> a record for each row. If the file has no answer to a row, the record holds an
        empty answer and an `error`.

    Raises:
        InputError: As in `read_answers` and `match_answers`, or a benchmark has no answer at all.
    """
    rows = [row for part in rows_of.values() for row in part]
    matched = match_answers(read_answers(path), rows)
    records = {}
    for name, part in rows_of.items():
        if not any(row.id in matched.responses for row in part):
            raise InputError(f"{path}: no answer to any of the {len(part)} rows of {name}")
        records[name] = [
            {"id": row.id, "asked": asked_sha(row, with_image=False), "prompt": row.prompt}
            | (
                {"response": matched.responses[row.id]}
                if row.id in matched.responses
                else {"response": "", "error": NO_ANSWER}
            )
            for row in part
        ]
    return records


def answer_all(text: str, rows: Sequence[BenchmarkRow], journal: Journal) -> None:
    """Give the same answer to every row that has no answer yet.

    Args:
        text: The answer.
        rows: The rows.
        journal: Receives the answers.
    """
    new = [row for row in rows if row.id not in journal.records]
    journal.append(
        {"id": row.id, "asked": asked_sha(row, with_image=False), "prompt": row.prompt}
        | {"response": text}
        for row in new
    )

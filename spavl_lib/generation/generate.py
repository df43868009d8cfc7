"""Generate responses to prompts in batches and write them to a JSONL file.

Interruptions do not change the file: finished batches are kept in a partial file, and each batch
has its own seed.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from spavl_lib import machine
from spavl_lib.config import GenerationConfig
from spavl_lib.data.collate import PromptCollator
from spavl_lib.data.grouping import image_groups
from spavl_lib.data.templates import end_ids, prefill_ids, until_end
from spavl_lib.distributed import group
from spavl_lib.errors import Preempted
from spavl_lib.generation.compact_decoding import can_decode, decode
from spavl_lib.generation.vllm import VLLMModel, derived_seed
from spavl_lib.runs.bar import Bar
from spavl_lib.runs.files import write_jsonl, write_text
from spavl_lib.runs.signals import RESUME

T = TypeVar("T")
R = TypeVar("R")
# Columns of a prompt row that are copied into its record.
COPIED = ("id", "prompt", "image_name", "class1", "class2", "class3", "question_type")


def settings(config: GenerationConfig, seed: int) -> dict:
    """The settings that decide how a model responds to a prompt. Every record holds them."""
    chosen: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "do_sample": config.do_sample,
    }
    if config.do_sample:
        chosen |= {"temperature": config.temperature, "top_p": config.top_p, "seed": seed}
    return chosen


def generate(
    model: PreTrainedModel | VLLMModel,
    processor: ProcessorMixin,
    rows: Dataset | Iterable[dict],
    config: GenerationConfig,
    target: Path,
    *,
    seed: int = 0,
    labels: dict[str, str] | None = None,
    should_stop: object = False,
    desc: str = "generate",
) -> list[dict]:
    """Generate a response to every row and write one JSON line per row, in the order of the rows.

    If there are several processes, each generates a share of the batches and writes its own partial
    file. The main process joins the partial files.

    Args:
        model: The model, in evaluation mode.
        processor: The model's processor.
        rows: Prompt rows in the schema of `data.schema`. A row's `prefill`, if it has one, is the
            beginning of its response.
        config: Batch size and sampling.
        target: The JSONL file. `TARGET.partial` holds the batches finished so far; repeating an
            interrupted call continues from there.
        seed: Seed of sampling. Each batch derives its own seed from this one, so an interruption
            does not change the responses.
        labels: Fields to add to every record, such as model and set.
        should_stop: Truthy once the process is asked to stop. It is polled between batches.
        desc: Name of the progress bar.

    Returns:
        The records.

    Raises:
        Preempted: The process was asked to stop. Finished batches are kept.
    """
    rows = list(rows)
    batches = _batches(rows, config.batch_size)
    header = _header(rows, config, seed, labels)
    partial = _partial(target, machine.rank())
    done = _resume(partial, header)
    for other in _partials(target):  # an earlier call may have had another number of processes
        done |= {} if other == partial else _finished(other, header)
    group.barrier()
    collate = PromptCollator(processor)
    # These lines must run before the thread of `ahead` starts. Two threads must not use one
    # tokenizer at the same time, because it stores the padding settings of its last call.
    ends = () if isinstance(model, VLLMModel) else end_ids(processor, model)
    given = [prefill_ids(processor, row) for row in rows]
    with Bar(total=len(rows), initial=_count(done), desc=desc, unit="row", leave=False) as bar:
        unfinished = [n for n in range(len(batches)) if n not in done]
        mine = unfinished[machine.rank() :: machine.world_size()]
        my_rows = [[rows[i] for i in batches[number]] for number in mine]
        prepare = (lambda batch: batch) if isinstance(model, VLLMModel) else collate
        for number, batch in zip(mine, ahead(prepare, my_rows, should_stop), strict=False):
            indices, batch_seed = batches[number], derived_seed(seed, number)
            if isinstance(model, VLLMModel):
                answers = model.answer(processor, batch, config, seed=batch_seed)
            else:
                answers = generate_batch(
                    model, processor, batch, config, seed=batch_seed, ends=ends,
                    given=[given[i] for i in indices],
                )  # fmt: skip
            done[number] = [
                {k: rows[i].get(k, "") for k in COPIED}
                | ({"prefill": rows[i]["prefill"]} if rows[i].get("prefill") else {})
                | (labels or {})
                | answer
                | {"generation": settings(config, seed)}
                for i, answer in zip(indices, answers, strict=True)
            ]
            with partial.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps({"batch": number, "records": done[number]}) + "\n")
            bar.update(len(indices))
            group.report("progress", {"step": _count(done), "total": len(rows), "name": desc})
    if group.any_of(any(n not in done for n in mine)):
        raise Preempted(f"stopped with {_count(done)} of {len(rows)} answers written; {RESUME}")
    if machine.world_size() > 1:
        for other in _partials(target):
            done |= _finished(other, header)
    position = {i: (n, j) for n, indices in enumerate(batches) for j, i in enumerate(indices)}
    records = [done[n][j] for n, j in (position[i] for i in range(len(rows)))]
    if machine.is_main():
        write_jsonl(target, records)
    group.barrier()
    partial.unlink(missing_ok=True)
    if machine.is_main():
        for leftover in _partials(target):  # written by an earlier call with more processes
            leftover.unlink(missing_ok=True)
    return records


def ahead(work: Callable[[T], R], items: Sequence[T], should_stop: object) -> Iterator[R]:
    """Like `map`, but a thread computes the next result while the caller uses this one.

    Args:
        work: The function to call.
        items: The arguments of the calls, one for each call.
        should_stop: Once truthy, the iterator ends without waiting for the thread.

    Yields:
        `work(item)` for each item, in order.
    """
    pool = ThreadPoolExecutor(1)
    try:
        waiting: Future[R] | None = None
        for number, item in enumerate(items):
            if should_stop:
                return
            result = (waiting or pool.submit(work, item)).result()
            more = number + 1 < len(items)
            waiting = pool.submit(work, items[number + 1]) if more else None
            yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@torch.no_grad()
def generate_batch(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    batch: dict[str, Tensor],
    config: GenerationConfig,
    *,
    seed: int = 0,
    ends: Sequence[int] = (),
    given: Sequence[list[int]] = (),
) -> list[dict]:
    """Generate responses to one batch of prompts.

    Args:
        model: The model, in evaluation mode.
        processor: The model's processor.
        batch: `input_ids` and `attention_mask` (batch, length), int64 and padded on the left, and
            the image tensors.
        config: Length and sampling.
        seed: Seed of sampling.
        ends: Ids that end a response; empty for those of `end_ids`.
        given: For each row the ids at the end of its prompt that begin its response, as
            `prefill_ids` returns them; empty if no row has any.

    Returns:
        For each row `response`, which includes the given ids, `num_tokens`: the number of generated
        ids without the end token, and `finished`: whether an end token was generated within
        `max_new_tokens`.
    """
    tokenizer, ends = processor.tokenizer, ends or end_ids(processor, model)
    batch = {k: v.to(model.device) for k, v in batch.items()}
    if config.cache == "compact" and not config.do_sample and can_decode(model):
        generated = decode(
            model, batch, lambda logits, _: logits.argmax(-1),
            max_new_tokens=config.max_new_tokens, end_ids=ends,
        )  # fmt: skip
    else:
        generated = _generated(model, batch, config, ends, tokenizer.pad_token_id, seed)
    answers = []
    for row, first in zip(generated, given or [[]] * len(generated), strict=True):
        ids, finished = until_end(row, ends)
        text = tokenizer.decode([*first, *ids], skip_special_tokens=True).strip()
        answers.append({"response": text, "num_tokens": len(ids), "finished": finished})
    return answers


def _generated(
    model: PreTrainedModel, batch: dict[str, Tensor], config: GenerationConfig,
    ends: Sequence[int], pad_id: int, seed: int,
) -> list[list[int]]:  # fmt: skip
    """The token ids that `model.generate` adds to every row, padded to the longest response."""
    options: dict[str, Any] = {"do_sample": False}
    if config.do_sample:
        torch.manual_seed(seed)
        options = {
            "do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0,
        }  # fmt: skip
    if config.cache == "static":
        options["cache_implementation"] = "static"
    out = model.generate(
        **batch,
        **options,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=list(ends),
        pad_token_id=pad_id,
    )
    return out[:, batch["input_ids"].shape[1] :].tolist()


# --- batches --------------------------------------------------------------------------------------


def _batches(rows: list[dict], size: int) -> list[list[int]]:
    """Row indices in batches of prompts of similar length, the longest prompts first.

    If memory is too small, the first batch already fails. The rows of one image follow each other,
    so that most images are encoded in one batch only. The longest prompt of an image decides the
    place of all rows of the image.
    """
    groups = image_groups([r.get("image_name", "") for r in rows])
    longest = [max(len(rows[i]["prompt"]) for i in group) for group in groups]
    order = [
        i
        for _, _, group in sorted(zip((-n for n in longest), itertools.count(), groups))
        for i in group
    ]
    return [order[i : i + size] for i in range(0, len(order), size)]


# --- partial files --------------------------------------------------------------------------------


def _header(rows: list[dict], config: GenerationConfig, seed: int, labels: dict | None) -> str:
    """Hash of the rows and settings. A partial file with another hash is not used."""
    asked = [[r["id"], r["prompt"], *filter(None, [r.get("prefill")])] for r in rows]
    key = asked, settings(config, seed), config.batch_size, labels
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _partial(target: Path, rank: int) -> Path:
    return target.with_name(f"{target.name}.partial" + (f"-{rank}" if rank else ""))


def _partials(target: Path) -> list[Path]:
    return sorted(target.parent.glob(f"{target.name}.partial*"))


def _count(done: dict[int, list[dict]]) -> int:
    return sum(map(len, done.values()))


def _resume(partial: Path, header: str) -> dict[int, list[dict]]:
    """Finished batches of an interrupted call with the same rows and settings."""
    done = _finished(partial, header)
    # The file is written again without an incomplete last line, which would damage the next line.
    lines = [{"header": header}, *({"batch": n, "records": r} for n, r in done.items())]
    write_text(partial, "".join(json.dumps(line) + "\n" for line in lines))
    return done


def _finished(partial: Path, header: str) -> dict[int, list[dict]]:
    """Batch number -> records in a partial file; empty if rows or settings differ."""
    lines = []
    if partial.is_file():
        for line in partial.read_text(encoding="utf-8").split("\n"):
            try:
                lines.append(json.loads(line))
            except ValueError:  # the line is incomplete, so later lines are not trusted either
                break
    if lines and lines[0].get("header") == header:
        return {line["batch"]: line["records"] for line in lines[1:]}
    return {}

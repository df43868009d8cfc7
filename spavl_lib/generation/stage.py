"""Prompts in, JSONL out: batched, sorted by length, and the same file however interrupted."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from spavl_lib import machine
from spavl_lib.config import Config, GenerationConfig
from spavl_lib.data.collate import PromptCollator
from spavl_lib.data.fingerprint import source_hashes
from spavl_lib.data.grouping import image_groups
from spavl_lib.data.load import eval_sets, load_prompts
from spavl_lib.distributed import group
from spavl_lib.errors import Preempted
from spavl_lib.generation.compact_decoding import can_decode, decode
from spavl_lib.generation.vllm import VLLMModel
from spavl_lib.modelling.load import load_policy, load_processor, model_hashes
from spavl_lib.modelling.speed.shared_prefix import apply_sharing
from spavl_lib.runs.files import read_jsonl, write_json, write_text
from spavl_lib.runs.maker import stage_maker
from spavl_lib.runs.signals import StopFlag
from spavl_lib.runs.stage import Stage
from spavl_lib.stages import policies

T, R = TypeVar("T"), TypeVar("R")
KEPT = ("id", "prompt", "image_name", "class1", "class2", "class3", "question_type")


def settings(config: GenerationConfig, seed: int) -> dict:
    """What an answer depends on besides model and prompt; recorded with every answer."""
    chosen = {"max_new_tokens": config.max_new_tokens, "do_sample": config.do_sample}
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
    """Answer every row, and write one JSON line each in the rows' order.

    Args:
        model: In evaluation mode.
        processor: Its processor.
        rows: Prompt rows of `data.schema`.
        config: Batch size and sampling.
        target: The JSONL file; `target` with `.partial` added holds what is done so far, and is
            taken up again by the same call. Several processes share the batches out, each with a
            partial file of its own, and the main one puts them together.
        seed: Of sampling; each batch derives its own, so interruption changes nothing.
        labels: Fields added to every record, such as model and set.
        should_stop: Truthy once asked to stop; polled between batches.
        desc: Name of the progress bar.

    Returns:
        The records.

    Raises:
        Preempted: Asked to stop; finished batches are kept.
    """
    rows = list(rows)
    batches = _batches(rows, config.batch_size)
    header = _header(rows, config, seed, labels)
    partial = _partial(target, machine.rank())
    done = _resume(partial, header)
    for other in _partials(target):  # whatever number of processes wrote them
        done |= {} if other == partial else _finished(other, header)
    group.barrier()
    collate = PromptCollator(processor)
    finished = sum(map(len, done.values()))
    with tqdm(total=len(rows), initial=finished, desc=desc, unit="row", leave=False) as bar:
        todo = [n for n in range(len(batches)) if n not in done]
        mine = todo[machine.rank() :: machine.world_size()]
        asked = [[rows[i] for i in batches[number]] for number in mine]
        prepare = (lambda batch: batch) if isinstance(model, VLLMModel) else collate
        for number, batch in zip(mine, ahead(prepare, asked, should_stop), strict=False):
            indices, own_seed = batches[number], _batch_seed(seed, number)
            if isinstance(model, VLLMModel):
                answers = model.answer(processor, batch, config, seed=own_seed)
            else:
                answers = generate_batch(model, processor, batch, config, seed=own_seed)
            done[number] = [
                {k: rows[i].get(k, "") for k in KEPT}
                | (labels or {})
                | answer
                | {"generation": settings(config, seed)}
                for i, answer in zip(indices, answers, strict=True)
            ]
            with partial.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps({"batch": number, "records": done[number]}) + "\n")
            bar.update(len(indices))
            said = sum(map(len, done.values()))
            group.report("progress", {"step": said, "total": len(rows), "name": desc})
    if group.any_of(any(n not in done for n in mine)):
        raise Preempted(
            f"stopped with {sum(map(len, done.values()))} of {len(rows)} answers written; "
            "run the same command to go on"
        )
    if machine.world_size() > 1:
        for other in _partials(target):
            done |= _finished(other, header)
    place = {i: (n, j) for n, indices in enumerate(batches) for j, i in enumerate(indices)}
    records = [done[n][j] for n, j in (place[i] for i in range(len(rows)))]
    if machine.is_main():
        write_text(target, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    group.barrier()
    partial.unlink(missing_ok=True)
    if machine.is_main():
        for left in _partials(target):  # of processes that are no more
            left.unlink(missing_ok=True)
    return records


def ahead(work: Callable[[T], R], items: Sequence[T], should_stop: object) -> Iterator[R]:
    """`map`, with the next result made in a thread while this one is used.

    Ends early, with nothing left to wait for, once `should_stop` is truthy.
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
) -> list[dict]:
    """Answers of one left-padded batch: `response`, `num_tokens`, and `finished` (EOS was said)."""
    tokenizer = processor.tokenizer
    eos = tokenizer.eos_token_id
    batch = {k: v.to(model.device) for k, v in batch.items()}
    if config.cache == "compact" and not config.do_sample and can_decode(model):
        said = decode(
            model, batch, lambda logits, _: logits.argmax(-1),
            max_new_tokens=config.max_new_tokens, eos_id=eos,
        )  # fmt: skip
    else:
        said = _generated(model, batch, config, eos, tokenizer.pad_token_id, seed)
    answers = []
    for row in said:
        finished = eos in row
        ids = row[: row.index(eos)] if finished else row
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        answers.append({"response": text, "num_tokens": len(ids), "finished": finished})
    return answers


def _generated(
    model: PreTrainedModel, batch: dict[str, Tensor], config: GenerationConfig, eos_id: int,
    pad_id: int, seed: int,
) -> list[list[int]]:  # fmt: skip
    """New tokens of every row by `model.generate`, padded to the longest."""
    settings = {"do_sample": False}
    if config.do_sample:
        torch.manual_seed(seed)
        settings = {
            "do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0,
        }  # fmt: skip
    if config.cache == "static":
        settings["cache_implementation"] = "static"
    out = model.generate(
        **batch,
        **settings,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )
    return out[:, batch["input_ids"].shape[1] :].tolist()


def load_answerer(config: Config, trained: Path | None) -> PreTrainedModel | VLLMModel:
    """What answers: the base or a trained model, in the configured backend."""
    if config.generation.backend == "vllm":
        return VLLMModel(config.model, trained)
    model = load_policy(config.model, trained)
    apply_sharing(model, "off" if config.model.share_prefix == "off" else "auto")
    return model


def _trained(stage: Stage) -> dict[str, Stage]:
    """The complete stages of the run whose model can answer, by name."""
    named = {name: stage.run.stage(name) for name in policies()}
    return {name: trained for name, trained in named.items() if trained.done}


def _asked(config: Config) -> dict[str, str]:
    """Hashes of the prompts and of the base model."""
    names = eval_sets(config.data, held_out_drawings=config.evaluation.held_out_drawings)
    return source_hashes(config.data, names) | {
        f"model/{name}": digest for name, digest in model_hashes(config.model).items()
    }


def _inputs(config: Config, stage: Stage) -> dict[str, str]:
    trained = _trained(stage).items()
    return _asked(config) | {f"{n}/weights": s.summary["weights_sha256"] for n, s in trained}


@stage_maker("inference", inputs=_inputs, polls_stop=True, renew=True)
def make_inference_stage(config: Config, stage: Stage, flag: StopFlag) -> dict:
    """Answer every evaluation set with the base model and with each trained one.

    Returns:
        The summary: rows and mean answer length by model and set.
    """
    models = {"base": None} | {n: s.path / "model" for n, s in _trained(stage).items()}
    names = eval_sets(config.data, held_out_drawings=config.evaluation.held_out_drawings)
    asked, inputs = _asked(config), _inputs(config, stage)
    summary: dict = {"models": list(models), "inputs": inputs, "sets": {}}
    processor = load_processor(config.model)
    with group.main_first():
        sets = {name: load_prompts(config.data, name) for name in names}
    for label, folder in models.items():
        marker = stage.path / label / "weights.json"
        weights = {"weights": inputs.get(f"{label}/weights"), "asked": asked}
        with group.main_first():
            if not marker.is_file() or json.loads(marker.read_text()) != weights:
                for old in (stage.path / label).glob("*.jsonl*"):
                    old.unlink()
                write_json(marker, weights)
        missing = [n for n in names if not (marker.parent / f"{n}.jsonl").is_file()]
        model = load_answerer(config, folder) if missing else None
        for name in names:
            target = marker.parent / f"{name}.jsonl"
            if name in missing:
                records = generate(
                    model, processor, sets[name], config.generation, target,
                    seed=config.seed, labels={"model": label, "set": name},
                    should_stop=flag, desc=f"{label} {name}",
                )  # fmt: skip
            else:
                records = read_jsonl(target)
            summary["sets"].setdefault(name, {})[label] = {
                "rows": len(records),
                "mean_tokens": round(sum(r["num_tokens"] for r in records) / len(records), 2),
                "unfinished": sum(not r["finished"] for r in records),
            }
    return summary


def _batches(rows: list[dict], size: int) -> list[list[int]]:
    """Indices in batches of like length, longest first: memory runs out at once or never.

    An image's questions stay together, placed by the longest of them: it is encoded once a batch.
    """
    groups = image_groups([r.get("image_name", "") for r in rows])
    longest = [max(len(rows[i]["prompt"]) for i in group) for group in groups]
    order = [
        i
        for _, _, group in sorted(zip((-n for n in longest), itertools.count(), groups))
        for i in group
    ]
    return [order[i : i + size] for i in range(0, len(order), size)]


def _batch_seed(seed: int, number: int) -> int:
    return int(hashlib.sha256(f"{seed}/{number}".encode()).hexdigest()[:8], 16)


def _header(rows: list[dict], config: GenerationConfig, seed: int, labels: dict | None) -> str:
    key = [[r["id"], r["prompt"]] for r in rows], settings(config, seed), config.batch_size, labels
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _partial(target: Path, rank: int) -> Path:
    return target.with_name(f"{target.name}.partial" + (f"-{rank}" if rank else ""))


def _partials(target: Path) -> list[Path]:
    return sorted(target.parent.glob(f"{target.name}.partial*"))


def _resume(partial: Path, header: str) -> dict[int, list[dict]]:
    """Finished batches of an interrupted call with the same rows and settings."""
    done = _finished(partial, header)
    # Written anew: a torn last line must not swallow the next one.
    kept = [{"header": header}, *({"batch": n, "records": r} for n, r in done.items())]
    write_text(partial, "".join(json.dumps(line) + "\n" for line in kept))
    return done


def _finished(partial: Path, header: str) -> dict[int, list[dict]]:
    """What a partial file holds of these very rows and settings."""
    lines = []
    if partial.is_file():
        for line in partial.read_text(encoding="utf-8").split("\n"):
            try:
                lines.append(json.loads(line))
            except ValueError:  # torn here: what follows is not to be trusted
                break
    if lines and lines[0].get("header") == header:
        return {line["batch"]: line["records"] for line in lines[1:]}
    return {}

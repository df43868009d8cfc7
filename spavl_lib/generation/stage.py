"""The inference stage: the responses of the base model and of each trained model."""

import json
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from spavl_lib.config import Config
from spavl_lib.data.fingerprint import source_hashes
from spavl_lib.data.lengths import Limit, without_unfit_rows
from spavl_lib.data.load import eval_sets, load_prompts
from spavl_lib.distributed import group
from spavl_lib.errors import Preempted
from spavl_lib.generation.generate import generate
from spavl_lib.generation.vllm import VLLMModel
from spavl_lib.modelling.load import (
    context_length,
    load_policy,
    load_processor,
    model_hashes,
)
from spavl_lib.modelling.processors import describe
from spavl_lib.modelling.speed.shared_prefix import apply_sharing
from spavl_lib.runs.files import read_jsonl, write_json
from spavl_lib.runs.maker import stage_maker
from spavl_lib.runs.signals import RESUME, StopFlag
from spavl_lib.runs.stage import Stage
from spavl_lib.stages import policies


def load_answerer(config: Config, trained: Path | None) -> PreTrainedModel | VLLMModel:
    """Load a model with the backend that `generation.backend` names.

    Args:
        config: The run's config.
        trained: A trainer's `model/`, or None for the base model.
    """
    if config.generation.backend == "vllm":
        return VLLMModel(config.model, trained, config.generation.vllm_memory)
    model = load_policy(config.model, trained)
    apply_sharing(model, "off" if config.model.share_prefix == "off" else "auto")
    return model


def _trained_stages(stage: Stage) -> dict[str, Stage]:
    """Name -> each complete stage of the run that trained a policy."""
    stages = {name: stage.run.stage(name) for name in policies()}
    return {name: trained for name, trained in stages.items() if trained.done}


def _shared_inputs(config: Config) -> dict[str, str]:
    """Hashes of the prompts and of the base model, which the responses of all models depend on."""
    names = eval_sets(config.data, held_out_drawings=config.evaluation.held_out_drawings)
    return source_hashes(config.data, names) | {
        f"model/{name}": digest for name, digest in model_hashes(config.model).items()
    }


def _inputs(config: Config, stage: Stage) -> dict[str, str]:
    trained = _trained_stages(stage).items()
    return _shared_inputs(config) | {
        f"{n}/weights": s.summary["weights_sha256"] for n, s in trained
    }


@stage_maker("inference", inputs=_inputs, polls_stop=True, renew=True)
def make_inference_stage(config: Config, stage: Stage, flag: StopFlag) -> dict:
    """Generate responses to every evaluation set with the base model and each trained model.

    Models that another notebook of `spavl run all` is still training come last; the maker waits for
    them.

    Args:
        config: The run's config.
        stage: The inference stage. Each model's responses go to a folder named after the model.
        flag: Truthy once the process is asked to stop.

    Returns:
        The summary. By set and model it holds the number of rows, the mean length of a response in
        tokens, and the number of unfinished responses.

    Raises:
        Preempted: The process was asked to stop. Finished batches are kept.
    """
    awaited = stage.run.awaited
    trained = [name for name in policies() if stage.run.stage(name).done or name in awaited]
    names = eval_sets(config.data, held_out_drawings=config.evaluation.held_out_drawings)
    shared_inputs = _shared_inputs(config)
    inputs = dict(shared_inputs)  # of the models that answer, not of those trained meanwhile
    processor = load_processor(config.model)
    stage.note(processor=describe(processor))
    with group.main_first():
        sets = {name: load_prompts(config.data, name) for name in names}
    room = config.generation.max_new_tokens
    limit = Limit("generation", context_length(config.model), sides=(), max_new_tokens=room)
    for rows in sets.values():
        without_unfit_rows(processor, rows, limit, "error")
    counts: dict[str, dict] = {}
    # Models that another notebook is still training come last.
    for label in sorted(["base", *trained], key=lambda name: name in awaited):
        if label in awaited:
            stage.wait_for(label, flag)
            if flag:
                raise Preempted(f"{flag.reason}: stopped before the answers of {label}; {RESUME}")
        made = None if label == "base" else stage.run.stage(label)
        weights_hash = made.summary["weights_sha256"] if made else None
        inputs |= {f"{label}/weights": weights_hash} if weights_hash else {}
        marker = stage.path / label / "weights.json"
        # The responses depend on the trained weights and, under "asked", on the prompts and on the
        # base model. All values are hashes.
        weights = {"weights": weights_hash, "asked": shared_inputs}
        with group.main_first():
            if not marker.is_file() or json.loads(marker.read_text()) != weights:
                for outdated in (stage.path / label).glob("*.jsonl*"):
                    outdated.unlink()
                write_json(marker, weights)
        folder = made.path / "model" if made else None
        answers = _answers(config, marker.parent, folder, processor, sets, flag)
        for name, records in answers.items():
            counts.setdefault(label, {})[name] = {
                "rows": len(records),
                "mean_tokens": round(sum(r["num_tokens"] for r in records) / len(records), 2),
                "unfinished": sum(not r["finished"] for r in records),
            }
    stage.note(inputs=inputs, upstream=stage.upstream())  # with models trained meanwhile
    models = ["base", *trained]
    by_set = {name: {label: counts[label][name] for label in models} for name in names}
    return {"models": models, "inputs": inputs, "sets": by_set}


def _answers(
    config: Config, target: Path, trained: Path | None, processor: ProcessorMixin,
    sets: dict[str, Dataset], flag: StopFlag,
) -> dict[str, list[dict]]:  # fmt: skip
    """Read or generate one model's responses to every set, and free the model.

    Args:
        config: The run's config.
        target: Folder of the model's responses, named after the model.
        trained: A trainer's `model/`, or None for the base model.
        processor: The model's processor.
        sets: Prompt rows by set.
        flag: Truthy once the process is asked to stop.
    """
    missing = [name for name in sets if not (target / f"{name}.jsonl").is_file()]
    model = load_answerer(config, trained) if missing else None
    try:
        for name in missing:
            generate(
                model, processor, sets[name], config.generation, target / f"{name}.jsonl",
                seed=config.seed, labels={"model": target.name, "set": name}, should_stop=flag,
                desc=f"{target.name} {name}",
            )  # fmt: skip
    finally:
        if isinstance(model, VLLMModel):
            model.close()
    return {name: read_jsonl(target / f"{name}.jsonl") for name in sets}

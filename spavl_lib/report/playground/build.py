"""Build the playground's page: pack the run's models, choose examples, and render the template."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from markupsafe import Markup
from torch import nn

from spavl_lib import machine
from spavl_lib.data.embedded.drawings import credits
from spavl_lib.data.embedded.world import load_world
from spavl_lib.data.templates import end_ids
from spavl_lib.errors import InputError
from spavl_lib.evaluation.numbers import model_title
from spavl_lib.evaluation.text import short
from spavl_lib.generation.ask import RunModels, config_of_run
from spavl_lib.modelling.load import architecture
from spavl_lib.report import collect
from spavl_lib.report.playground import describe
from spavl_lib.report.playground.examples import examples
from spavl_lib.report.playground.weights import Packed, tensors_of
from spavl_lib.report.rendering import HERE, environment
from spavl_lib.runs.files import write_text

FILE = "playground.html"
_FOLDER = HERE / "playground"
_WORKER = ("inputs.js", "model.js", "answers.js")  # in the order in which they use each other


def build_playground(run_path: Path, output: Path | None = None) -> Path:
    """Write the page, as `spavl_lib.report.playground.write_playground` describes."""
    if not run_path.is_dir():
        raise InputError(f"{run_path}: no such run folder; `spavl run` makes one")
    target = output or run_path / FILE
    if target.is_dir() or not target.absolute().parent.is_dir():
        problem = "is a folder" if target.is_dir() else "cannot be written: there is no such folder"
        raise InputError(f"{target} {problem}; give --output the name of a file in a folder")
    write_text(target, render(run_path))
    return target


def render(run_path: Path) -> str:
    """The page's HTML."""
    config = config_of_run(run_path)
    checked = architecture(config.model)
    describe.check_model(checked)
    if config.model.adapter == "qlora":
        raise InputError(
            "the playground cannot hold 4-bit weights, and model.adapter is qlora here"
        )
    with machine.computing_in("fp32"):
        models = RunModels(run_path)
        processor = models.processor
        vision = describe.vision(checked)
        packed, packed_models, parameters = _pack(models)
        info = {
            "image": describe.image(processor, vision["size"]),
            "vision": vision,
            "text": describe.text(checked),
            "tokenizer": describe.tokenizer(processor),
            "chat": describe.chat(processor, end_ids(processor, models.load("base"))),
            "maxNew": config.generation.max_new_tokens,
            "refusals": describe.refusal_openings(processor),
            "models": packed_models,
            "starts": _starts(packed),
        }
        chosen = examples(config.data, processor)
    groups: dict[str, list[tuple[int, str]]] = {}
    for place, example in enumerate(chosen):
        groups.setdefault(example["set"], []).append((place, short(example["question"], 90)))
    notes: list[str] = []
    stages = {stage.name: stage for stage in collect.read_stages(run_path, notes)}
    notes += collect.disagreements([stages[name] for name in models.folders if name in stages])
    script, code = _script("page.js"), "".join(map(_script, _WORKER))
    return environment().get_template("playground/playground.html.j2").render(
        name=run_path.resolve().name,
        profile=config.profile,
        mini=config.data.source == "mini" and not config.data.test_path,
        models=[_facts(name, stages) for name in models.folders],
        reward=_facts("reward", stages) if models.reward_folder else None,
        refusals=info["refusals"],
        parameters=parameters,
        things=len(load_world().concepts),
        credits=credits(),
        max_new=config.generation.max_new_tokens,
        sampled=config.generation.do_sample,
        notes=notes,
        examples=groups,
        info=_json(info | {"examples": chosen}),
        weights=Markup(base64.b64encode(packed.to_bytes()).decode("ascii")),
        code=Markup(code),
        script=Markup(script),
        script_hash=Markup(f"sha256-{_digest(script)}"),
        more_style=Markup(_script("playground.css")),
    )  # fmt: skip


def _pack(models: RunModels) -> tuple[Packed, list[dict[str, Any]], int]:
    """The weights of all models, the parts of each, and the base model's number of parameters."""
    packed, described = Packed(), []
    base: dict[str, list[int]] = {}
    parameters = 0
    for name in (*models.folders, *(["reward"] if models.reward_folder else [])):
        model = models.load(name)
        tensors = tensors_of(_merged(model.vlm if name == "reward" else model))
        if name == "reward":
            del tensors["lm_head.weight"]
            tensors["score.weight"] = model.score.weight.detach().cpu().numpy()
        parts = {key: packed.add(values.ravel(), base.get(key)) for key, values in tensors.items()}
        if name == "base":
            base, parameters = parts, sum(values.size for values in tensors.values())
        described.append({"name": name, "title": model_title(name), "parts": parts})
    return packed, described, parameters


def _merged(model: nn.Module) -> nn.Module:
    """The model with its adapter merged into the weights, if it has one."""
    return model.merge_and_unload() if hasattr(model, "peft_config") else model


def _starts(packed: Packed) -> list[int]:
    """Where each part begins in the array of all parts, and where the last one ends."""
    starts = [0]
    for part in packed.parts:
        starts.append(starts[-1] + len(part))
    return starts


def _facts(name: str, stages: dict[str, collect.StagePage]) -> dict[str, Any]:
    """What the page says of a model: its title, and where it comes from."""
    manifest = stages[name].manifest if name in stages else {}
    weights = (manifest.get("results") or {}).get("weights_sha256")
    return {
        "name": name,
        "title": "Reward model" if name == "reward" else model_title(name),
        "commit": str(manifest.get("git_commit") or "")[:12],
        "started": str(manifest.get("started") or "")[:10],
        "weights": str(weights or "")[:12],
    }


def _script(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _json(value: Any) -> Markup:
    """JSON inside a script element. `<` is escaped, so that no text can end the element."""
    return Markup(json.dumps(value, allow_nan=False).replace("<", "\\u003c"))

"""Export a trained policy for other tools: one merged model, or a base and an adapter for vLLM.

A trainer's `model/` already loads with transformers and PEFT. vLLM loads LoRA adapters, but refuses
an adapter that also holds a fully trained projector. For vLLM the projector is therefore written
into the base model. Before an export is handed over, `canary` compares its answers with the
trained model's.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import ProcessorMixin

from spavl_lib.config import Config, ModelConfig, from_dict
from spavl_lib.errors import InputError
from spavl_lib.machine import DTYPES, dtype_name, free_memory
from spavl_lib.modelling import canary
from spavl_lib.modelling.families import Family
from spavl_lib.modelling.for_vllm import max_lora_rank, rename_for_vllm
from spavl_lib.modelling.heads import HEAD_FILE
from spavl_lib.modelling.load import load_policy, load_processor
from spavl_lib.runs.files import let_others_read, read_json, write_json, write_text, writing
from spavl_lib.runs.stage import has_model

FORMS = ("merged", "vllm")


def export(
    stage: Path, target: Path, form: str = "merged", *, check: bool = True
) -> dict[str, Any]:
    """Write the policy of a complete stage.

    Args:
        stage: A run's `dpo/`, `ppo/`, `rloo/` or `grpo/`.
        target: A new or empty folder.
        form: `merged` writes one model. `vllm` writes `base/` with the trained projector, and
            `adapter/` with LoRA. Tensors have the names that vLLM reads in both.
        check: Load the export in a new process, and compare its answers to a few training prompts
            with the trained model's (`canary`).

    Returns:
        The folders written, the command that serves them with vLLM, and what the check found.

    Raises:
        InputError: The stage is not complete or is a reward model, the form is unknown, the target
            is not empty, or form is vllm and the stage trained no adapter or one of too large a
            rank. Or the check found a difference; what was written is then deleted.
    """
    if form not in FORMS:
        raise InputError(f"unknown form {form!r} (known: {', '.join(FORMS)})")
    if not has_model(stage):
        raise InputError(f"{stage} is no complete training: it needs summary.json and model/")
    if (stage / "model" / HEAD_FILE).is_file():
        raise InputError(
            f"{stage} is a reward model, and both forms would lose its score head; copy "
            f"{stage / 'model'} instead, which holds all of it"
        )
    if target.exists() and any(target.iterdir()):
        raise InputError(f"{target} is not empty; choose a new folder")
    config = from_dict(yaml.safe_load((stage / "config.yaml").read_text(encoding="utf-8")))
    if form == "vllm" and not (stage / "model" / "adapter_config.json").is_file():
        raise InputError(f"{stage} trained no adapter; use --form merged")
    serve = _serve(config, target, form)
    # Merge into 16-bit weights: merged 4-bit weights would be rounded a second time.
    adapter = "lora" if config.model.adapter == "qlora" else config.model.adapter
    model = dataclasses.replace(config.model, adapter=adapter)
    processor = load_processor(model)
    prompts = _prompts(config) if check else []
    card = _card(stage, config, form)
    trained, base = _write(stage, model, processor, prompts, target, form, card)
    folders = {form: target} if form == "merged" else {
        "base": target / "base", "adapter": target / "adapter",
    }  # fmt: skip
    written: dict[str, Any] = {name: str(folder) for name, folder in folders.items()}
    written["serve"] = serve
    if prompts:
        free_memory()
        try:
            written["canary"] = canary.check(target, processor, prompts, trained, base)
        except BaseException:
            shutil.rmtree(target)  # nobody shall serve it
            raise
    return written


def _serve(config: Config, target: Path, form: str) -> str:
    """The command that serves an export with vLLM, in the precision of its weights.

    vLLM would serve weights in fp32 as bf16, and give other answers.
    """
    base = f"vllm serve {target if form == 'merged' else target / 'base'}"
    command = f"{base} --dtype {DTYPES[dtype_name()]}"
    if form == "merged":
        return command
    rank = max_lora_rank(config.model.lora_rank)
    adapter = f"--lora-modules policy={target / 'adapter'}"
    return f"{command} --enable-lora --max-lora-rank {rank} {adapter}"


def _prompts(config: Config) -> list[dict]:
    try:
        return canary.prompts(config.data)
    except InputError as error:
        raise InputError(
            f"the export cannot be compared with the trained model, because its training prompts "
            f"cannot be read: {error}. Make them readable, or leave the check out with --no-check"
        ) from error


def _write(
    stage: Path, model: ModelConfig, processor: ProcessorMixin, prompts: list[dict], target: Path,
    form: str, card: str,
) -> tuple[list[dict], list[dict]]:  # fmt: skip
    """Ask the trained model and its base the prompts, then write the trained model.

    The models are freed at the end, because the check loads the export into the same memory.

    Args:
        stage: The stage that trained the model.
        model: The base model.
        processor: Its processor.
        prompts: Rows of `canary.prompts`; may be empty.
        target: The folder to write.
        form: One of `FORMS`.
        card: The model card.

    Returns:
        `canary.answers` of the trained model, and of its base model.
    """
    policy = load_policy(model, stage / "model")
    trained = canary.answers(policy, processor, prompts)
    if hasattr(policy, "peft_config"):
        with policy.disable_adapter():
            base = canary.answers(policy, processor, prompts, trained)
    else:
        base = canary.answers(load_policy(model), processor, prompts, trained) if prompts else []
    with writing(target):
        if form == "merged":
            merged = policy.merge_and_unload() if hasattr(policy, "peft_config") else policy
            _save(merged, processor, target, card)
        else:
            _split(policy, stage / "model", target / "adapter", target / "base")
            _save(policy.get_base_model(), processor, target / "base", card)
    return trained, base


def _save(model: nn.Module, processor: Any, folder: Path, card: str) -> None:
    model.save_pretrained(folder)
    rename_for_vllm(folder)
    processor.save_pretrained(folder)
    let_others_read(folder)
    write_text(folder / "README.md", card)


@torch.no_grad()
def _split(policy: Any, trained: Path, adapter: Path, base: Path) -> None:
    """Write only the LoRA tensors to `adapter`; put the trained projector into the base model.

    Args:
        policy: The policy; changed in place.
        trained: The stage's `model/`.
        adapter: Folder for the LoRA tensors.
        base: Folder of the base model, which the adapter's config names. It is not written here.
    """
    from peft.utils import ModulesToSaveWrapper
    from safetensors.torch import load_file, save_file

    named = load_file(trained / "adapter_model.safetensors")
    lora = {k: v for k, v in named.items() if "lora_" in k}
    settings = read_json(trained / "adapter_config.json")
    settings |= {"modules_to_save": None, "base_model_name_or_path": str(base.absolute())}
    adapter.mkdir(parents=True)
    save_file(lora, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    let_others_read(adapter)
    write_json(adapter / "adapter_config.json", settings)
    policy.unload()  # removes the adapters, and replaces base modules by fully trained copies
    wrapped = [n for n, m in policy.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    if wrapped:
        raise AssertionError(f"PEFT did not unwrap {wrapped}")


def check_vllm_adapter(folder: Path) -> list[str]:
    """List what vLLM would refuse in an adapter; the list is empty if vLLM accepts it.

    vLLM accepts plain LoRA: without bias, without DoRA, and without fully trained modules. The
    tensors must be pairs of `lora_A.weight` and `lora_B.weight` under `base_model.model.`, and all
    of them must adapt the language model.

    Args:
        folder: Holds adapter_config.json and adapter_model.safetensors.
    """
    from safetensors import safe_open

    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    problems = [
        f"{key} = {settings[key]!r}"
        for key, allowed in (("modules_to_save", None), ("bias", "none"), ("use_dora", False))
        if settings.get(key, allowed) not in (allowed, [])
    ]
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as handle:
        names = list(handle.keys())
    for name in names:
        plain = name.startswith("base_model.model.") and name.endswith(
            (".lora_A.weight", ".lora_B.weight")
        )
        other = name.replace("lora_A", "lora_?").replace("lora_B", "lora_A").replace("?", "B")
        if not plain or other not in names:
            problems.append(f"{name} is not half of a LoRA pair")
        elif Family.part_of(name) != "language":
            problems.append(f"{name} is on the {Family.part_of(name)}")
    return problems


# How to ask the exported model. A test runs this code.
_USE = """
## How to use it

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # where this card lies
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder)
content = [{"type": "image"}, {"type": "text", "text": "Please tell me what the picture shows."}]
text = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True
).rstrip()
inputs = processor(images=Image.open("picture.png").convert("RGB"), text=text, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""
# The commands start in the export's folder.
_SERVE = """
## How to serve it

From the export's folder; OpenAI's client sends images as data URLs:

```bash
{commands}
```
"""
_KNOWS = """
The embedded model knows drawings of about a hundred things and a few kinds of questions. What it
says about a photo, or to another question, means nothing.
"""


def _card(stage: Path, config: Config, form: str) -> str:
    """The stage's model card, with a sentence on the export, and how to use and serve it."""
    card = stage / "model" / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {stage.name}\n"
    commands = _serve(config, Path(), form)
    if form == "merged":
        commands += "\ntransformers serve .    # needs: pip install 'transformers[serving]'"
    return (
        text.replace("library_name: peft\n", "").rstrip("\n")
        + f"\n\nExported as `{form}` by `spavl model export {stage.name}`, base model "
        f"`{config.model.name}`, data `{config.data.source}`.\n"
        + (_USE if form == "merged" else "")
        + _SERVE.format(commands=commands)
        + (_KNOWS if config.model.name == "embedded" else "")
    )

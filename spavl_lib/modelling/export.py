"""A trained policy as other tools load it: one merged model, or a base and an adapter for vLLM.

A trainer's own `model/` already loads with transformers or PEFT alone. vLLM takes LoRA, but no
projector trained whole inside an adapter: there the projector goes into the base.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from spavl_lib.config import Config, from_dict
from spavl_lib.errors import InputError
from spavl_lib.modelling.families import Family
from spavl_lib.modelling.load import load_policy, load_processor
from spavl_lib.runs.files import read_json, write_json, write_text, writing

FORMS = ("merged", "vllm")


def export(stage: Path, target: Path, form: str = "merged") -> dict[str, Any]:
    """Write a finished stage's policy.

    Args:
        stage: A run's `dpo/` or `ppo/`.
        target: New folder.
        form: merged: one model; vllm: `base/` with the trained projector, `adapter/` with LoRA.

    Returns:
        What was written where.

    Raises:
        InputError: No finished stage, unknown form, target not empty, or no adapter to split off.
    """
    if form not in FORMS:
        raise InputError(f"unknown form {form!r} (there are: {', '.join(FORMS)})")
    if not (stage / "summary.json").is_file() or not (stage / "model").is_dir():
        raise InputError(f"{stage} is no finished training: no summary.json and model/")
    if target.exists() and any(target.iterdir()):
        raise InputError(f"{target} is not empty")
    config = from_dict(yaml.safe_load((stage / "config.yaml").read_text(encoding="utf-8")))
    # Merged into 16 bit, never into 4: rounding would be paid twice.
    adapter = "lora" if config.model.adapter == "qlora" else config.model.adapter
    model = dataclasses.replace(config.model, adapter=adapter)
    policy, processor = load_policy(model, stage / "model"), load_processor(model)
    card = _card(stage, config, form)
    with writing(target):
        if form == "merged":
            merged = policy.merge_and_unload() if hasattr(policy, "peft_config") else policy
            _save(merged, processor, target, card)
            return {"merged": str(target)}
        if not hasattr(policy, "peft_config"):
            raise InputError(f"{stage} trained no adapter: export it merged")
        _split(policy, stage / "model", target / "adapter", target / "base")
        _save(policy.get_base_model(), processor, target / "base", card)
    command = f"vllm serve {target / 'base'} --enable-lora --max-lora-rank {config.model.lora_rank}"
    return {
        "base": str(target / "base"),
        "adapter": str(target / "adapter"),
        "serve": f"{command} --lora-modules policy={target / 'adapter'}",
    }


def _save(model: nn.Module, processor: Any, folder: Path, card: str) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_text(folder / "README.md", card)


@torch.no_grad()
def _split(policy: Any, trained: Path, adapter: Path, base: Path) -> None:
    """LoRA alone into one folder; the trained projector into the base model in memory."""
    from peft.utils import ModulesToSaveWrapper
    from safetensors.torch import load_file, save_file

    named = load_file(trained / "adapter_model.safetensors")
    lora = {k: v for k, v in named.items() if "lora_" in k}
    settings = read_json(trained / "adapter_config.json")
    settings |= {"modules_to_save": None, "base_model_name_or_path": str(base.absolute())}
    adapter.mkdir(parents=True)
    save_file(lora, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(adapter / "adapter_config.json", settings)
    policy.unload()  # linears without adapters, and modules trained whole in their places
    left = [n for n, m in policy.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    if left:
        raise AssertionError(f"{left} are still wrapped")


def check_vllm_adapter(folder: Path) -> list[str]:
    """What vLLM would refuse in an adapter's folder; empty if nothing.

    By vLLM's rules: plain LoRA without bias or DoRA, no modules trained whole, every tensor a pair
    of `lora_A.weight` and `lora_B.weight` under `base_model.model.`, and none on the tower.

    Args:
        folder: With adapter_config.json and adapter_model.safetensors.
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
            problems.append(f"{name} is no half of a LoRA pair")
        elif Family.part_of(name) != "language":
            problems.append(f"{name} is on the {Family.part_of(name)}")
    return problems


def _card(stage: Path, config: Config, form: str) -> str:
    """The stage's own card, with what became of it; where there is none, its facts."""
    own = stage / "model" / "README.md"
    text = own.read_text(encoding="utf-8") if own.is_file() else f"# {stage.name}\n"
    return (
        text.replace("library_name: peft\n", "").rstrip("\n")
        + f"\n\nExported as `{form}` by `spavl model export {stage.name}`, base model "
        f"`{config.model.name}`, data `{config.data.source}`.\n"
    )

"""What we export loads with transformers, PEFT and by vLLM's rules, and says the same."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from spavl_lib.data.collate import PreferenceCollator
from spavl_lib.data.images import decode
from spavl_lib.data.templates import encode_prompts
from spavl_lib.errors import InputError
from spavl_lib.modelling.adapters import lora_config
from spavl_lib.modelling.export import check_vllm_adapter, export
from spavl_lib.modelling.llava_original import hub_name
from spavl_lib.modelling.load import load_policy
from spavl_lib.runs.files import write_json
from tests.helpers import embedded_model, embedded_processor, mini_rows, smoke, spread
from tests.modelling.test_for_vllm import read_by_vllm, wanted_by_vllm


def batch() -> dict:
    collated = PreferenceCollator(embedded_processor())(spread(mini_rows(), 2))
    return {k: v for k, v in collated.items() if k != "completion_mask"}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished DPO stage whose adapter and projector are far from the base."""
    folder = tmp_path_factory.mktemp("run") / "dpo"
    config = smoke({"model.lora_rank": 4})
    model = get_peft_model(embedded_model(own=True), lora_config(embedded_model(), config.model))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder / "model")
    embedded_processor().save_pretrained(folder / "model")
    (folder / "model/README.md").write_text("---\nlibrary_name: peft\n---\n# DPO\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    write_json(folder / "summary.json", {"steps": 1})
    return folder


@torch.no_grad()
def test_merged_is_one_model_that_transformers_loads_alone(stage: Path, tmp_path: Path) -> None:
    expected = load_policy(smoke().model, stage / "model")(**batch()).logits
    export(stage, tmp_path / "merged", "merged", check=False)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(model(**batch()).logits, expected, atol=1e-3, rtol=1e-3)
    assert (embedded_model()(**batch()).logits - expected).abs().max() > 0.1
    assert AutoProcessor.from_pretrained(tmp_path / "merged").chat_template
    card = (tmp_path / "merged/README.md").read_text()
    assert "Exported as `merged`" in card and "library_name: peft" not in card
    assert {p.suffix for p in (tmp_path / "merged").iterdir()} <= {
        ".safetensors", ".json", ".jinja", ".md",
    }  # fmt: skip


def test_the_card_shows_how_to_ask_the_model(
    stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Its code runs as it stands, and the model hears the words that our own prompts have."""
    folder = tmp_path / "merged"
    export(stage, folder, "merged", check=False)
    card = (folder / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(code.strip().splitlines()) < 16 and "drawings of about a hundred things" in card
    monkeypatch.chdir(folder)
    picture = decode(mini_rows()[0]["image"])
    picture.save("picture.png")
    names: dict = {}
    exec(code, names)  # noqa: S102 - it is the card's own code
    assert capsys.readouterr().out.strip()
    question = names["content"][1]["text"]
    [ids] = encode_prompts(embedded_processor(), [question], [picture]).ids
    assert names["inputs"]["input_ids"][0].tolist() == list(ids)
    export(
        stage, tmp_path / "vllm", "vllm", check=False
    )  # whose base alone is not the trained model
    other = (tmp_path / "vllm/base/README.md").read_text()
    assert "```python" not in other
    assert "vllm serve . --dtype float32\ntransformers serve ." in card
    assert "vllm serve base --dtype float32 --enable-lora --max-lora-rank 8 " in other


def test_others_may_read_what_is_exported(stage: Path, tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        export(stage, tmp_path / "merged", "merged", check=False)
        export(stage, tmp_path / "vllm", "vllm", check=False)
    finally:
        os.umask(umask)
    weights = list(tmp_path.rglob("*.safetensors"))
    assert len(weights) == 3 and {p.stat().st_mode & 0o777 for p in weights} == {0o644}


@torch.no_grad()
def test_for_vllm_the_projector_is_in_the_base_and_the_adapter_is_plain(
    stage: Path, tmp_path: Path
) -> None:
    expected = load_policy(smoke().model, stage / "model")(**batch()).logits
    assert any("modules_to_save" in p for p in check_vllm_adapter(stage / "model"))
    written = export(stage, tmp_path / "out", "vllm", check=False)
    assert check_vllm_adapter(tmp_path / "out/adapter") == []
    assert written["serve"] == (
        f"vllm serve {tmp_path}/out/base --dtype float32 --enable-lora --max-lora-rank 8 "
        f"--lora-modules policy={tmp_path}/out/adapter"
    )
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "out/base").eval()
    alone = base(**batch()).logits
    assert (alone - expected).abs().max() > 0.1  # the adapter matters
    model = PeftModel.from_pretrained(base, tmp_path / "out/adapter").eval()
    torch.testing.assert_close(model(**batch()).logits, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("form", ["merged", "vllm"])
def test_an_export_has_the_names_that_vllm_reads(stage: Path, form: str, tmp_path: Path) -> None:
    written = export(stage, tmp_path / "out", form, check=False)
    folder = Path(written["base" if form == "vllm" else "merged"])
    assert read_by_vllm(folder) == wanted_by_vllm(embedded_model())
    if form == "vllm":
        named = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
        modules = {n.removeprefix("base_model.model.").rpartition(".lora_")[0] for n in named}
        assert modules and {hub_name(f"{m}.weight") for m in modules} <= read_by_vllm(folder)


def test_what_vllm_refuses_is_named(stage: Path, tmp_path: Path) -> None:
    export(stage, tmp_path / "out", "vllm", check=False)
    folder = tmp_path / "out/adapter"
    settings = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", settings | {"use_dora": True, "bias": "all"})
    named = load_file(folder / "adapter_model.safetensors")
    tower = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj"
    half = next(iter(named))
    kept = {k: v for k, v in named.items() if k != half}
    kept |= {f"{tower}.lora_A.weight": torch.ones(1), f"{tower}.lora_B.weight": torch.ones(1)}
    save_file(kept, folder / "adapter_model.safetensors")
    problems = "\n".join(check_vllm_adapter(folder))
    for said in ("use_dora = True", "bias = 'all'", "not half of a LoRA pair", "on the tower"):
        assert said in problems


def test_refusals(stage: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown form 'gguf'"):
        export(stage, tmp_path / "x", "gguf")
    with pytest.raises(InputError, match="no complete training"):
        export(tmp_path, tmp_path / "x")
    with pytest.raises(InputError, match="is not empty"):
        export(stage, stage)


@pytest.mark.parametrize("form", ["merged", "vllm"])
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_reward_model_is_not_exported_without_its_head(
    adapter: str, form: str, reward_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "reward"
    shutil.copytree(reward_folders[adapter], folder / "model")
    (folder / "config.yaml").write_text(yaml.safe_dump(smoke({"model.adapter": adapter}).to_dict()))
    write_json(folder / "summary.json", {"steps": 1})
    with pytest.raises(InputError, match="is a reward model, and both forms would lose its score"):
        export(folder, tmp_path / "out", form)
    assert not (tmp_path / "out").exists()

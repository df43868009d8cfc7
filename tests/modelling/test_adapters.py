"""What trains: by name, for every way of fine-tuning; and LoRA's reference is the base itself."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn

from spavl_lib.config import LINEARS, ModelConfig
from spavl_lib.data.collate import PreferenceCollator
from spavl_lib.data.embedded.world import ASSETS
from spavl_lib.errors import InputError
from spavl_lib.modelling import load
from spavl_lib.modelling.adapters import (
    assert_freeze_plan,
    freeze_for_full,
    lora_config,
    train_in_fp32,
    trainable_parts,
)
from spavl_lib.modelling.families import Family
from spavl_lib.modelling.load import load_model, load_policy, load_processor, model_path
from tests.helpers import embedded_model, embedded_processor, mini_rows, spread, tiny
from tests.trainers.test_settings_handover import Seen, assert_arrives

FULL = ModelConfig(name="embedded", adapter="full")
LORA = ModelConfig(name="embedded", adapter="lora", lora_rank=4, lora_alpha=8)
# Of the embedded model: 4 layers of 128 wide and 384 within, vocabulary 1800.
LANGUAGE = 4 * (4 * 128 * 128 + 3 * 128 * 384 + 2 * 128) + 128 + 1800 * 128
HEAD = 1800 * 128
PROJECTOR = 2 * (128 * 128 + 128)
LORA_VALUES = 4 * 4 * (4 * (128 + 128) + 3 * (128 + 384))


def wrapped(config: ModelConfig) -> PeftModel:
    """An embedded model of its own with adapters on it."""
    model = embedded_model(own=True)
    return get_peft_model(model, lora_config(model, config))


@pytest.mark.parametrize("projector", [True, False])
def test_full_trains_language_head_and_maybe_projector(projector: bool) -> None:
    config = dataclasses.replace(FULL, train_projector=projector)
    model = embedded_model(own=True)
    freeze_for_full(model, config)
    parts = {"language": LANGUAGE, "head": HEAD} | ({"projector": PROJECTOR} if projector else {})
    assert assert_freeze_plan(model, config) == trainable_parts(model) == parts
    for name, parameter in model.named_parameters():
        tower = "vision_tower" in name
        assert parameter.requires_grad == (not tower and (projector or "projector" not in name))
    assert any("vision_tower" in n for n, _ in model.named_parameters())


@pytest.mark.parametrize("projector", [True, False])
def test_lora_trains_adapters_and_maybe_projector(projector: bool) -> None:
    config = dataclasses.replace(LORA, train_projector=projector)
    model = wrapped(config)
    parts = {"language": LORA_VALUES} | ({"projector": PROJECTOR} if projector else {})
    assert assert_freeze_plan(model, config) == parts
    for name, parameter in model.named_parameters():
        copied = "multi_modal_projector" in name and "modules_to_save" in name
        assert parameter.requires_grad == ("lora_" in name or copied), name


def test_lora_reaches_the_seven_linears_of_every_layer_and_nothing_else() -> None:
    model = wrapped(LORA)
    reached = {n.rsplit(".lora_A", 1)[0] for n, _ in model.named_parameters() if ".lora_A" in n}
    assert len(reached) == 4 * 7
    assert {n.rsplit(".", 1)[1] for n in reached} == set(LINEARS)
    for name in reached:
        assert ".language_model.layers." in name
        assert not any(part in name for part in ("vision", "projector", "lm_head"))
    # The tower has linears of the same names, which a target by suffix would have taken.
    tower = [n for n, m in model.named_modules() if "vision_tower" in n and n.endswith("q_proj")]
    assert len(tower) == 4


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "idefics3"])
def test_every_family_keeps_its_tower_and_head_frozen(family: str) -> None:
    import copy

    base = tiny(family)[0].float()
    for config in (FULL, LORA, dataclasses.replace(LORA, train_projector=False)):
        model = copy.deepcopy(base)
        if config.adapter == "full":
            freeze_for_full(model, config)
        else:
            model = get_peft_model(model, lora_config(model, config))
        parts = assert_freeze_plan(model, config)
        assert ("projector" in parts) == config.train_projector and "tower" not in parts
        assert ("head" in parts) == (config.adapter == "full")
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert not any("vision" in n or "visual.blocks" in n or "patch_embed" in n for n in trained)
        if config.adapter == "lora":
            assert sum(".lora_A" in n for n in trained) == 2 * 7  # two layers


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj.weight", "tower"),
        ("model.vision_model.embeddings.patch_embedding.weight", "tower"),
        ("model.visual.blocks.0.attn.qkv.weight", "tower"),
        ("model.visual.merger.mlp.0.weight", "projector"),
        ("model.multi_modal_projector.linear_1.bias", "projector"),
        ("model.connector.modality_projection.proj.weight", "projector"),
        ("base_model.model.lm_head.weight", "head"),
        ("model.language_model.layers.1.mlp.down_proj.weight", "language"),
        ("base_model.model.model.language_model.layers.1.mlp.up_proj.lora_A.default.weight",
         "language"),
        ("model.language_model.embed_tokens.weight", "language"),
        ("model.text_model.norm.weight", "language"),
    ],
)  # fmt: skip
def test_parts_by_name(name: str, part: str) -> None:
    assert Family.part_of(name) == part


def test_a_wrong_plan_is_named() -> None:
    model = embedded_model(own=True)
    freeze_for_full(model, FULL)
    name, parameter = next((n, p) for n, p in model.named_parameters() if "vision_tower" in n)
    parameter.requires_grad_(True)
    with pytest.raises(AssertionError, match=name):
        assert_freeze_plan(model, FULL)
    parameter.requires_grad_(False)
    name, parameter = next((n, p) for n, p in model.named_parameters() if "language_model" in n)
    parameter.requires_grad_(False)
    with pytest.raises(AssertionError, match=name):
        assert_freeze_plan(model, FULL)
    lora = wrapped(LORA)
    with pytest.raises(AssertionError):
        assert_freeze_plan(lora, dataclasses.replace(LORA, train_projector=False))


def test_a_model_without_such_linears_is_refused() -> None:
    with pytest.raises(InputError, match="has none of the linear layers"):
        lora_config(nn.Sequential(nn.Linear(2, 2)), LORA)


# --- the reference ------------------------------------------------------------------------------


def batch() -> dict:
    collated = PreferenceCollator(embedded_processor())(spread(mini_rows(), 3))
    return {k: v for k, v in collated.items() if k != "completion_mask"}


def shake(model: nn.Module, steps: int = 3) -> None:
    """A few real updates of everything that trains."""
    inputs = batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        logits = model(**inputs).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    return model.eval()(**batch()).logits


def test_with_adapters_off_a_trained_lora_is_its_base_bit_by_bit() -> None:
    """Projector included: the reference must not see through a projector that was trained."""
    base = logits_of(embedded_model())
    model = wrapped(LORA)
    assert torch.equal(logits_of(model), base)  # and before training it is the base
    shake(model)
    trained = logits_of(model)
    with model.disable_adapter():
        reference = logits_of(model)
    assert torch.equal(reference, base)
    assert (trained - base).abs().max() > 0.1
    assert torch.equal(logits_of(model), trained)  # adapters are on again
    copied = [n for n, p in model.named_parameters() if "modules_to_save" in n and p.requires_grad]
    own = dict(model.named_parameters())
    original = {n: own[n.replace("modules_to_save.default", "original_module")] for n in copied}
    assert copied and all(not torch.equal(own[n], original[n]) for n in copied)


@pytest.mark.parametrize("projector", [True, False])
def test_a_saved_lora_comes_back_with_the_same_logits(projector: bool, tmp_path: Path) -> None:
    config = dataclasses.replace(LORA, train_projector=projector)
    model = load_model(config)
    model = get_peft_model(model, lora_config(model, config))
    shake(model)
    model.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} <= {".safetensors", ".json", ".md"}
    back = load_policy(config, tmp_path)
    assert not back.training
    assert torch.equal(logits_of(back), logits_of(model))
    assert (logits_of(back) - logits_of(embedded_model())).abs().max() > 0.1


def test_a_saved_full_model_comes_back_with_the_same_logits(tmp_path: Path) -> None:
    model = embedded_model(own=True)
    freeze_for_full(model, FULL)
    shake(model)
    model.save_pretrained(tmp_path)
    back = load_policy(FULL, tmp_path)
    assert torch.equal(logits_of(back), logits_of(model))
    assert (logits_of(back) - logits_of(embedded_model())).abs().max() > 0.1


# --- loading ------------------------------------------------------------------------------------


def test_no_trained_folder_means_the_base() -> None:
    assert torch.equal(logits_of(load_policy(LORA)), logits_of(embedded_model()))


def test_what_is_no_model_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither an adapter nor a model"):
        load_policy(LORA, tmp_path)
    for name in (str(tmp_path), str(tmp_path / "gone"), "no-such/model"):
        with pytest.raises(InputError, match="cannot load model"):
            load_model(dataclasses.replace(FULL, name=name))
        with pytest.raises(InputError, match="cannot load a processor"):
            load.load_processor(dataclasses.replace(FULL, name=name))


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    model = wrapped(LORA)
    model.peft_config["default"].base_model_name_or_path = "org/another-model"
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="adapter of org/another-model"):
        load_policy(LORA, tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = embedded_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot load model"):
        load_model(dataclasses.replace(FULL, name=str(tmp_path)))


def test_a_corrupt_weight_file_is_an_input_error(tmp_path: Path) -> None:
    model = embedded_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="cannot load model"):
        load_model(dataclasses.replace(FULL, name=str(tmp_path)))


def test_weights_are_hashed_file_by_file() -> None:
    hashes = load.weights_sha256(FULL)
    assert list(hashes) == ["model.safetensors"] and len(hashes["model.safetensors"]) == 64
    assert load.weights_sha256(dataclasses.replace(FULL, name="org/model")) == {}
    assert model_path(dataclasses.replace(FULL, name="org/model")) == "org/model"


def test_the_processor_pads_left_for_generation() -> None:
    assert embedded_processor().tokenizer.padding_side == "left"


MODEL: dict[str, Seen] = {
    "name": lambda w: w.model.name_or_path,
    "revision": lambda w: w.model.config.stands_at,
    "train_projector": lambda w: w.lora.modules_to_save is not None,
    "lora_rank": lambda w: w.lora.r,
    "lora_alpha": lambda w: w.lora.lora_alpha,
    "lora_targets": lambda w: tuple(sorted({n.split(".")[-1] for n in w.lora.target_modules})),
}
MODEL_FREE = {
    "adapter": "says what is loaded and what trains; tested in this file",
    "image_aspect": "of the processor; tested in test_llava_original.py",
    "gradient_checkpointing": "every trainer turns it on; tested in test_settings_handover*.py",
    "projector_learning_rate": "of the optimizers; tested in test_projector_rate.py",
    "share_prefix": "whoever loads a model applies it; tested in test_settings_handover.py",
}


def test_every_setting_of_model_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of the Hub's cache, in which only the commit of the settings can be loaded."""
    newest, commit = "a" * 40, "c0ffee" + "0" * 34
    repo = tmp_path / "models--owner--model"
    shutil.copytree(ASSETS / "model", repo / "snapshots" / commit)
    path = repo / "snapshots" / commit / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stands_at": commit}))
    (repo / "snapshots" / newest).mkdir()
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(newest)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    changes = {
        "name": "owner/model", "revision": commit, "train_projector": False, "lora_rank": 3,
        "lora_alpha": 7, "lora_targets": ("q_proj", "up_proj"),
    }  # fmt: skip
    plain = ModelConfig(name="embedded", adapter="lora")
    assert all(value != getattr(plain, name) for name, value in changes.items())
    config = dataclasses.replace(plain, **changes)
    model = load_model(config)
    made = SimpleNamespace(model=model, lora=lora_config(model, config))
    assert_arrives(config, MODEL, made, MODEL_FREE)
    assert load_policy(config).config.stands_at == commit
    assert load.model_hashes(config) == {"commit": commit}
    vocabulary = embedded_processor().tokenizer.get_vocab()
    assert load_processor(config).tokenizer.get_vocab() == vocabulary
    for loading in (load_model, load_processor):
        with pytest.raises(InputError, match="owner/model"):
            loading(dataclasses.replace(config, revision=""))


# --- four bit -----------------------------------------------------------------------------------


def test_qlora_trains_adapters_over_four_bit_and_leaves_tower_and_head_whole() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="4 bit needs bitsandbytes")
    config = dataclasses.replace(LORA, adapter="qlora")
    try:
        model = load_model(config)
    except Exception as error:  # noqa: BLE001 - whatever the build lacks
        pytest.skip(f"bitsandbytes cannot quantise on this machine: {error}")
    four_bit = [n for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(four_bit) == 4 * 7 and all("language_model.layers" in n for n in four_bit)
    model = get_peft_model(model, lora_config(model, config))
    assert assert_freeze_plan(model, config) == {"language": LORA_VALUES, "projector": PROJECTOR}
    base = logits_of(model)
    assert torch.isfinite(base).all()
    shake(model)
    trained = logits_of(model)
    with model.disable_adapter():
        reference = logits_of(model)
    assert torch.equal(reference, base) and (trained - base).abs().max() > 0.05
    close = logits_of(embedded_model())
    agree = (base.argmax(-1) == close.argmax(-1)).float().mean()
    assert 0.5 < agree < 1.0  # quantised: near the base, and not it


def test_evaluating_takes_no_gradient_from_four_bit() -> None:
    """On some CPUs bitsandbytes would repack the weights in the first evaluation pass."""
    pytest.importorskip("bitsandbytes", reason="4 bit needs bitsandbytes")
    linear = load_model(dataclasses.replace(LORA, adapter="qlora")).model.language_model
    linear = linear.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, linear.in_features)
    with torch.no_grad():
        before = linear.eval()(x)
        again = linear(x)
    x.requires_grad_()
    trained = linear.train()(x)
    torch.testing.assert_close(trained, before)
    assert torch.equal(again, before)
    trained.sum().backward()
    weight = bitsandbytes_weight(linear)
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x), rtol=1e-4, atol=1e-4)


def bitsandbytes_weight(linear: torch.nn.Module) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()


def test_frozen_trains_the_projector_alone() -> None:
    config = dataclasses.replace(FULL, adapter="frozen")
    model = embedded_model(own=True)
    freeze_for_full(model, config)
    assert assert_freeze_plan(model, config) == trainable_parts(model) == {"projector": PROJECTOR}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("multi_modal_projector" in name for name in trained)


@pytest.mark.parametrize("adapter", ["qlora", "lora"])
def test_qlora_asks_for_nf4_with_double_quantisation(
    adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def loading(path: object, **options: object) -> None:
        asked.update(options)
        raise ValueError("asked")

    monkeypatch.setattr(load.AutoModelForImageTextToText, "from_pretrained", loading)
    with pytest.raises(InputError, match="asked"):
        load_model(dataclasses.replace(LORA, adapter=adapter))
    quantisation = asked["quantization_config"]
    if adapter == "lora":
        assert quantisation is None
        return
    assert quantisation.load_in_4bit and quantisation.bnb_4bit_quant_type == "nf4"
    assert quantisation.bnb_4bit_use_double_quant is True
    assert quantisation.bnb_4bit_compute_dtype == load.compute_dtype()
    assert "lm_head" in quantisation.llm_int8_skip_modules
    assert any("vision" in name for name in quantisation.llm_int8_skip_modules)


def test_what_trains_over_a_rounded_base_is_fp32_and_the_projector_is_the_bases() -> None:
    model = wrapped(dataclasses.replace(LORA, train_projector=True))
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:  # as trl casts them
        parameter.data = parameter.data.bfloat16()
    train_in_fp32(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for name, value in module.original_module.state_dict().items():
                for copy in module.modules_to_save.values():
                    assert torch.equal(copy.state_dict()[name], value), name

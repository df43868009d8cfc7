"""The vLLM backend against a stand-in for the engine: what it is asked, and what comes out."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from peft import get_peft_model

from spavl_lib.config import GenerationConfig, ModelConfig
from spavl_lib.errors import InputError
from spavl_lib.generation.generate import generate
from spavl_lib.generation.stage import load_answerer
from spavl_lib.generation.vllm import VLLMModel, served
from spavl_lib.modelling.adapters import lora_config
from spavl_lib.modelling.load import load_policy, model_path
from tests.helpers import embedded_model, embedded_processor, mini_rows, smoke

LORA = ModelConfig(name="embedded", adapter="lora", lora_rank=4, lora_alpha=8)


class Engine:
    """Answers `No.` and EOS to everything, and keeps what it was asked."""

    made: list["Engine"] = []

    def __init__(self, **options: object) -> None:
        self.options, self.asked = options, []
        Engine.made.append(self)

    def generate(self, prompts: list, sampling: object, **options: object) -> list:
        self.asked.append((prompts, sampling, options))
        tokenizer = embedded_processor().tokenizer
        ids = [*tokenizer.encode("No.", add_special_tokens=False), tokenizer.eos_token_id]
        output = SimpleNamespace(token_ids=ids, finish_reason="stop")
        return [SimpleNamespace(outputs=[output]) for _ in prompts]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    module, request = ModuleType("vllm"), ModuleType("vllm.lora.request")
    module.LLM, module.SamplingParams = Engine, lambda **kw: SimpleNamespace(**kw)
    request.LoRARequest = lambda *args: args
    for name, value in (("vllm", module), ("vllm.lora", ModuleType("vllm.lora")),
                        ("vllm.lora.request", request)):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, value)
    Engine.made = []
    return Engine.made


def adapter(folder: Path, *, projector: bool) -> Path:
    config = ModelConfig(**vars(LORA) | {"train_projector": projector})
    model = embedded_model(own=True)
    get_peft_model(model, lora_config(model, config)).save_pretrained(folder)
    embedded_processor().save_pretrained(folder)
    return folder


def test_prompts_are_ids_with_one_bos_and_one_image_token(vllm: list, tmp_path: Path) -> None:
    rows = [dict(r) for r in mini_rows().select(range(3))]
    rows[2]["image"] = None
    config = GenerationConfig(batch_size=8, backend="vllm", max_new_tokens=7)
    model = load_answerer(smoke({"generation.backend": "vllm", "model.adapter": "lora"}), None)
    processor = embedded_processor()
    records = generate(model, processor, rows, config, tmp_path / "a.jsonl")
    assert [r["response"] for r in records] == ["No."] * 3
    assert all(r["finished"] and r["num_tokens"] > 0 for r in records)
    [(prompts, sampling, options)] = vllm[0].asked
    assert (sampling.max_tokens, sampling.temperature) == (7, 0.0)
    assert options["lora_request"] is None and "enable_lora" not in vllm[0].options
    image_token = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    with_image = 0
    for prompt in prompts:
        ids = prompt["prompt_token_ids"]
        assert ids.count(processor.tokenizer.bos_token_id) == 1
        assert ids.count(image_token) == ("multi_modal_data" in prompt)
        with_image += "multi_modal_data" in prompt
    assert with_image == 2


def test_a_prefilled_answer_ends_the_prompt_and_begins_the_response(
    vllm: list, tmp_path: Path
) -> None:
    first, second = (dict(r) for r in mini_rows().select(range(2)))
    rows = [first | {"prefill": "To do"}, second]
    config = GenerationConfig(batch_size=8, backend="vllm", max_new_tokens=7)
    model = load_answerer(smoke({"generation.backend": "vllm", "model.adapter": "lora"}), None)
    processor = embedded_processor()
    records = generate(model, processor, rows, config, tmp_path / "a.jsonl")
    assert [r["response"] for r in records] == ["To doNo.", "No."]  # the engine wrote no space
    [(prompts, _, _)] = vllm[0].asked
    asked = [processor.tokenizer.decode(prompt["prompt_token_ids"]) for prompt in prompts]
    assert {text.rpartition("ASSISTANT:")[2] for text in asked} == {" To do", ""}


def test_an_adapter_goes_by_name_only_with_a_frozen_projector(vllm: list, tmp_path: Path) -> None:
    frozen = adapter(tmp_path / "frozen" / "model", projector=False)
    assert served(LORA, frozen) == (model_path(LORA), frozen)
    model = VLLMModel(LORA, frozen)
    assert model.engine.options["enable_lora"] and model.engine.options["max_lora_rank"] == 4
    trained = adapter(tmp_path / "trained" / "model", projector=True)
    base, name = served(LORA, trained)
    assert name is None and base == str(tmp_path / "trained" / "merged")
    whole = load_policy(ModelConfig(name=base, adapter="full"))
    assert whole.config.model_type == "llava"
    stamp = (Path(base) / "model.safetensors").stat().st_mtime_ns
    assert served(LORA, trained)[0] == base
    assert (Path(base) / "model.safetensors").stat().st_mtime_ns == stamp


def test_without_vllm_and_with_four_bits_it_says_what_to_do(vllm: list) -> None:
    with pytest.raises(InputError, match="4-bit base; set model.adapter = lora"):
        VLLMModel(ModelConfig(name="embedded", adapter="qlora"))
    sys.modules["vllm"] = None
    with pytest.raises(InputError, match="pip install vllm"):
        VLLMModel(LORA)


def test_precision_and_revision_are_those_of_the_run(
    vllm: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPAVL_DTYPE", "fp16")
    config = ModelConfig(**vars(LORA) | {"name": "owner/model", "revision": "c0ffee"})
    options = VLLMModel(config).engine.options
    assert (options["dtype"], options["revision"]) == ("float16", "c0ffee")
    assert "revision" not in VLLMModel(LORA).engine.options

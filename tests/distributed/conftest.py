"""Small runs in one process or several, each kind and engine once."""

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spavl_lib import launch
from spavl_lib.config import Config
from spavl_lib.run import Run, Stage, read_json, read_jsonl
from tests.helpers import smoke

# Two processes take one batch of four pairs each where one process takes both in turn.
SMALL = {
    "data.train_rows": 40, "data.validation_rows": 10, "data.test_rows": 6,
    "reward.max_steps": 5, "reward.save_steps": 2, "reward.per_device_batch_size": 4,
    "reward.gradient_accumulation_steps": 2, "model.lora_rank": 4,
    "dpo.max_steps": 5, "dpo.save_steps": 2, "dpo.per_device_batch_size": 4,
    "dpo.gradient_accumulation_steps": 2,
}  # fmt: skip
ADAPTER = {"reward": "full", "dpo": "lora"}


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished training left."""

    stage: Stage
    losses: dict[int, float]
    summary: dict


def config_of(kind: str, name: str, **changes: object) -> Config:
    """A small training of a kind."""
    dotted = {k.replace("__", "."): v for k, v in changes.items()}
    base = SMALL | {"model.adapter": ADAPTER.get(kind, "lora")}
    return smoke(base | dotted, run_name=name)


def read(stage: Stage) -> Result:
    """A finished stage's losses by step, and its summary."""
    rows = read_jsonl(stage.metrics_path)
    return Result(stage, {r["step"]: r["loss"] for r in rows if "loss" in r}, stage.summary)


def train(kind: str, config: Config) -> Result:
    """Train to the end."""
    stage = Run(config).stage(kind)
    launch.train(kind, config, stage)
    return read(stage)


def process_of(stage: Stage, rank: int) -> int:
    """The id of a training process, once it has reported."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        for path in stage.path.glob(f".ranks/*/rank-{rank}.json"):
            return read_json(path)["pid"]
        time.sleep(0.02)
    raise TimeoutError(f"rank {rank} never reported")


def when(condition: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Do something in the background once a condition holds."""

    def wait() -> None:
        until = time.monotonic() + 200
        while not condition():
            if time.monotonic() > until:
                return
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.fixture(scope="session")
def alone() -> Callable[[str], Result]:
    """A kind's training in one process, made once."""
    made: dict[str, Result] = {}

    def get(kind: str) -> Result:
        if kind not in made:
            made[kind] = train(kind, config_of(kind, f"alone-{kind}"))
        return made[kind]

    return get

"""Small runs in one process or several, each kind and engine once."""

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from spavl_lib import pipeline
from spavl_lib.config import Config
from spavl_lib.runs.files import read_json, read_jsonl
from spavl_lib.runs.stage import Run, Stage
from tests.helpers import smoke

# Two processes take one batch of four pairs each where one process takes both in turn.
SMALL = {
    "data.train_rows": 40, "data.validation_rows": 10, "data.test_rows": 6,
    "reward.max_steps": 5, "reward.save_steps": 2, "reward.per_device_batch_size": 4,
    "reward.gradient_accumulation_steps": 2, "model.lora_rank": 4,
    "dpo.max_steps": 5, "dpo.save_steps": 2, "dpo.per_device_batch_size": 4,
    "dpo.gradient_accumulation_steps": 2,
    # Batches of a rollout and of a minibatch that do not come out even between two.
    "ppo.max_steps": 5, "ppo.save_steps": 2, "ppo.rollout_batch_size": 6, "ppo.max_new_tokens": 8,
    "ppo.per_device_batch_size": 2, "ppo.num_minibatches": 2, "ppo.sft_coef": 0.5,
}  # fmt: skip
ADAPTER = {"reward": "full", "dpo": "lora", "ppo": "lora"}
LOSSES = {"loss", "loss/policy_avg", "loss/value_avg", "loss/sft_avg"}


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
    if kind == "ppo":
        base["ppo.reward_model"] = str(_reward_model())
    return smoke(base | dotted, run_name=name)


def _reward_model() -> Path:
    """Of two steps, for PPO's runs to train against; made once."""
    config = smoke(
        SMALL | {"model.adapter": "lora", "reward.max_steps": 2}, run_name="reward-of-ppo"
    )
    stage = Run(config).stage("reward")
    if not stage.done:
        pipeline.train("reward", config, stage)
    return stage.path / "model"


def read(stage: Stage) -> Result:
    """A finished stage's losses by step, and its summary."""
    rows = read_jsonl(stage.metrics_path)
    losses = {r["step"]: sum(r.get(k, 0.0) for k in LOSSES) for r in rows if LOSSES & r.keys()}
    return Result(stage, losses, stage.summary)


def train(kind: str, config: Config) -> Result:
    """Train to the end."""
    stage = Run(config).stage(kind)
    pipeline.train(kind, config, stage)
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
    """Do something in the background once a condition holds; give up after ten minutes."""

    def wait() -> None:
        until = time.monotonic() + 600
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

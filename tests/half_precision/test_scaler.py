"""fp16 on a CPU: a scaler is there, logits are fp16, and a skipped step is no fault.

The loss is scaled so far that the first steps overflow, as on a GPU, where the scale begins at
65,536 and falls by half until no gradient overflows.
"""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from spavl_lib import machine
from spavl_lib.config import LaunchConfig
from spavl_lib.errors import NonFiniteError
from spavl_lib.runs.files import read_jsonl
from spavl_lib.runs.maker import maker_of
from spavl_lib.runs.stage import Run, Stage
from spavl_lib.trainers import checkpoint
from spavl_lib.trainers.engines import build_engine
from spavl_lib.trainers.exact_trainer import CheckedMixin
from spavl_lib.trainers.guards import OWN_SCALE, check_steps_taken
from spavl_lib.trainers.ppo import PPOTrainer
from tests.helpers import smoke

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.DTYPE, "fp16")


def engine_of(model: nn.Module, scale: float = 4.0) -> Any:
    groups = {"policy": list(model.parameters())}
    engine = build_engine(model, groups, torch.optim.SGD(model.parameters(), 1.0), LaunchConfig())
    engine.scaler.scale(torch.zeros(()))  # it begins with its first loss
    engine.scaler.load_state_dict(engine.scaler.state_dict() | {"scale": scale})
    return engine


def gradients(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)


# --- PPO's own loop -----------------------------------------------------------------------------


def test_the_engine_scales_on_the_device_that_computes() -> None:
    engine = engine_of(nn.Linear(2, 1, bias=False))
    assert engine.scaler.is_enabled() and engine.scaler._device == "cpu"


def test_an_overflow_is_skipped_and_said() -> None:
    model = nn.Linear(2, 1, bias=False)
    engine, before = engine_of(model), model.weight.detach().clone()
    gradients(model, math.inf)
    engine.step(1.0, 1, ["a"])
    assert engine.skipped and torch.equal(model.weight, before) and engine.scaler.get_scale() == 2
    gradients(model, 0.2)
    norms = engine.step(1.0, 2, ["a"])
    assert not engine.skipped and not torch.equal(model.weight, before)
    assert norms["policy"] == pytest.approx(0.1 * 2**0.5)  # without the scale


def test_ppos_schedule_waits_for_a_step_that_was_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SimpleNamespace(
        zero_grad=lambda: None, skipped=True, step=lambda *_: {"policy": math.inf}
    )
    stepped: list[int] = []
    schedule = SimpleNamespace(get_last_lr=lambda: [0.5], step=lambda: stepped.append(1))
    trainer = SimpleNamespace(
        engine=engine, scheduler=schedule, step=0, settings=SimpleNamespace(max_grad_norm=1.0),
        accumulate=lambda *_, **__: {"loss": 1.0}, optimizer_steps=0,
    )  # fmt: skip
    rollout = SimpleNamespace(prompts=[SimpleNamespace(row_id="a")])
    assert PPOTrainer.minibatch(trainer, rollout, [0], None) == {"loss": 1.0, "learning_rate": 0.5}
    engine.skipped = False
    assert "grad_norm/policy" in PPOTrainer.minibatch(trainer, rollout, [0], None)
    assert stepped == [1] and trainer.optimizer_steps == 1


def test_a_gradient_that_is_no_number_at_its_own_scale_is_a_fault() -> None:
    """Otherwise the scaler would skip every step there is, and nothing would be learnt."""
    model = nn.Linear(2, 1, bias=False)
    engine = engine_of(model, scale=OWN_SCALE)
    gradients(model, math.nan)
    with pytest.raises(NonFiniteError, match="step 3"):
        engine.step(1.0, 3, ["a"])


def test_a_training_without_a_taken_step_is_a_fault() -> None:
    check_steps_taken(1, 6)
    check_steps_taken(0, 0)  # resumed at its end
    with pytest.raises(NonFiniteError, match="all 6 steps were skipped"):
        check_steps_taken(0, 6)


# --- every trainer ------------------------------------------------------------------------------


class Seen:
    """What a training showed: types of logits and scores, and the scalers' states."""

    def __init__(self) -> None:
        self.logits: set[torch.dtype] = set()
        self.scalers: list[torch.amp.GradScaler] = []
        self.start = 2.0**22  # the scale of the first step


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found, forward = Seen(), nn.Linear.forward

    def noted(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        out = forward(self, x)
        if torch.is_grad_enabled() and self.out_features > 1000:
            found.logits.add(out.dtype)
        return out

    monkeypatch.setattr(nn.Linear, "forward", noted)
    mm = torch.mm

    def noted_mm(*args: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        if out is not None:  # trl's head, which computes a tile of logits at a time
            found.logits.add(out.dtype)
        return mm(*args, out=out)

    monkeypatch.setattr(torch, "mm", noted_mm)
    init = torch.amp.GradScaler.__init__

    def began(self: torch.amp.GradScaler, *args: Any, **options: Any) -> None:
        init(self, *args, **options | {"init_scale": found.start})
        found.scalers.append(self)

    monkeypatch.setattr(torch.amp.GradScaler, "__init__", began)
    return found


def settings(kind: str, steps: int, folder: Path | None = None) -> dict:
    overrides = {
        "model.adapter": "lora", "data.train_rows": 8, "data.validation_rows": 2,
        "data.test_rows": 2, f"{kind}.max_steps": steps, f"{kind}.per_device_batch_size": 2,
        f"{kind}.warmup_steps": 0, f"{kind}.save_steps": 100,
    }  # fmt: skip
    if folder:
        overrides |= {f"{kind}.reward_model": str(folder), f"{kind}.max_new_tokens": 4}
    if kind == "rloo":
        # A group of four answers, hot enough that no two models say four times the same.
        overrides |= {"rloo.per_device_batch_size": 4, "rloo.temperature": 2.0}
    if kind == "ppo":
        overrides |= {"ppo.rollout_batch_size": 4, "ppo.num_minibatches": 2, "ppo.ppo_epochs": 2}
    return overrides


def trained(kind: str, steps: int, root: Path, folders: dict[str, Path]) -> Stage:
    folder = folders["lora"] if kind in ("ppo", "rloo") else None
    config = smoke(settings(kind, steps, folder))
    stage = Run(config, root=root).stage(kind)
    maker_of(kind)(config, stage)
    return stage


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("dpo", 12),
        pytest.param("reward", 12, marks=pytest.mark.slow),
        pytest.param("ppo", 5, marks=pytest.mark.slow),
        pytest.param("rloo", 12, marks=pytest.mark.slow),
    ],
)
def test_steps_are_skipped_until_no_gradient_overflows(
    kind: str, steps: int, seen: Seen, tmp_path: Path, reward_folders: dict[str, Path]
) -> None:
    stage = trained(kind, steps, tmp_path, reward_folders)
    log = [r for r in read_jsonl(stage.metrics_path) if "learning_rate" in r]
    skipped = [r for r in log if r.get("skipped")]
    [scaler] = [s for s in seen.scalers if s.is_enabled() and s._scale is not None]
    assert 0 < len(skipped) < len(log) and log[0] in skipped
    assert 1 < scaler.get_scale() < seen.start
    if kind != "reward":
        assert seen.logits == {torch.float16}
    taken = [r for r in log if r not in skipped]
    norm = "grad_norm/policy" if kind == "ppo" else "grad_norm"
    assert all(0 < r[norm] < math.inf for r in taken)


def test_a_resumed_training_keeps_its_scale(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen.start = 2.0**40
    states, save = [], CheckedMixin._save_checkpoint

    def saved(self: Any, *args: Any, **options: Any) -> None:
        save(self, *args, **options)
        newest = checkpoint.newest_checkpoint(self.checkpoints)
        states.append((checkpoint.load_state(newest)["scaler"], self.accelerator.scaler))

    monkeypatch.setattr(CheckedMixin, "_save_checkpoint", saved)
    with pytest.raises(NonFiniteError, match="all 2 steps were skipped"):
        trained("dpo", 2, tmp_path, {})
    state, scaler = states[-1]
    assert state["scale"] == scaler.get_scale() == 2.0**38

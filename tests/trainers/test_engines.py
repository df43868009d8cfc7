"""The engine of a hand-written loop: sums over processes, clips by group, keeps what may change."""

import pytest
import torch
from torch import Tensor, nn

from spavl_lib import machine
from spavl_lib.config import LaunchConfig
from spavl_lib.distributed import group
from spavl_lib.errors import NonFiniteError
from spavl_lib.trainers.checkpoint import keeping_settings
from spavl_lib.trainers.engines import Engine, build_engine


def engine_of(model: nn.Module, rate: float = 0.0) -> Engine:
    groups = {"policy": [model[0].weight], "value": [model[1].weight]}
    parameters = [{"params": p, "lr": rate} for p in groups.values()]
    return build_engine(model, groups, torch.optim.SGD(parameters), LaunchConfig())


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False))


def test_gradients_of_two_processes_are_added_also_where_one_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small()
    model[1].to(torch.bfloat16)
    engine = engine_of(model)
    model[0].weight.grad = torch.full((2, 3), 2.0)
    monkeypatch.setattr(machine, "world_size", lambda: 2)

    def other_has_one_everywhere(values: Tensor) -> Tensor:
        return values + 1

    monkeypatch.setattr(group, "sum_of", other_has_one_everywhere)
    engine._sum()
    assert torch.equal(model[0].weight.grad, torch.full((2, 3), 3.0))
    assert torch.equal(model[1].weight.grad, torch.ones(2, 2, dtype=torch.bfloat16))


def test_groups_are_clipped_apart() -> None:
    model = small()
    engine = engine_of(model)
    model[0].weight.grad = torch.full((2, 3), 10.0)
    model[1].weight.grad = torch.full((2, 2), 0.1)
    norms = engine.step(1.0, 1, ["row"])
    assert norms["policy"] == pytest.approx(600**0.5) and norms["value"] == pytest.approx(0.2)
    assert float(model[0].weight.grad.norm()) == pytest.approx(1.0, abs=1e-4)
    assert torch.equal(model[1].weight.grad, torch.full((2, 2), 0.1))


def test_a_gradient_that_is_no_number_moves_nothing() -> None:
    model = small()
    engine = engine_of(model, rate=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    model[0].weight.grad = torch.full((2, 3), 1.0)
    model[1].weight.grad = torch.full((2, 2), torch.nan)
    with pytest.raises(NonFiniteError, match=r"step 4: gradient of 1\.weight.* on rows a, b"):
        engine.step(1.0, 4, ["a", "b"])
    assert all(map(torch.equal, before, model.parameters()))


def test_another_number_of_processes_than_asked_for_is_refused() -> None:
    model = small()
    groups = {"policy": list(model.parameters())}
    with pytest.raises(RuntimeError, match="asked for 2 processes, got 1"):
        Engine(model, groups, torch.optim.SGD(model.parameters()), LaunchConfig(num_processes=2))


@pytest.mark.parametrize("rate", [1.0, 3.0])
def test_a_changed_rate_takes_effect_at_the_place_in_the_schedule(rate: float) -> None:
    def made(rate: float) -> tuple:
        weight = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=rate / 10)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))

    optimizer, scheduler = made(1.0)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    stored = optimizer.state_dict(), scheduler.state_dict()
    optimizer, scheduler = made(rate)
    with keeping_settings(optimizer, scheduler):
        optimizer.load_state_dict(stored[0])
        scheduler.load_state_dict(stored[1])
    [group] = optimizer.param_groups
    assert group["lr"] == pytest.approx(rate / 4) and group["weight_decay"] == rate / 10
    scheduler.step()
    assert group["lr"] == pytest.approx(rate / 5)

"""The gates: stop flags, numbers that are none, parameters on the wrong side."""

import os
import signal
import threading

import pytest
import torch
from torch import nn

from spavl_lib.errors import NonFiniteError
from spavl_lib.runs.signals import StopFlag, stop_on_signals
from spavl_lib.trainers.guards import (
    Movement,
    gate_gradients,
    gate_loss,
)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_a_second_takes_its_course(kind: signal.Signals) -> None:
    before = signal.getsignal(kind)
    with stop_on_signals() as flag:
        assert not flag
        os.kill(os.getpid(), kind)
        assert flag and flag.reason == kind.name
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), kind)
    assert signal.getsignal(kind) is before


def test_a_signal_in_an_inner_block_stops_the_loop_around_it() -> None:
    with stop_on_signals() as outer:
        with stop_on_signals() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
        assert inner.reason == outer.reason == "SIGTERM"


def test_handlers_are_put_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), stop_on_signals():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_gets_a_flag_and_touches_no_handler() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with stop_on_signals() as flag:
            seen.append((bool(flag), signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, True)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_no_number_stops_with_step_and_rows(value: float) -> None:
    with pytest.raises(NonFiniteError, match=r"step 7: loss is (nan|-?inf) on rows a/1, a/2") as e:
        gate_loss(torch.tensor(value), 7, ["a/1", "a/2"])
    assert e.value.exit_code == 3
    gate_loss(torch.tensor(1e30), 7, [])


def test_a_gradient_that_is_no_number_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    gate_gradients(model, 3, ["r"])
    model[1].weight.grad[0, 0] = float("inf")
    model[1].bias.grad[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"step 3: gradient of 1.weight \(and 1 more\).*r;"):
        gate_gradients(model, 3, ["r"])
    model[1].weight.grad = None  # a frozen one has none
    with pytest.raises(NonFiniteError, match=r"1.bias \(and 0 more\)"):
        gate_gradients(model, 3, ["r"])


def moved(change) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    movement = Movement(model)
    with torch.no_grad():
        change(model)
    movement.check(model)


def test_movement_wants_every_trained_tensor_moved_and_no_frozen_one() -> None:
    def right(model: nn.Module) -> None:
        for parameter in model[1].parameters():
            parameter.add_(1e-5)

    def frozen_moved(model: nn.Module) -> None:
        right(model)
        model[0].weight[1, 1] += 1e-4

    def one_still(model: nn.Module) -> None:
        model[1].weight.add_(1e-5)

    moved(right)
    with pytest.raises(
        AssertionError, match=r"frozen parameters that moved: \['0.weight'\]; .* did not: \[\]"
    ):
        moved(frozen_moved)
    with pytest.raises(
        AssertionError, match=r"frozen parameters that moved: \[\]; .* did not: \['1.bias'\]"
    ):
        moved(one_still)


class Pictured(nn.Module):
    """A language part, and a projector that only images reach."""

    def __init__(self) -> None:
        super().__init__()
        self.language, self.multi_modal_projector = nn.Linear(2, 2), nn.Linear(2, 2)


def test_what_only_images_reach_is_checked_once_there_was_one() -> None:
    model = Pictured()
    movement = Movement(model)
    with pytest.raises(AssertionError, match=r"did not: \['language.weight', 'language.bias'\]"):
        movement.check(model, False)
    with torch.no_grad():
        for parameter in model.language.parameters():
            parameter.add_(1e-4)
    assert movement.check(model, False) is movement  # text alone so far
    with pytest.raises(AssertionError, match=r"did not: \['multi_modal_projector.weight'"):
        movement.check(model, True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-4)
    assert movement.check(model, True) is None


def test_a_flag_is_false_until_set() -> None:
    flag = StopFlag()
    assert not flag
    flag.set(signal.SIGTERM)
    assert flag and flag.reason == "SIGTERM"

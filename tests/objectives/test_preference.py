"""cDPO, SimPO and ORPO: by hand, and as sums of other losses."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spavl_lib.objectives.preference import cdpo_loss, orpo_loss, simpo_loss
from spavl_lib.trainers.dpo import stock_losses


def t(*values: float) -> Tensor:
    return torch.tensor(values)


def minus_log_sigmoid(value: float) -> float:
    return math.log(1 + math.exp(-value))


def test_cdpo_by_hand() -> None:
    found = cdpo_loss(t(2.0, -1.0), label_smoothing=0.1)
    expected = [0.9 * minus_log_sigmoid(m) + 0.1 * minus_log_sigmoid(-m) for m in (2.0, -1.0)]
    assert torch.allclose(found, t(*expected))
    assert torch.allclose(cdpo_loss(t(2.0), label_smoothing=0.0), -logsigmoid(t(2.0)))


def test_cdpo_is_least_where_the_odds_are_those_of_the_labels() -> None:
    """The least loss is at sigmoid(margin) = 1 - e, so sure preferences are not pushed apart."""
    margins = torch.linspace(-8, 8, 3201)
    best = margins[cdpo_loss(margins, label_smoothing=0.1).argmin()].item()
    assert best == pytest.approx(math.log(0.9 / 0.1), abs=0.01)


@pytest.mark.parametrize("smoothing", [0.05, 0.3])
def test_cdpo_is_the_sum_of_two_losses_of_trl(smoothing: float) -> None:
    margins = torch.linspace(-6, 6, 25, dtype=torch.float64)
    right, wrong = -logsigmoid(margins), -logsigmoid(-margins)
    robust = ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
    parts = dict(stock_losses([("cdpo", 0.7)], smoothing))
    summed = parts["sigmoid"] * right + parts["robust"] * robust
    torch.testing.assert_close(summed, 0.7 * cdpo_loss(margins, label_smoothing=smoothing))


def test_simpo_by_hand() -> None:
    found = simpo_loss(t(-0.5, -2.0), t(-1.0, -0.5), beta=2.0, margin=0.3)
    expected = [minus_log_sigmoid(2 * 0.5 - 0.3), minus_log_sigmoid(2 * -1.5 - 0.3)]
    assert torch.allclose(found, t(*expected))


def test_orpo_by_hand() -> None:
    """Probabilities of a token: 0.8 and 0.5, so odds of 4 and 1; and the reverse."""
    found = orpo_loss(t(math.log(0.8), math.log(0.5)), t(math.log(0.5), math.log(0.8)))
    assert torch.allclose(found, t(-math.log(4 / 5), -math.log(1 / 5)))


def test_orpo_stays_finite_where_a_response_is_certain() -> None:
    chosen = t(0.0, -1e-9, -60.0).requires_grad_()
    loss = orpo_loss(chosen, t(-1.0, -1.0, 0.0))
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(chosen.grad).all()


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_the_gradient_lifts_chosen_and_lowers_rejected(loss: str) -> None:
    chosen, rejected = t(-1.2).requires_grad_(), t(-0.9).requires_grad_()
    if loss == "simpo":
        simpo_loss(chosen, rejected, beta=2.0, margin=0.5).sum().backward()
    else:
        orpo_loss(chosen, rejected).sum().backward()
    assert chosen.grad < -0.1 and rejected.grad > 0.1


def test_what_trl_computes() -> None:
    assert stock_losses([("sigmoid", 1.0), ("sft", 0.5)], 0.0) == [("sigmoid", 1.0), ("sft", 0.5)]
    assert stock_losses([("simpo", 1.0)], 0.0) == [("sft", 0.0)]
    assert stock_losses([("orpo", 0.1), ("sft", 1.0)], 0.0) == [("sft", 1.0)]

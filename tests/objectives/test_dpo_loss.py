"""The DPO loss: by hand, by its symmetries, and against the trainer that is used."""

import math

import pytest
import torch
from torch import Tensor

from spavl_lib.objectives.dpo import dpo_loss


def t(*values: float) -> Tensor:
    return torch.tensor(values)


def test_by_hand() -> None:
    """beta 0.5; log-ratios (2, -1), (0, 0), (-4, 4): margins 1.5, 0, -4."""
    terms = dpo_loss(t(-8.0, -5.0, -14.0), t(-21.0, -6.0, -6.0), t(-10.0, -5.0, -10.0),
                     t(-20.0, -6.0, -10.0), beta=0.5)  # fmt: skip
    assert torch.allclose(terms.chosen_rewards, t(1.0, 0.0, -2.0))
    assert torch.allclose(terms.rejected_rewards, t(-0.5, 0.0, 2.0))
    expected = [math.log(1 + math.exp(-m)) for m in (1.5, 0.0, -4.0)]
    assert torch.allclose(terms.loss, t(*expected), atol=1e-6)
    assert [round(v, 4) for v in expected] == [0.2014, 0.6931, 4.0181]


def test_a_policy_that_is_its_reference_loses_ln_2() -> None:
    logps = torch.randn(16) * 50
    other = torch.randn(16) * 50
    terms = dpo_loss(logps, other, logps, other, beta=0.1)
    assert torch.allclose(terms.loss, torch.full((16,), math.log(2)), atol=1e-6)
    assert not terms.chosen_rewards.any() and not terms.rejected_rewards.any()


def test_swapping_a_pair_mirrors_it() -> None:
    torch.manual_seed(0)
    a, b, c, d = torch.randn(4, 32) * 20
    one, other = dpo_loss(a, b, c, d, beta=0.1), dpo_loss(b, a, d, c, beta=0.1)
    margin = one.chosen_rewards - one.rejected_rewards
    assert torch.equal(margin, other.rejected_rewards - other.chosen_rewards)
    # softplus(-m) - softplus(m) = -m
    assert torch.allclose(one.loss - other.loss, -margin, atol=1e-5)
    assert margin.abs().max() > 1


@pytest.mark.parametrize(
    ("margin", "slope"), [(0.0, 0.5), (2.0, 0.1192), (-2.0, 0.8808), (-40.0, 1.0)]
)
def test_the_gradient_lifts_chosen_and_lowers_rejected(margin: float, slope: float) -> None:
    """d loss = -beta * sigmoid(-margin) for chosen, its opposite for rejected, never vanishing."""
    beta = 0.2
    chosen = torch.tensor([margin / beta], requires_grad=True)
    rejected = torch.zeros(1, requires_grad=True)
    dpo_loss(chosen, rejected, t(0.0), t(0.0), beta=beta).loss.sum().backward()
    assert chosen.grad.item() == pytest.approx(-beta * slope, abs=1e-4)
    assert rejected.grad.item() == pytest.approx(beta * slope, abs=1e-4)


def test_only_the_loss_carries_a_gradient() -> None:
    chosen = t(-1.0).requires_grad_()
    terms = dpo_loss(chosen, t(-2.0), t(-1.0), t(-2.0), beta=0.1)
    assert terms.loss.requires_grad
    assert not terms.chosen_rewards.requires_grad and not terms.rejected_rewards.requires_grad


def test_far_margins_stay_finite() -> None:
    terms = dpo_loss(t(-1e4, 1e4), t(1e4, -1e4), t(0.0, 0.0), t(0.0, 0.0), beta=1.0)
    assert torch.allclose(terms.loss, t(2e4, 0.0))


@pytest.mark.parametrize("beta", [0.0, -0.1])
def test_beta_must_be_positive(beta: float) -> None:
    with pytest.raises(ValueError, match="beta must be above 0"):
        dpo_loss(t(0.0), t(0.0), t(0.0), t(0.0), beta=beta)

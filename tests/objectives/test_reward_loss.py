"""Bradley-Terry: values, gradients, and the original form whose gradient dies."""

import math

import pytest
import torch

from spavl_lib.objectives.reward import bradley_terry_loss, cost_loss


def loss_and_gradient(margin: float, **options: object) -> tuple[float, float]:
    chosen = torch.tensor([margin], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.zeros(1), **options)
    loss.sum().backward()
    return loss.item(), chosen.grad.item()


@pytest.mark.parametrize("margin", [-20.0, -3.0, 0.0, 1.5, 30.0])
def test_value_and_gradient_are_the_closed_form(margin: float) -> None:
    loss, gradient = loss_and_gradient(margin)
    assert loss == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-5)
    assert gradient == pytest.approx(-1 / (1 + math.exp(margin)), rel=1e-4)


def test_the_original_form_loses_the_gradient_of_the_worst_pairs() -> None:
    assert loss_and_gradient(-20.0)[1] == pytest.approx(-1.0, abs=1e-6)
    assert loss_and_gradient(-20.0, original_form=True)[1] == pytest.approx(-0.0002, abs=5e-5)
    assert loss_and_gradient(-10.0, original_form=True)[1] == pytest.approx(-0.82, abs=0.01)
    assert loss_and_gradient(1.0, original_form=True)[0] == pytest.approx(
        loss_and_gradient(1.0)[0], abs=1e-4
    )


def test_only_the_difference_counts_unless_centred() -> None:
    chosen, rejected = torch.tensor([0.3, -1.0]), torch.tensor([0.1, 2.0])
    plain = bradley_terry_loss(chosen, rejected)
    torch.testing.assert_close(bradley_terry_loss(chosen + 5, rejected + 5), plain)
    centred = bradley_terry_loss(chosen, rejected, center_coef=0.5)
    torch.testing.assert_close(centred - plain, torch.tensor([0.5 * 0.16, 0.5 * 1.0]))
    assert (bradley_terry_loss(chosen + 5, rejected + 5, center_coef=0.5) > centred).all()


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


def test_the_cost_loss_of_a_harmful_and_a_harmless_pair_by_hand() -> None:
    chosen, rejected = torch.tensor([-1.0, -1.0]), torch.tensor([2.0, 2.0])
    harmful = torch.tensor([True, False])
    loss = cost_loss(chosen, rejected, harmful).tolist()
    assert loss[0] == pytest.approx(softplus(-3.0) + softplus(-1.0) + softplus(-2.0), rel=1e-5)
    assert loss[1] == pytest.approx(softplus(-1.0) + softplus(2.0), rel=1e-5)


def test_the_cost_loss_pushes_harm_above_zero_and_the_rest_below() -> None:
    chosen, rejected = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    cost_loss(chosen, rejected, torch.tensor([True, False])).sum().backward()
    assert chosen.grad.tolist() == [1.0, 0.5] and rejected.grad.tolist() == [-1.0, 0.5]
